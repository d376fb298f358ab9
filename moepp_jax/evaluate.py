"""Held-out loss, and how the tokens of held-out text were routed."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from moepp_jax import mesh as mesh_lib
from moepp_jax import moe
from moepp_jax.analysis import health
from moepp_jax.config import Config
from moepp_jax.data import Dataset
from moepp_jax.errors import ConfigError
from moepp_jax.metrics import finite
from moepp_jax.processes import Rows, agree, require_alike
from moepp_jax.run import open_run
from moepp_jax.run_data import open_data
from moepp_jax.state import Assembly, Batch, assemble, in_parts

# math.exp raises an error for more: a run that goes wrong gets there.
_MOST_NATS = 700.0


@functools.lru_cache(maxsize=2)
def make_sums(parts: Assembly) -> Callable[[dict[str, Any], Batch], dict[str, Any]]:
    """The jitted (params, batch) -> sums over a batch, from which `make_evaluate` makes metrics.

    It works through a batch in as many parts as training does: what fits there fits here.
    """
    model, num_parts = parts.evaluated, parts.config.train.accumulate

    def of_part(params, batch):
        out, nll = model.of_batch(params, batch)
        groups = out.statistics.z.shape[1]
        weight_G = jnp.mean(batch["segments"].reshape(groups, -1) > 0, axis=1)
        here = {
            "nll": jnp.sum(nll * batch["loss_mask"]),
            "targets": jnp.sum(batch["loss_mask"]),
            "groups": jnp.sum(weight_G),
            "statistics": jax.tree.map(
                lambda a: jnp.einsum("lg...,g->l...", a, weight_G), out.statistics
            ),
        }
        return jax.lax.psum(here, mesh_lib.AXES)

    def on_device(params, batch):
        if num_parts == 1:
            return of_part(params, batch)
        each = jax.lax.map(functools.partial(of_part, params), in_parts(batch, num_parts))
        return jax.tree.map(lambda a: a.sum(axis=0), each)

    @jax.jit
    def sums(params, batch):
        specs = (parts.specs, mesh_lib.BATCH)
        run = jax.shard_map(on_device, mesh=parts.mesh, in_specs=specs, out_specs=P())
        return run(params, batch)

    return sums


@functools.lru_cache(maxsize=2)
def make_evaluate(
    parts: Assembly,
) -> Callable[..., dict[str, Any]]:
    """A function (params, batches) -> metrics of all the batches' text together.

    The batches hold the rows of this process; the metrics are of all, and alike in all processes.
    Where `through` is given, batches pass through it on their way from the host to the devices.

    The metrics: eval_loss (nats a target), eval_perplexity, eval_tokens (targets),
    eval_ffn_experts_per_token, eval_drop_rate, and that by eighth of the sequences and by kind of
    expert (FFN, constant, copy, zero) as eval_drop_rate_by_part and eval_drop_rate_by_kind; and by
    layer eval_load (share of the tokens that choose each expert), what `health.by_layer` makes of
    it, eval_ffn_experts_per_token_by_layer and eval_router_entropy_by_layer.
    Routing is averaged over the real tokens' groups; padding rows do not count.
    """
    rule, sums = parts.evaluated.rule, make_sums(parts)
    pool = rule.pool
    rows = Rows(mesh_lib.batch_sharding(parts.mesh), parts.config.train.batch_size)

    def evaluate(params, batches, through=iter):
        total = None
        for batch in through(map(rows.place, batches)):
            part = jax.device_get(sums(params, batch))
            # Float32 counts targets exactly up to 2^24 of them: enough for one batch.
            part = jax.tree.map(np.float64, part)
            total = part if total is None else jax.tree.map(np.add, total, part)
        if total is None or total["targets"] == 0:
            raise ValueError("there is no held-out text to evaluate on")
        loss = float(total["nll"] / total["targets"])
        stats = jax.tree.map(lambda a: a / total["groups"], total["statistics"])
        by_layer = jax.device_get(moe.summarise(stats, pool))
        return {
            "eval_loss": loss,
            "eval_perplexity": _perplexity(loss),
            "eval_tokens": int(total["targets"]),
            "eval_ffn_experts_per_token": float(by_layer["ffn_experts_per_token"].mean()),
            "eval_drop_rate": float(by_layer["drop_rate"].mean()),
            "eval_drop_rate_by_part": by_layer["drop_rate_by_part"].mean(axis=0),
            "eval_drop_rate_by_kind": by_layer["drop_rate_by_kind"].mean(axis=0),
            "eval_load": stats.load,
            **{f"eval_{name}": of for name, of in _health(stats.load, rule).items()},
            "eval_ffn_experts_per_token_by_layer": by_layer["ffn_experts_per_token"],
            "eval_router_entropy_by_layer": by_layer["router_entropy"],
        }

    return evaluate


def _health(load_JN: np.ndarray, rule: moe.Rule) -> dict[str, np.ndarray]:
    return health.by_layer(load_JN, rule.pool.n_ffn, rule.load)


def evaluate_mixture(
    evaluate: Callable,
    params: Any,
    dataset: Dataset,
    num_batches: int,
    rows: np.ndarray,
    done: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """What `make_evaluate` says of held-out text that is mixed as training text is.

    Each source is evaluated by itself, on its share of the batches and at least one. Their metrics
    are averaged by the sources' shares of the training tokens, however much held-out text they
    have: eval_loss estimates what training minimises, and does not move when a corpus grows.

    Args:
      num_batches: of all sources together; 0 is all of their text.
      rows: of each batch that this process reads.
      done: called after each batch.

    Returns:
      The average, with eval_bits_per_byte, which is comparable between tokenizers; eval_tokens is a
      sum. Of several sources each one's metrics follow, as "eval_loss/wikipedia".
    """
    each = {}
    for name, part in _parts(dataset, num_batches).items():
        source = dataset.sources[name]
        each[name] = evaluate(params, _counted(source.eval_batches(part, rows), done))
        each[name]["eval_bits_per_byte"] = _bits(each[name]["eval_loss"]) / source.bytes_per_target
    mixed = {
        metric: sum(share * each[name][metric] for name, share in dataset.shares.items())
        for metric in next(iter(each.values()))
    }
    num_bytes = sum(
        s * dataset.sources[name].bytes_per_target for name, s in dataset.shares.items()
    )
    mixed["eval_perplexity"] = _perplexity(mixed["eval_loss"])
    mixed["eval_bits_per_byte"] = _bits(mixed["eval_loss"]) / num_bytes
    mixed["eval_tokens"] = sum(metrics["eval_tokens"] for metrics in each.values())
    if len(each) > 1:
        for name, metrics in each.items():
            mixed |= {f"{metric}/{name}": value for metric, value in metrics.items()}
    return mixed


def _parts(dataset: Dataset, num_batches: int) -> dict[str, int]:
    """Each source's part of the batches, 0 for all of its own."""
    shares = dataset.shares.items()
    return {name: num_batches and max(1, round(num_batches * share)) for name, share in shares}


def _perplexity(nats: float) -> float:
    return math.inf if nats > _MOST_NATS else math.exp(nats)


def _counted(batches: Iterable, done: Callable[[], Any]) -> Iterator:
    for batch in batches:
        yield batch
        done()


def _bits(nats: float) -> float:
    return nats / math.log(2)


def evaluate_run(
    config: Config,
    workdir: str | os.PathLike,
    step: int | None = None,
    progress: Callable[[int, int], None] = lambda batches, total: None,
    num_batches: int = 0,
    dataset: Dataset | None = None,
) -> dict[str, Any]:
    """A checkpoint of a run on the held-out text.

    Args:
      config: of the run, or one that computes the same.
      step: by default the best, or the newest if none was evaluated.
      progress: called with the batches done since the last call, and their total.
      num_batches: of all sources together, each one's first; 0 is all of their text.
      dataset: whose text it is; by default that which the run began with.

    Returns:
      What `evaluate_mixture` says, with the step, as JSON takes it.

    Raises:
      ConfigError, CheckpointError: no prepared data; no checkpoint, not that one, or damaged;
        num_batches is negative.
      DataError: the data is damaged.
    """
    require_alike(f"{workdir} {config.to_json()} {num_batches}")
    if num_batches < 0:
        raise ConfigError(
            f"{num_batches} batches cannot be evaluated: give 1 or more, or 0 for all"
        )
    mesh = mesh_lib.make_mesh(config)
    dataset = dataset or agree(lambda: open_data(config, workdir))
    rows = Rows(mesh_lib.batch_sharding(mesh), config.train.batch_size).indices
    run = open_run(workdir, step, config)
    params = run.params(mesh)
    each = _parts(dataset, num_batches).items()
    total = sum(dataset.sources[name].count_eval_batches(part) for name, part in each)
    evaluate = make_evaluate(assemble(config, mesh))
    metrics = evaluate_mixture(
        evaluate, params, dataset, num_batches, rows, lambda: progress(1, total)
    )
    as_json = {name: finite(np.asarray(value).tolist()) for name, value in metrics.items()}
    return {"step": run.step} | as_json
