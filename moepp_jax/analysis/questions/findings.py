"""Do the paper's findings about routing hold here?

Each as a number with its 95 % interval: the value and 1.96 standard errors, of 400 samples of
documents drawn with replacement from every source (long documents in stretches of 1,024 tokens,
neighbours together where there are more than 2,000). A finding holds if all of its interval is
above zero (any difference: if zero is outside), does not hold if all of it is below, and else
cannot be told. The distance between two loads is the total variation of the experts' shares of the
assignments, the mean of the layers; how much sources differ in a layer is less what it is if the
documents are shuffled between the sources, and the last line's error is from such shuffles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from moepp_jax.analysis import drawing, means, sums
from moepp_jax.analysis.question import Question, Table, beside, labels
from moepp_jax.analysis.questions.load import task_of
from moepp_jax.analysis.record import Record
from moepp_jax.analysis.sums import Sums

_DRAWS = 400
_SHUFFLES = 60
_NAMES = (
    "adjacent layers' FFN experts of a token correlate",
    "more than distant layers' do",
    "the same over sources: adjacent above distant",
    "sources differ more in shallow layers than in middle ones",
    "and more in the last layer",
    "a hard source's FFN experts differ from an easy one's",
    "HellaSwag gets more than SciQ, in the middle layer",
    "the zero expert serves more than any other one",
    "sources differ more than halves of one do",
)
# Weights [R B] of the blocks -> [R] numbers.
Statistic = Callable[[np.ndarray], np.ndarray]
HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be told"


class Finding(NamedTuple):
    """
    Attributes:
      why: it cannot be told, or what is compared.
    """

    value: float
    error: float
    verdict: str
    why: str = ""


class Findings(Question):
    place = 1

    def of(self, record: Record) -> dict[str, Finding]:
        of = sums.of(record)
        if not of.sources:
            return dict.fromkeys(_NAMES, _unknown(f"no source has {sums.FEWEST} documents"))
        weights = means.draws(of.source, _DRAWS)
        found = (
            _adjacent(of, weights),
            _distant(of, weights),
            _by_source(of, weights),
            _deep(of, weights, shallow=True),
            _deep(of, weights, shallow=False),
            _hard(record, of, weights),
            _tasks(record, of, weights),
            _zero(record, of, weights),
            _topics(of),
        )
        return dict(zip(_NAMES, found, strict=True))

    def said(self, records: Sequence[Record]) -> list[str]:
        """Which sources have no part in it."""
        there = sums.of(records[0]).sources
        out = [name for s, name in enumerate(records[0].meta.sources) if s not in there]
        few = f"Left out, having fewer than {sums.FEWEST} documents: {', '.join(out)}."
        return [few] if out else []

    def tables(self, records: Sequence[Record]) -> dict[str, Table]:
        each = [
            {(name,): (f.value, *_interval(f), f.verdict, f.why) for name, f in found.items()}
            for found in self.found(records)
        ]
        columns = ("value", "low", "high", "verdict", "of")
        return {self.name: beside(records, ("finding",), columns, each)}

    def figure(self, records: Sequence[Record]) -> Figure:
        found = self.found(records)
        names = list(found[0])
        figure = drawing.new(9, 1 + 0.42 * len(names))
        axes = figure.subplots()
        axes.axvline(0, color=drawing.GREY, lw=1)
        for number, (of, color) in enumerate(zip(found, drawing.RUN_COLORS, strict=False)):
            for at, name in enumerate(names):
                y = at + 0.22 * (number - (len(found) - 1) / 2)
                value, (low, high), scale = of[name].value, _interval(of[name]), _scale(found, name)
                if math.isfinite(value):
                    axes.plot([low / scale, high / scale], [y, y], color=color, lw=2)
                    axes.plot(value / scale, y, "o", color=color, ms=6)
                if len(found) == 1:
                    said = of[name].verdict
                    axes.text(1.02, y, said, transform=axes.get_yaxis_transform(), va="center")
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(-1.1, 1.1)
        axes.set_xticks([-1, 0, 1], ["below zero", "0", "above zero"])
        axes.set_xlabel("value with its interval, each line in a unit of its own")
        drawing.tidy(axes, "x")
        drawing.runs_legend(figure, labels(records))
        return figure


def _interval(finding: Finding) -> tuple[float, float]:
    half = means.Z * finding.error
    return finding.value - half, finding.value + half


def _scale(found: Sequence[dict[str, Finding]], name: str) -> float:
    """The farthest end of all intervals from zero."""
    ends = [abs(end) for of in found for end in _interval(of[name]) if math.isfinite(end)]
    return max(ends, default=1.0) or 1.0


def _judged(
    statistic: Statistic,
    weights: np.ndarray,
    why: str = "",
    either: bool = False,
) -> Finding:
    """The finding of a number, by its interval.

    Args:
      either: it holds on either side of zero.
    """
    value = float(statistic(np.ones((1, weights.shape[1])))[0])
    spread = statistic(weights)
    spread = spread[np.isfinite(spread)]
    if not math.isfinite(value) or len(spread) < 2:
        return Finding(math.nan, math.nan, UNKNOWN, why or "it has no value here")
    return _verdict(Finding(value, float(spread.std(ddof=1)), UNKNOWN, why), either)


def _verdict(finding: Finding, either: bool = False) -> Finding:
    low, high = _interval(finding)
    if finding.error and (low > 0 or (either and high < 0)):
        return finding._replace(verdict=HOLDS)
    if finding.error and high < 0:
        return finding._replace(verdict=FAILS)
    return finding


def _unknown(why: str) -> Finding:
    return Finding(math.nan, math.nan, UNKNOWN, why)


def _pairs(J: int, far: bool) -> np.ndarray:
    """[J J] whether two layers are neighbours, or at least half of all layers apart."""
    apart = np.arange(J)[None, :] - np.arange(J)[:, None]
    return apart >= max(2, J // 2) if far else apart == 1


def _mean_of(values: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """[R J J] -> [R], a layer where nothing varies aside."""
    chosen = values[:, pairs]
    there = np.isfinite(chosen)
    with np.errstate(invalid="ignore"):
        return np.where(there, chosen, 0).sum(axis=1) / there.sum(axis=1)


def _near_far(correlations: np.ndarray) -> np.ndarray:
    J = correlations.shape[-1]
    near, far = (_mean_of(correlations, _pairs(J, far)) for far in (False, True))
    return near - far


def _adjacent(of: Sums, weights: np.ndarray) -> Finding:
    if of.num_layers < 2:
        return _unknown("there is one MoE layer")
    near = _pairs(of.num_layers, False)
    return _judged(lambda w: _mean_of(sums.correlations(of, w), near), weights)


def _distant(of: Sums, weights: np.ndarray) -> Finding:
    if of.num_layers < 3:
        return _unknown("there are fewer than three MoE layers")
    why = f"layers at least {max(2, of.num_layers // 2)} apart are distant"
    return _judged(lambda w: _near_far(sums.correlations(of, w)), weights, why)


def _by_source(of: Sums, weights: np.ndarray) -> Finding:
    if len(of.sources) < 3 or of.num_layers < 3:
        return _unknown("it needs three sources and three MoE layers")
    why = f"{len(of.sources)} sources"
    return _judged(lambda w: _near_far(sums.correlations_of_sources(of, w)), weights, why)


def _deep(of: Sums, weights: np.ndarray, shallow: bool) -> Finding:
    """How far sources are from their mean, in the shallow or the last layers less in the middle.

    Less what it is by chance: layers differ in that too.
    """
    J, first = of.num_layers, math.ceil(of.num_layers / 4)
    if len(of.sources) < 2 or J < 3:
        return _unknown("it needs two sources and three MoE layers")

    def statistic(of: Sums, w: np.ndarray) -> np.ndarray:
        spread = sums.spread(of, w)
        ours = spread[:, :first] if shallow else spread[:, -1:]
        return ours.mean(axis=1) - spread[:, first:-1].mean(axis=1)

    rng, once = np.random.default_rng(1), np.ones((1, len(of.source)))
    mixed = (of._replace(source=rng.permutation(of.source)) for _ in range(_SHUFFLES))
    chance = np.mean([statistic(one, once) for one in mixed])
    ours = f"the first {first} of {J} layers" if shallow else "the last layer"
    return _judged(lambda w: statistic(of, w) - chance, weights, f"{ours} less those between")


def _difference(of: Sums, a: int, b: int, values: np.ndarray) -> Statistic:
    """Source a's FFN experts per token less source b's; `values` [B] are sums."""

    def mean(w: np.ndarray, source: int) -> np.ndarray:
        mine = of.source == source
        return (w[:, mine] @ values[mine]) / (w[:, mine] @ of.tokens[mine])

    return lambda w: mean(w, a) - mean(w, b)


def _hard(record: Record, of: Sums, weights: np.ndarray) -> Finding:
    known = np.isfinite(record.rows.loss)
    source, names = record.rows.source[known], list(record.meta.sources)
    count = np.bincount(source, minlength=len(names))
    total = np.bincount(source, record.rows.loss[known], len(names))
    loss = {s: total[s] / count[s] for s in of.sources if count[s]}
    if len(loss) < 2:
        return _unknown("it needs two sources")
    easy, hard = min(loss, key=loss.__getitem__), max(loss, key=loss.__getitem__)
    if easy == hard:
        return _unknown("all sources have one loss")
    statistic = _difference(of, hard, easy, of.ffn.mean(axis=1))
    why = f"{names[hard]} (loss {loss[hard]:.2f}) less {names[easy]} ({loss[easy]:.2f})"
    return _judged(statistic, weights, why, either=True)


def _tasks(record: Record, of: Sums, weights: np.ndarray) -> Finding:
    tasks = {task_of(name): s for s, name in enumerate(record.meta.sources)}
    hard, easy = tasks.get("hellaswag", -1), tasks.get("sciq", -1)
    if not {hard, easy} <= set(of.sources):
        return _unknown("the two tasks are not in the text")
    middle = math.ceil(record.num_layers / 2) - 1
    statistic = _difference(of, hard, easy, of.ffn[:, middle])
    return _judged(statistic, weights, "0.104 in the paper")


def _zero(record: Record, of: Sums, weights: np.ndarray) -> Finding:
    starts = record.meta.starts
    zeros = slice(starts[3], starts[4])
    if not record.meta.counts[3] or record.meta.num_experts == record.meta.counts[3]:
        return _unknown("the pool has no zero expert, or nothing else")
    load = of.load.mean(axis=1)  # over layers

    def statistic(w: np.ndarray) -> np.ndarray:
        share = (w @ load) / (w @ of.tokens)[:, None]
        return share[:, zeros].max(axis=1) - np.delete(share, zeros, axis=1).max(axis=1)

    return _judged(statistic, weights, "its share of the tokens, less the highest of the others")


def _topics(of: Sums) -> Finding:
    if len(of.sources) < 2:
        return _unknown("it needs two sources")
    rng = np.random.default_rng(1)
    between, within = sums.halves(of.load, of.source, rng)
    pairs = [sums.halves(of.load, rng.permutation(of.source), rng) for _ in range(_SHUFFLES)]
    error = float(np.std([b - w for b, w in pairs], ddof=1))
    why = f"the distance between halves of two sources ({between:.4f}) and of one ({within:.4f})"
    return _verdict(Finding(between - within, error, UNKNOWN, why))
