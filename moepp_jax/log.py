"""What a training run tells of itself, without holding it up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from moepp_jax import flops
from moepp_jax import guard as guard_lib
from moepp_jax.analysis import health
from moepp_jax.config import Config
from moepp_jax.data import Dataset, summarise_batch
from moepp_jax.metrics import MetricsWriter
from moepp_jax.progress import Progress
from moepp_jax.watch import Watch


class Log:
    """Rows of metrics: training's noted when their step is started, written when it is done.

    Args:
      writer: None, like progress, in a process that is not the first: it only keeps pace.
      watch: is told of what is not waiting for devices, and tells how the hosts compare.
      skipped: updates that were left out before.
    """

    def __init__(
        self,
        config: Config,
        mesh,
        dataset: Dataset,
        writer: MetricsWriter | None,
        progress: Progress | None,
        watch: Watch,
        step: int,
        skipped: int = 0,
    ):
        self._config = config
        self._mesh = mesh
        self._dataset = dataset
        self._writer = writer
        self._progress = progress
        self._watch = watch
        self._pending: tuple[int, Any] | None = None
        self._seconds = writer.seconds_so_far if writer else 0.0
        self._step = step
        self._since = time.perf_counter()
        self._waited = 0.0
        self._warned = False
        rule = config.moe.rule
        self._health = health.Watch(rule.pool.n_ffn, rule.load)
        self._spikes = health.Spikes()
        self._skipped = skipped

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
        """Writes the row that is pending, waiting for its step to end.

        Raises:
          DivergedError: see `guard.require_sound`.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = dict(jax.device_get(metrics))
        guard = values.pop("guard")
        values = {name: np.asarray(v).tolist() for name, v in values.items()}
        with self._watch.phase("log"):
            self._write(step, values, guard)
        guard_lib.require_sound(self._config.train, step, values, guard)

    def _write(self, step: int, values: dict[str, Any], guard: guard_lib.Guard) -> None:
        if self._writer is None:
            return
        now = time.perf_counter()
        interval, self._since = now - self._since, now
        data_wait, self._waited = self._waited / interval, 0.0
        self._seconds += interval
        tokens = self._config.batch_tokens
        rate = (step - self._step) * tokens / interval
        self._step = step
        per_token = flops.per_token(self._config, values["ffn_experts_per_token"])
        device = self._mesh.devices.flat[0].device_kind
        mfu = flops.utilisation(per_token.train * rate, device, self._mesh.size)
        values |= {"tokens": step * tokens, "tokens_per_s": rate, "seconds": self._seconds}
        values |= {"data_wait": data_wait} | self._watch.hosts.row()
        for name, taken in self._dataset.taken(step).items():
            values |= {f"tokens/{name}": taken.tokens, f"epochs/{name}": taken.epochs}
        if mfu is not None:
            values["mfu"] = mfu
        if self._config.train.on_nonfinite == "skip":
            values["skipped"] = int(guard.unsound)
        rule, load = self._config.moe.rule, np.asarray(values.pop("load"))
        values |= health.by_layer(load, rule.pool.n_ffn, rule.load)
        self._writer.write(step, **values)
        self._progress.update(step, **values)
        said = _starving(values["drop_rate"], values.get("drop_rate_by_part", []))
        if said and not self._warned:
            self._progress.message(f"step {step}: {said}")
            self._warned = True
        for said in (*self._health.look(load), *self._spikes.look(values["loss"])):
            self._progress.message(f"step {step}: {said}")
        if self._config.train.on_nonfinite == "skip":
            self._tell_of_skipped(step, guard)

    def _tell_of_skipped(self, step: int, guard: guard_lib.Guard) -> None:
        new, self._skipped = int(guard.unsound) - self._skipped, int(guard.unsound)
        if new > 0:
            updates = "1 update was" if new == 1 else f"{new} updates were"
            self._progress.message(
                f"step {step}: {updates} left out, {guard_lib.place(guard)}; "
                f"{summarise_batch(self._dataset, int(guard.first))}"
            )

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


def _starving(mean: float, by_part: list[float]) -> str | None:
    """What to say when a part of the sequences loses much more of its choices than the others."""
    worst = max(by_part, default=0.0)
    if worst < max(0.05, 2.5 * mean):
        return None
    part = by_part.index(worst) + 1
    return (
        f"part {part} of {len(by_part)} of the sequences loses {worst:.0%} of its experts, and the "
        f"mean is {mean:.0%}: raise config.moe.group_size or config.moe.gamma, or train dropless"
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
