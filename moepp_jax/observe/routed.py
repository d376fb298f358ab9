"""Runs a model over text and says how each token was routed: the rows of a record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moepp_jax import mesh as mesh_lib
from moepp_jax.analysis.record import Meta
from moepp_jax.analysis.record import Rows as RecordRows
from moepp_jax.config import Config
from moepp_jax.data import Tokenizer
from moepp_jax.data.packing import Batch
from moepp_jax.model import LanguageModel
from moepp_jax.moe import rules
from moepp_jax.observe.texts import Part
from moepp_jax.processes import Rows

Observe = Callable[[Any, Batch], "Observed"]
Run = Callable[[Batch], "Observed"]  # whole batches, on the host


class Observed(NamedTuple):
    """Of a batch: as `record.Rows` has them, J MoE layers.

    Attributes:
      nll: nats of every target, whether it counts or not.
    """

    nll: Any  # [B L]
    experts: Any  # [J B L K]
    gates: Any  # [J B L K]
    kept: Any  # [J B L K]
    scores: Any  # [J B L 2]
    entropy: Any  # [J B L]


def observed(model: LanguageModel, params: Any, batch: dict[str, jax.Array]) -> Observed:
    """What a device's sequences were routed like."""
    out, nll = model.of_batch(params, batch)
    routing = out.routed.routing
    tiny = jnp.finfo(jnp.float32).tiny
    p = routing.scores / jnp.maximum(jnp.sum(routing.scores, axis=-1, keepdims=True), tiny)
    best = jax.lax.top_k(p, min(2, p.shape[-1]))[0]
    best = jnp.pad(best, [(0, 0)] * 3 + [(0, 2 - best.shape[-1])])
    entropy = -jnp.sum(p * jnp.log(jnp.maximum(p, tiny)), axis=-1)
    number = jnp.uint8 if p.shape[-1] < 256 else jnp.uint16
    experts = routing.experts.astype(number)
    return Observed(nll, experts, routing.gates, out.routed.kept, best, entropy)


def make_observe(model: LanguageModel, mesh: Mesh | None = None) -> Observe:
    """A function (params, batch) -> what is observed of it, in every process the whole.

    Args:
      mesh: that the model is sharded over; the batch then holds arrays that lie on it.
    """

    def run(params, batch):
        return observed(model, params, batch)

    if mesh is None:
        return jax.jit(run)
    tokens, by_layer = P(mesh_lib.AXES), P(None, mesh_lib.AXES)
    specs = mesh_lib.specs(model.described)
    out = Observed(tokens, *(by_layer for _ in Observed._fields[1:]))
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(specs, tokens), out_specs=out)
    return jax.jit(sharded, out_shardings=NamedSharding(mesh, P()))


def running(observe: Observe, params: Any, place: Rows | None = None) -> Run:
    """What is observed of batches with these parameters.

    Args:
      place: which rows of a batch are this process's; None: all, and it is the only one.
    """

    def run(batch: Batch) -> Observed:
        if place is not None:
            batch = place.place({name: array[place.indices] for name, array in batch.items()})
        return jax.device_get(observe(params, batch))

    return run


def observe_parts(
    run: Run,
    parts: Sequence[Part],
    tokens: int,
    batch_size: int,
    done: Callable[[int], Any] = lambda batches: None,
) -> Iterator[RecordRows]:
    """The rows of a record, batch by batch.

    Args:
      tokens: of each part, about.
      done: called after each batch.
    """
    documents = 0
    for number, part in enumerate(parts):
        before = documents
        for rows_read in rows_in_batches(part, tokens, batch_size):
            batch = part.rows.read(rows_read)
            document, place = part.rows.standing(rows_read)
            rows = rows_of(batch, run(batch), number, before + document, place)
            documents = int(rows.document[-1]) + 1
            yield rows
            done(1)


def rows_in_batches(part: Part, tokens: int, batch_size: int) -> Iterator[np.ndarray]:
    """Numbers of rows with so many tokens of a part, the last ones filled up with padding."""
    count = part.count(tokens)
    for start in range(0, count, batch_size):
        numbers = start + np.arange(batch_size)
        yield np.where(numbers < count, numbers, len(part.rows))


def batches_of(part: Part, tokens: int, batch_size: int) -> Iterator[Batch]:
    """So many tokens of a part."""
    yield from map(part.rows.read, rows_in_batches(part, tokens, batch_size))


def count_batches(parts: Sequence[Part], tokens: int, batch_size: int) -> int:
    """That `observe_parts` takes."""
    return sum(-(-part.count(tokens) // batch_size) for part in parts)


def rows_of(
    batch: Batch, found: Observed, source: int, document: np.ndarray, position: np.ndarray
) -> RecordRows:
    """The tokens of a batch that are no padding.

    Args:
      document, position: of every token, [B, L].
    """
    real = batch["segments"] > 0
    places = np.broadcast_to(np.arange(real.shape[1]), real.shape)
    loss = np.where(batch["loss_mask"] > 0, found.nll, np.nan)[real]
    return RecordRows(
        token=batch["tokens"][real],
        source=np.full(np.sum(real), source, np.int16),
        document=document[real].astype(np.int32),
        position=position[real].astype(np.int32),
        place=places[real].astype(np.int32),
        loss=loss.astype(np.float32),
        **{name: getattr(found, name)[:, real] for name in Observed._fields[1:]},
    )


def describe(
    config: Config, name: str, step: int, tokenizer: Tokenizer, sources: dict[str, str]
) -> Meta:
    """What a record says of a run.

    Args:
      sources: name -> kind of the parts, in order.
    """
    rule, every = config.moe.rule, config.model.moe_every
    size = config.model.vocab_size
    pieces = [tokenizer.piece(token) for token in range(min(tokenizer.vocab_size, size))]
    # Models may have more rows in their embedding than there are pieces.
    special = {token: text for token, (text, of) in enumerate(pieces) if of is None}
    special |= {token: f"<{token}>" for token in range(len(pieces), size)}
    texts = [(of or b"").decode("latin-1") for _, of in pieces] + [""] * (size - len(pieces))
    return Meta(
        name=name,
        step=step,
        rule=rules.fields_of(rule),
        counts=tuple(rule.pool),
        most=rule.most,
        layers=tuple(range(every, config.model.num_layers + 1, every)),
        pieces=tuple(texts),
        special=special,
        sources=sources,
        wanted=rule.ffn_load,
        machine=f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}",
    )


def with_rule(model: LanguageModel, rule: Any) -> LanguageModel:
    """The same model with another routing rule of the same parameters."""
    moe = dataclasses.replace(model.block.moe, rule=rule)
    return dataclasses.replace(model, block=dataclasses.replace(model.block, moe=moe))
