"""The training loop: resumes by itself, and writes the numbers of one step while the next runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from moepp_jax import evaluate as evaluate_lib
from moepp_jax import flops
from moepp_jax import mesh as mesh_lib
from moepp_jax import state as state_lib
from moepp_jax.checkpoint import Checkpoints
from moepp_jax.config import Config
from moepp_jax.data import Dataset, prepare
from moepp_jax.interrupt import Stopped, StopRequest
from moepp_jax.metrics import MetricsWriter, read_metrics
from moepp_jax.progress import Progress
from moepp_jax.workdir import check_workdir, keep_tokenizer, open_workdir


def train(
    config: Config, workdir: str | Path, report: Callable[[str], None] = print
) -> state_lib.State:
    """Trains until config.train.steps, from the newest checkpoint of the work directory if any.

    Writes config.json, tokenizer.model, metrics.jsonl, TensorBoard events and checkpoints there. A
    run that was stopped and started again ends with the same bits as one that never was.

    Raises:
      ConfigError: the configuration does not fit the devices, the data or the work directory.
      CheckpointError: every checkpoint there is damaged, or they are of another architecture.
      Stopped: SIGINT or SIGTERM asked for it; the run is saved.
    """
    mesh = mesh_lib.make_mesh(config)
    check_workdir(workdir, config)
    dataset = prepare(config, report)
    workdir = open_workdir(workdir, config)
    keep_tokenizer(workdir, dataset.tokenizer)
    with Checkpoints(workdir, config.train.keep) as checkpoints:
        step = checkpoints.latest_intact_step(report)
        if step is None:
            state, step = state_lib.init_state(config, mesh), 0
        else:
            state = checkpoints.restore(step, state_lib.abstract_state(config, mesh))
        report(_headline(config, mesh, step))
        if step >= config.train.steps:
            return state
        with MetricsWriter(workdir, resume_step=step) as writer:
            return _loop(config, mesh, dataset, state, step, workdir, checkpoints, writer, report)


def _loop(config, mesh, dataset: Dataset, state, step, workdir, checkpoints, writer, report):
    t = config.train
    train_step = state_lib.make_train_step(config, mesh)
    evaluate = evaluate_lib.make_evaluate(config, mesh)
    place = mesh_lib.batch_sharding(mesh)
    with Progress(t.steps, step) as progress, StopRequest() as stop:
        log = _Log(config, mesh, writer, progress, _seconds_so_far(workdir), step)
        for batch in dataset.train_batches(step):
            batch = jax.device_put(batch, place)
            with jax.transfer_guard("disallow"):
                state, metrics = train_step(state, batch)
            step += 1
            # The device is busy with this step: now there is time for the one before.
            log.flush()
            last = step == t.steps or stop.signal is not None
            if step % t.log_every == 0 or last:
                log.note(step, metrics)
            held_out = {}
            if step % t.eval_every == 0 or step == t.steps:
                log.flush()
                with log.paused(state):
                    held_out = evaluate(state.params, dataset.eval_batches(t.eval_batches))
                    num_bytes = dataset.eval_bytes(t.eval_batches)
                    held_out["eval_bits_per_byte"] = evaluate_lib.bits_per_byte(held_out, num_bytes)
                    writer.write(step, **held_out)
                    progress.message(_held_out_line(step, held_out))
            if step % t.save_every == 0 or last:
                log.flush()
                with log.paused(state):
                    loss = {k: v for k, v in held_out.items() if k == "eval_loss"}
                    checkpoints.save(step, state, loss)
            if last:
                break
        checkpoints.wait()
    if step < t.steps:
        raise Stopped(stop.signal, step)
    return state


class _Log:
    """Rows of training metrics: noted when their step is started, written when it is done."""

    def __init__(self, config: Config, mesh, writer, progress, seconds: float, step: int):
        self._config = config
        self._mesh = mesh
        self._writer = writer
        self._progress = progress
        self._pending: tuple[int, Any] | None = None
        self._seconds = seconds
        self._step = step
        self._since = time.perf_counter()

    def note(self, step: int, metrics: Any) -> None:
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Writes the row that is pending, waiting for its step to end."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(v) for name, v in jax.device_get(metrics).items()}
        now = time.perf_counter()
        interval, self._since = now - self._since, now
        self._seconds += interval
        tokens = self._config.train.batch_size * self._config.data.seq_len
        rate = (step - self._step) * tokens / interval
        self._step = step
        per_token = flops.per_token(self._config, values["ffn_experts_per_token"])
        device = self._mesh.devices.flat[0].device_kind
        mfu = flops.utilisation(per_token.train * rate, device, self._mesh.size)
        values |= {"tokens": step * tokens, "tokens_per_s": rate, "seconds": self._seconds}
        if mfu is not None:
            values["mfu"] = mfu
        self._writer.write(step, **values)
        self._progress.update(step, **values)

    @contextlib.contextmanager
    def paused(self, state):
        """What happens in this context is not time spent training; getting to this state is."""
        jax.block_until_ready(state)
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start


def _seconds_so_far(workdir: Path) -> float:
    return max((row.get("seconds", 0.0) for row in read_metrics(workdir)), default=0.0)


def _headline(config: Config, mesh, step: int) -> str:
    total, active = flops.parameters(config)
    e = config.moe
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return (
        f"{total / 1e6:,.1f} M parameters, at most {active / 1e6:,.1f} M active a token; "
        f"{e.n_ffn} FFN + {e.n_const} constant + {e.n_copy} copy + {e.n_zero} zero experts, "
        f"top {e.top_k}; mesh {shape} ({mesh.devices.flat[0].device_kind}); "
        f"step {step} of {config.train.steps}"
    )


def _held_out_line(step: int, held_out: dict[str, Any]) -> str:
    return (
        f"step {step}: held-out loss {held_out['eval_loss']:.4f}, "
        f"perplexity {held_out['eval_perplexity']:,.1f}, "
        f"{held_out['eval_bits_per_byte']:.3f} bits a byte, "
        f"{held_out['eval_ffn_experts_per_token']:.2f} FFN experts a token"
    )
