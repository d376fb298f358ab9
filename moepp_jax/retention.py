"""Which checkpoints of a run are kept: the newest ones, and the best on held-out text."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass
class NewestAndBest:
    """Orbax's preservation policy; here, as orbax's own trips over a damaged file of metrics."""

    keep: int
    losses: dict[int, float] = dataclasses.field(default_factory=dict)
    damaged: set[int] = dataclasses.field(default_factory=set)
    stuck: set[int] = dataclasses.field(default_factory=set)  # cannot be removed

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        self.damaged.discard(step)
        self.losses.pop(step, None)
        loss = metrics.get("eval_loss", math.nan)
        if math.isfinite(loss):
            self.losses[step] = loss

    def best(self, steps: Sequence[int]) -> int | None:
        known = [step for step in steps if step in self.losses and step not in self.damaged]
        return min(known, key=self.losses.__getitem__, default=None)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        superfluous = self.superfluous(steps) - self.stuck
        return [step not in superfluous for step in steps]

    def superfluous(self, steps: Sequence[int]) -> set[int]:
        """Those that are to go; `stuck` ones among them."""
        kept = sorted(set(steps) - self.damaged - self.stuck)
        return set(steps) - {*kept[-self.keep :], self.best(kept)}
