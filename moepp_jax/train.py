"""The training loop: resumes by itself, and writes the numbers of one step while the next runs."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from moepp_jax import debugging, flops, optim, processes, run_data, wandb_log, watch
from moepp_jax import evaluate as evaluate_lib
from moepp_jax import mesh as mesh_lib
from moepp_jax import parent as parent_lib
from moepp_jax import state as state_lib
from moepp_jax.checkpoint import CheckpointError, Checkpoints
from moepp_jax.config import Config
from moepp_jax.data import Dataset, describe, summarise_batch
from moepp_jax.errors import ConfigError
from moepp_jax.guard import require_sound
from moepp_jax.interrupt import Stopped, StopRequest
from moepp_jax.local_copy import LocalCopies
from moepp_jax.log import Log
from moepp_jax.metrics import DivergedError, MetricsWriter, require_finite
from moepp_jax.moe import rules
from moepp_jax.parent import Parent
from moepp_jax.profiling import Profile
from moepp_jax.progress import Progress
from moepp_jax.saving import Saver
from moepp_jax.storage import open_path
from moepp_jax.workdir import alone, check_workdir, holds_run, open_workdir, read_config


def train(
    config: Config,
    workdir: str | os.PathLike,
    report: Callable[[str], None] = print,
    profile: range | None = None,
    parent: Parent | None = None,
    wandb: wandb_log.Wandb | None = None,
    debug: bool = False,
) -> state_lib.State:
    """Trains until config.train.steps, from the newest checkpoint of the work directory if any.

    Or from a newer copy on the hosts' own disks, if config.train.local_dir names a place for some.

    Writes config.json, tokenizer.model, data.json, metrics.jsonl, TensorBoard events and
    checkpoints there. A run that was stopped and started again ends with the same bits as one that
    never was; one that is given more steps than before goes on for so long. Of several processes
    each calls this; the first writes and reports, all write their part of checkpoints.

    Args:
      profile: steps, counted from 0 where this call goes on, whose trace is written too.
      parent: what a new run starts from; one that is there must have been started from it.
      wandb: where the first process sends what is measured, too; also of a run that has ended.
      debug: the run ends at the first step with numbers that are not finite, and the error names
        the operation that made the first of them; it takes the memory of a second state.

    A run that hangs ends the process: see `watch`.

    Raises:
      ConfigError: the configuration does not fit the devices, the data, the work directory or the
        parent, or computes in float16; or another process trains there.
      CheckpointError: every checkpoint there is damaged, or they are of another architecture; or
        the parent's is.
      DataError: a record of the data is damaged; the checkpoints before it are kept.
      DivergedError: a loss or a gradient is not finite, or too many updates in a row were left out
        for that; the same holds. It is noticed where metrics are fetched, every
        config.train.log_every steps, and before a checkpoint is saved.
      Stopped: SIGINT or SIGTERM asked for it; the run is saved.
    """
    processes.require_alike(f"{workdir} {config.to_json()} {parent!r}")
    _require_trainable(config)
    # All have looked before the first process writes anything.
    parent = processes.agree(lambda: parent_lib.of_run(workdir, parent))
    config = parent_lib.with_tokenizer(config, workdir, parent)
    mesh = mesh_lib.make_mesh(config)
    parts = state_lib.assemble(config, mesh)
    first = processes.is_first()
    report = report if first else _in_silence
    may_hold = [parent_lib.FILE] if parent else []
    processes.on_first(lambda: check_workdir(workdir, config, may_hold))
    processes.on_first(lambda: wandb_log.check(workdir, wandb))
    with contextlib.ExitStack() as held:

        @functools.cache
        def hold() -> None:
            held.enter_context(alone(workdir, report))

        # Before checkpoints are opened, which tidies up; a new folder is not there yet.
        processes.on_first(lambda: holds_run(workdir) and hold())
        checkpoints = held.enter_context(Checkpoints(workdir, config.train.keep))
        if parent and not checkpoints.steps():
            parent = parent_lib.located(parent, config, workdir)
        dataset = _open_data(config, workdir, parent, report)
        copies = LocalCopies(parts, workdir)
        state, step = _beginning(parts, checkpoints, copies, parent, report)
        processes.on_first(lambda: _make(config, workdir, dataset, parent, step, report))
        processes.on_first(hold)
        report(describe(dataset, config.train.steps))
        report(f"{_headline(config, mesh, step)}; {_next(config, workdir, step)}")
        if step >= config.train.steps:
            copies.close()
            if first and wandb:
                wandb_log.send(wandb, workdir, report)
            return state
        copies.begin()
        with contextlib.ExitStack() as stack:
            tracer = stack.enter_context(Profile(workdir, profile, config.train.steps - step))
            saver = Saver(checkpoints, config.train.on_save_error, report)
            writer = progress = None
            if first:
                writer = stack.enter_context(_writer(config, workdir, step, report))
                stack.enter_context(wandb_log.following(wandb, workdir, writer.staging, report))
            # Left before what is sent last: a signal may then end the wait, all is saved.
            stop = stack.enter_context(StopRequest())
            if first:
                progress = stack.enter_context(Progress(config.train.steps, step))
            watched = stack.enter_context(watch.over(config.train, step, debug))
            unsound = int(state.guard.unsound)
            log = Log(config, mesh, dataset, writer, progress, watched, step, unsound)
            try:
                train_step = (debugging.explained if debug else state_lib.make_train_step)(parts)
                state, step = _loop(
                    parts,
                    train_step,
                    dataset,
                    state,
                    step,
                    _Beside(saver, copies, log, tracer, stop, watched),
                )
            except DivergedError as error:
                with watched.phase("save"):
                    checkpoints.wait()  # in all processes: each has seen the same numbers
                raise _diverged(error, dataset, checkpoints.latest_step()) from None
    if step < config.train.steps:
        raise Stopped(stop.signal, step)
    return state


def _require_trainable(config: Config) -> None:
    if config.model.dtype == "float16":
        raise ConfigError(
            "config.model.dtype = 'float16' is for evaluation and generation: its small gradients "
            "become 0; train in bfloat16 or float32 (convert takes --dtype)"
        )


def _open_data(config: Config, workdir: str | os.PathLike, parent, report) -> Dataset:
    """The data, which the first process prepares; of a run that is there, what it began with."""
    config = parent_lib.to_prepare(config, workdir, parent)

    def prepared() -> Dataset:
        dataset = run_data.prepare_data(config, workdir, report)
        dataset.require_rows()
        if holds_run(workdir):
            run_data.keep(open_path(workdir), dataset)
        return dataset

    made = processes.on_first(prepared)
    return processes.agree(lambda: made or run_data.open_data(config, workdir))


def _beginning(parts, checkpoints, copies, parent, report) -> tuple[state_lib.State, int]:
    """The state that the run goes on from or starts in, and its step."""
    damaged = step = None
    try:
        step = checkpoints.latest_intact_step(report)
    except CheckpointError as error:
        damaged = error
    found = copies.newest(step, report)
    if found:
        return found
    if damaged:
        raise damaged
    if step is None and parent is None:
        return state_lib.init_state(parts), 0
    if step is None:
        report(f"starting from {parent}, with {'its' if parent.optimizer else 'a new'} optimizer")
        return parent_lib.state(parent, parts), 0
    if checkpoints.has_only_params(step):
        params = checkpoints.restore_params(step, parts.abstract.params)
        return state_lib.state_of(params, parts), step
    state = checkpoints.restore(step, parts.abstract, optional=state_lib.LATER)
    return state_lib.completed(state, parts), step


def _make(config: Config, workdir: str | os.PathLike, dataset: Dataset, parent, step, report):
    """The run's folder with what is written there once, when all that it needs is there."""
    before = read_config(workdir) if holds_run(workdir) else config
    of_parent = parent_lib.files(parent) if parent else {}
    open_workdir(workdir, config, of_parent | run_data.files(dataset))
    if before.train.steps < config.train.steps:
        report(optim.change(before, config, step))


def _writer(config: Config, workdir: str | os.PathLike, step: int, report) -> MetricsWriter:
    t = config.train
    # Two intervals: the save after the first may not have been whole yet when the run ended.
    reach = step + 2 * t.save_every
    return MetricsWriter(workdir, step, report, t.on_save_error == "continue", reach)


def _in_silence(line: str) -> None:
    """What another process reports already."""


class _Beside(NamedTuple):
    """What is looked after between the steps."""

    saver: Saver
    copies: LocalCopies
    log: Log
    tracer: Profile
    stop: StopRequest
    watched: watch.Watch


def _loop(parts, train_step, dataset: Dataset, state, step, beside: _Beside):
    saver, copies, log, tracer, stop, watched = beside
    t = parts.config.train
    evaluate = evaluate_lib.make_evaluate(parts)
    evaluate = functools.partial(evaluate, through=watched.waited_for)
    rows = processes.Rows(mesh_lib.batch_sharding(parts.mesh), t.batch_size)
    with log.paused(state), watched.phase("evaluation"):
        _try_evaluation(evaluate, state.params, dataset, rows.indices)
    batches = itertools.islice(dataset.train_batches(step, rows.indices), t.steps - step)
    for batch in watched.waited_for(log.waited_for(_one_ahead(map(rows.place, batches)))):
        tracer.before_step()
        with jax.transfer_guard("disallow"):
            state, metrics = train_step(state, batch)
        tracer.after_step(state)
        step += 1
        watched.began(step, metrics["loss"])
        # The device is busy with this step: now there is time for the one before.
        log.flush()
        last = stop.after(step) or step == t.steps
        if step % t.log_every == 0 or last:
            log.note(step, metrics)
        held_out = {}
        if step % t.eval_every == 0 or step == t.steps:
            log.flush()
            with log.paused(state), watched.phase("evaluation"):
                held_out = evaluate_lib.evaluate_mixture(
                    evaluate, state.params, dataset, t.eval_batches, rows.indices
                )
                log.held_out(step, held_out)
                require_finite(step, held_out)
        saved, copied = step % t.save_every == 0 or last, copies.is_due(step) and not last
        if saved or copied:
            log.flush()
            with log.paused(state), watched.phase("save"):
                values = jax.device_get(metrics)
                require_sound(t, step, values, values["guard"])
                kept = saver.keeps(log.keep, last)
                if copied and kept:
                    copies.save(step, state)
                if saved and kept:
                    loss = {k: v for k, v in held_out.items() if k == "eval_loss"}
                    saver.save(step, state, loss, last)
        if last:
            break
    copies.close()
    return state, step


def _try_evaluation(evaluate, params, dataset: Dataset, rows: np.ndarray) -> None:
    """What would not compile, not fit or not be read there is found before anything is trained."""
    try:
        evaluate_lib.evaluate_mixture(evaluate, params, dataset, 1, rows)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):  # is told elsewhere, with what helps
            raise
        why = str(error).strip().splitlines()[0]
        raise ConfigError(f"evaluation does not run on these devices: {why}") from error


def _one_ahead(batches: Iterator) -> Iterator:
    """Each batch when the next one is on its way to the devices too: transfers overlap steps."""
    batch = next(batches)
    for following in batches:
        yield batch
        batch = following
    yield batch


def _headline(config: Config, mesh, step: int) -> str:
    total, active = flops.parameters(config)
    e = config.moe
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return (
        f"{_count(total)} parameters, at most {_count(active)} active a token; "
        f"{e.n_ffn} FFN + {e.n_const} constant + {e.n_copy} copy + {e.n_zero} zero experts, "
        f"{_rule(config)}; mesh {shape} ({mesh.devices.flat[0].device_kind}); "
        f"step {step} of {config.train.steps}"
    )


def _next(config: Config, workdir: str | os.PathLike, step: int) -> str:
    if step < config.train.steps:
        return "compiling evaluation and the step first, which takes seconds to minutes"
    return (
        f"nothing is left to train: to go on, --config=run:{workdir} --config.train.steps=N "
        f"--workdir={workdir} with more steps"
    )


def _count(number: int) -> str:
    unit, name = next(u for u in ((1e9, "B"), (1e6, "M"), (1e3, "K"), (1, "")) if number >= u[0])
    return f"{number / unit:,.1f} {name}" if name else str(number)


def _rule(config: Config) -> str:
    rule = config.moe.rule
    kind = rules.fields_of(rule)["type"]
    return f"{kind}, at most {rule.most} and at balance {sum(rule.load):.2f} a token"


def _diverged(error: DivergedError, dataset: Dataset, newest: int | None) -> DivergedError:
    kept = "there is no checkpoint yet" if newest is None else f"checkpoint {newest} is the newest"
    batch = f"; {summarise_batch(dataset, error.began)}" if error.began else ""
    return DivergedError(
        f"{error}: the run has diverged and was stopped; {kept}{batch}. The same command would "
        "compute the same again: --config.train.on_nonfinite=skip goes on without such updates; or "
        "give another --workdir, and a lower config.optim.lr, a longer config.optim.warmup_steps "
        "or a lower config.optim.clip_norm",
        error.began,
    )
