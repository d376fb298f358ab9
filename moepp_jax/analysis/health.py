"""Whether a router still uses its experts: numbers by layer, and a warning when it stops."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence

import numpy as np

# Of its share at balance, below which an expert is dead.
DEAD = 0.01
# Of a layer's FFN choices, above which one expert has taken them over, where there are several.
COLLAPSED = 0.9
# Rows of metrics one after the other in which an expert is dead before anybody is told.
_PATIENCE = 3
# Rows of metrics whose losses say what is usual, and how many of them it takes.
_USUAL, _ENOUGH = 50, 10
# A loss is a spike so many times their spread (as standard deviations) above their median, and by
# so many nats.
_SPREADS, _NATS = 6.0, 0.2


def by_layer(load_JN: np.ndarray, n_ffn: int, balance: Sequence[float]) -> dict[str, np.ndarray]:
    """Numbers of each layer.

    Args:
      load_JN: share of the tokens that choose each expert, drops included.
      balance: the same at balance (`Rule.load`).

    Returns:
      load_largest_by_layer and load_smallest_by_layer, the FFN experts' largest and smallest load
      over their mean (0 where no token chooses one), and dead_experts_by_layer, of all kinds.
    """
    ffn = load_JN[:, :n_ffn]
    mean = ffn.mean(axis=1)
    over = ffn / np.where(mean > 0, mean, 1.0)[:, None]
    return {
        "load_largest_by_layer": over.max(axis=1),
        "load_smallest_by_layer": over.min(axis=1),
        "dead_experts_by_layer": np.sum(dead(load_JN, balance), axis=1),
    }


def dead(load_JN: np.ndarray, balance: Sequence[float]) -> np.ndarray:
    """Which experts have next to nothing of what they would have at balance."""
    return load_JN < DEAD * np.asarray(balance)


class Watch:
    """Tells once of a layer that collapses, and once of an expert that dies."""

    def __init__(self, n_ffn: int, balance: Sequence[float]):
        self._n_ffn, self._balance = n_ffn, balance
        self._rows = 0  # in which the same experts were dead
        self._dead: np.ndarray | None = None
        self._lived: np.ndarray | None = None  # at some time since this command began
        self._told: set[str] = set()

    def look(self, load_JN: np.ndarray) -> list[str]:
        """What there is to tell of a row of metrics that was not told before."""
        said = {"collapsed": self._collapsed(load_JN), "dead": self._died(load_JN)}
        new = {what: line for what, line in said.items() if line and what not in self._told}
        self._told |= set(new)
        return list(new.values())

    def _collapsed(self, load_JN: np.ndarray) -> str:
        ffn = load_JN[:, : self._n_ffn]
        share = ffn.max(axis=1) / np.maximum(ffn.sum(axis=1), np.finfo(np.float32).tiny)
        worst = int(share.argmax())
        if self._n_ffn < 2 or share[worst] <= COLLAPSED:
            return ""
        return (
            f"MoE layer {worst + 1} has collapsed: FFN expert {ffn[worst].argmax()} has "
            f"{share[worst]:.0%} of its FFN choices; a larger balance weight keeps them apart"
        )

    def _died(self, load_JN: np.ndarray) -> str:
        now = dead(load_JN, self._balance)
        self._lived = ~now if self._lived is None else self._lived | ~now
        both = now if self._dead is None else now & self._dead
        self._rows = self._rows + 1 if both.any() else int(now.any())
        self._dead = both if both.any() else now
        if self._rows < _PATIENCE or not both.any():
            return ""
        layers = np.flatnonzero(both.any(axis=1))
        first = layers[0]
        which = ", ".join(map(str, np.flatnonzero(both[first])))
        more = f", and {len(layers) - 1} more layers have dead ones" if len(layers) > 1 else ""
        # An upcycled model begins with zero-computation experts that no token chooses.
        when = "any more" if self._lived[both].any() else "yet"
        return (
            f"MoE layer {first + 1}: no token chooses expert {which} {when} (less than "
            f"{DEAD:.0%} of its share at balance){more}"
        )


class Spikes:
    """Tells of each rise of the loss far above what it was, once until it is back."""

    def __init__(self):
        self._losses = collections.deque(maxlen=_USUAL)
        self._up = False

    def look(self, loss: float) -> list[str]:
        """What there is to tell of a row of metrics."""
        if not math.isfinite(loss):
            return []
        usual = np.array(self._losses) if self._losses else np.array([loss])
        median = float(np.median(usual))
        spread = 1.4826 * float(np.median(np.abs(usual - median)))
        high = len(usual) >= _ENOUGH and loss > median + max(_SPREADS * spread, _NATS)
        began, self._up = high and not self._up, high
        self._losses.append(loss)
        if not began:
            return []
        return [
            f"the loss spikes: {loss:.4f}, where the median of {len(usual)} rows is {median:.4f}"
        ]
