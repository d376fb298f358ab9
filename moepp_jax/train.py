"""The training loop: resumes by itself, and writes the numbers of one step while the next runs."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from moepp_jax import evaluate as evaluate_lib
from moepp_jax import flops, processes
from moepp_jax import mesh as mesh_lib
from moepp_jax import state as state_lib
from moepp_jax.checkpoint import Checkpoints
from moepp_jax.config import Config
from moepp_jax.data import Dataset, describe, open_dataset, prepare
from moepp_jax.interrupt import Stopped, StopRequest
from moepp_jax.metrics import MetricsWriter
from moepp_jax.profiling import Profile
from moepp_jax.progress import Progress
from moepp_jax.workdir import check_workdir, keep_tokenizer, open_workdir


def train(
    config: Config,
    workdir: str | os.PathLike,
    report: Callable[[str], None] = print,
    profile: range | None = None,
) -> state_lib.State:
    """Trains until config.train.steps, from the newest checkpoint of the work directory if any.

    Writes config.json, tokenizer.model, metrics.jsonl, TensorBoard events and checkpoints there. A
    run that was stopped and started again ends with the same bits as one that never was. Of several
    processes each calls this; the first writes and reports, all write their part of checkpoints.

    Args:
      profile: steps, counted from 0 where this call goes on, whose trace is written too.

    Raises:
      ConfigError: the configuration does not fit the devices, the data or the work directory.
      CheckpointError: every checkpoint there is damaged, or they are of another architecture.
      DataError: a record of the data is damaged; the checkpoints before it are kept.
      Stopped: SIGINT or SIGTERM asked for it; the run is saved.
    """
    processes.require_alike(f"{workdir} {config.to_json()}")
    mesh = mesh_lib.make_mesh(config)
    first = processes.is_first()
    report = report if first else _in_silence
    made = processes.on_first(lambda: _make(config, workdir, report))
    dataset = processes.agree(lambda: made or open_dataset(config))
    with Checkpoints(workdir, config.train.keep) as checkpoints:
        step = checkpoints.latest_intact_step(report)
        if step is None:
            state, step = state_lib.init_state(config, mesh), 0
        elif checkpoints.has_only_params(step):
            abstract = state_lib.abstract_state(config, mesh).params
            state = state_lib.state_of(checkpoints.restore_params(step, abstract), config, mesh)
        else:
            state = checkpoints.restore(step, state_lib.abstract_state(config, mesh))
        report(describe(dataset, config.train.steps))
        report(_headline(config, mesh, step))
        if step >= config.train.steps:
            return state
        with contextlib.ExitStack() as stack:
            tracer = stack.enter_context(Profile(workdir, profile, config.train.steps - step))
            stop = stack.enter_context(StopRequest())
            writer = progress = None
            if first:
                writer = stack.enter_context(MetricsWriter(workdir, resume_step=step))
                progress = stack.enter_context(Progress(config.train.steps, step))
            log = _Log(config, mesh, dataset, writer, progress, step)
            state, step = _loop(config, mesh, dataset, state, step, checkpoints, log, tracer, stop)
    if step < config.train.steps:
        raise Stopped(stop.signal, step)
    return state


def _make(config: Config, workdir: str | os.PathLike, report) -> Dataset:
    """Data and the run's folder with what is written there once; nothing if one cannot be."""
    check_workdir(workdir, config)
    dataset = prepare(config, report)
    dataset.require_rows()
    keep_tokenizer(open_workdir(workdir, config), dataset.tokenizer)
    return dataset


def _in_silence(line: str) -> None:
    """What another process reports already."""


def _loop(config, mesh, dataset: Dataset, state, step, checkpoints, log, tracer, stop):
    t = config.train
    train_step = state_lib.make_train_step(config, mesh)
    evaluate = evaluate_lib.make_evaluate(config, mesh)
    rows = processes.Rows(mesh_lib.batch_sharding(mesh), t.batch_size)
    batches = itertools.islice(dataset.train_batches(step, rows.indices), t.steps - step)
    for batch in log.waited_for(_one_ahead(map(rows.place, batches))):
        tracer.before_step()
        with jax.transfer_guard("disallow"):
            state, metrics = train_step(state, batch)
        tracer.after_step(state)
        step += 1
        # The device is busy with this step: now there is time for the one before.
        log.flush()
        last = stop.after(step) or step == t.steps
        if step % t.log_every == 0 or last:
            log.note(step, metrics)
        held_out = {}
        if step % t.eval_every == 0 or step == t.steps:
            log.flush()
            with log.paused(state):
                held_out = evaluate_lib.evaluate_mixture(
                    evaluate, state.params, dataset, t.eval_batches, rows.indices
                )
                log.held_out(step, held_out)
        if step % t.save_every == 0 or last:
            log.flush()
            with log.paused(state):
                log.keep()
                loss = {k: v for k, v in held_out.items() if k == "eval_loss"}
                checkpoints.save(step, state, loss)
        if last:
            break
    checkpoints.wait()
    return state, step


def _one_ahead(batches: Iterator) -> Iterator:
    """Each batch when the next one is on its way to the devices too: transfers overlap steps."""
    batch = next(batches)
    for following in batches:
        yield batch
        batch = following
    yield batch


class _Log:
    """Rows of metrics: training's noted when their step is started, written when it is done.

    Args:
      writer: None, like progress, in a process that is not the first: it only keeps pace.
    """

    def __init__(
        self,
        config: Config,
        mesh,
        dataset: Dataset,
        writer: MetricsWriter | None,
        progress: Progress | None,
        step: int,
    ):
        self._config = config
        self._mesh = mesh
        self._dataset = dataset
        self._writer = writer
        self._progress = progress
        self._pending: tuple[int, Any] | None = None
        self._seconds = writer.seconds_so_far if writer else 0.0
        self._step = step
        self._since = time.perf_counter()
        self._waited = 0.0

    def waited_for(self, batches: Iterator) -> Iterator:
        """The batches; the time that each takes to come is noted as waiting for data."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def note(self, step: int, metrics: Any) -> None:
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Writes the row that is pending, waiting for its step to end."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(v) for name, v in jax.device_get(metrics).items()}
        if self._writer is None:
            return
        now = time.perf_counter()
        interval, self._since = now - self._since, now
        data_wait, self._waited = self._waited / interval, 0.0
        self._seconds += interval
        tokens = self._config.train.batch_size * self._config.data.seq_len
        rate = (step - self._step) * tokens / interval
        self._step = step
        per_token = flops.per_token(self._config, values["ffn_experts_per_token"])
        device = self._mesh.devices.flat[0].device_kind
        mfu = flops.utilisation(per_token.train * rate, device, self._mesh.size)
        values |= {"tokens": step * tokens, "tokens_per_s": rate, "seconds": self._seconds}
        values["data_wait"] = data_wait
        for name, taken in self._dataset.taken(step).items():
            values |= {f"tokens/{name}": taken.tokens, f"epochs/{name}": taken.epochs}
        if mfu is not None:
            values["mfu"] = mfu
        self._writer.write(step, **values)
        self._progress.update(step, **values)

    def held_out(self, step: int, values: dict[str, Any]) -> None:
        """Writes the row of an evaluation."""
        if self._writer is not None:
            self._writer.write(step, **values)
            self._progress.message(_held_out_line(step, values))

    def keep(self) -> None:
        """Sees to it that no checkpoint outlives the rows before it."""
        if self._writer is not None:
            self._writer.flush()

    @contextlib.contextmanager
    def paused(self, state):
        """What happens in this context is not time spent training; getting to this state is."""
        jax.block_until_ready(state)
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start


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
    each = {k: v for k, v in held_out.items() if k.startswith("eval_loss/")}
    by_source = ", ".join(f"{name.partition('/')[2]} {loss:.4f}" for name, loss in each.items())
    return (
        f"step {step}: held-out loss {held_out['eval_loss']:.4f}"
        f"{f' ({by_source})' if by_source else ''}, "
        f"perplexity {held_out['eval_perplexity']:,.1f}, "
        f"{held_out['eval_bits_per_byte']:.3f} bits a byte, "
        f"{held_out['eval_ffn_experts_per_token']:.2f} FFN experts a token"
    )
