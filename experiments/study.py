"""An experiment: one file of `experiments/studies`, with its question, sweep, claim and figure."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from moepp_jax.errors import ConfigError, did_you_mean
from moepp_jax.experiments import figures, gain, runs, stats, studies
from moepp_jax.experiments.measure import Measured, Measurement
from moepp_jax.experiments.results import Row
from moepp_jax.experiments.scale import Scale, Variant

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told at this scale"
MISSING = "is open, as runs are missing"
# What the docstring of every experiment says, in this order.
SECTIONS = ("Question", "Paper", "Claim", "Refuted")


class Verdict(NamedTuple):
    """Of a claim, or of a part of one.

    Attributes:
      outcome: HOLDS, FAILS, OPEN or MISSING.
      said: with its numbers.
      p: how likely seeds as far from the claim's bound, or further, would be at that bound; None
        of what is no mean over seeds.
    """

    outcome: str
    said: str
    p: float | None = None


Judged = tuple[str, float | None]  # an outcome and its p, as a Verdict has them


@dataclasses.dataclass(frozen=True)
class Results:
    """What is known of an experiment's variants at a scale.

    Attributes:
      by_variant: its rows of this code's fingerprint, in the order of seeds.
      all_rows: of the scale, other experiments' too.
      measured: what the experiment measures beside training.
      asked: a number of seeds that all variants were given instead of their own.
    """

    scale: Scale
    variants: Sequence[Variant]
    by_variant: dict[str, list[Row]]
    all_rows: Sequence[Row]
    measured: Sequence[Measured] = ()
    asked: int | None = None

    def rows(self, variant: str) -> list[Row]:
        """Those that did not diverge."""
        return [row for row in self.by_variant[variant] if row.done]

    def lacking(self, variant: str) -> list[int]:
        """The seeds that have no row yet."""
        there = {row.seed for row in self.by_variant[variant]}
        return [seed for seed in range(self._seeds(variant)) if seed not in there]

    def mean(self, variant: str, column: str = "eval_loss") -> stats.Mean | None:
        """None where there is no row."""
        values = [getattr(row, column) for row in self.rows(variant)]
        return stats.mean(values) if values else None

    def difference(self, variant: str, other: str = "") -> stats.Mean | None:
        """Of held-out losses, paired by seeds; None if no seed has both.

        Args:
          other: by default what the variant is compared with.
        """
        other = other or self.against(variant)
        if not other:
            return None
        ours, theirs = (
            {row.seed: row.eval_loss for row in self.rows(name)} for name in (variant, other)
        )
        return stats.paired(ours, theirs)

    def against(self, variant: str) -> str:
        """The variant that one is compared with; empty if none."""
        return next(v.against for v in self.variants if v.name == variant)

    @functools.cached_property
    def curve(self) -> gain.Curve | None:
        """The vanilla curve of the scale, which compute gains are read from."""
        return gain.curve(self.scale, self.all_rows)

    def below(self, variant: str, other: str) -> Verdict:
        """The claim that a variant's held-out loss is lower than another's."""
        d = self.difference(variant, other)
        return self.told((variant, other), d, is_below(d, 0.0), _ends(variant, other, d))

    def within(self, variant: str, other: str, margin: float) -> Verdict:
        """The claim that two variants' losses differ by less than a margin, either way."""
        d = self.difference(variant, other)
        return self.told((variant, other), d, is_within(d, margin), _ends(variant, other, d))

    def measured_below(
        self, values: Mapping[int, float], bound: float, what: str, *of: str
    ) -> Verdict:
        """The claim that something's mean over seeds is below a bound.

        Args:
          values: seed -> value.
          what: is measured.
          of: the variants whose seeds they are.
        """
        mean = stats.mean(list(values.values())) if values else None
        said = f"{what}: {spread(mean)}, wanted below {bound:g}"
        return self.told(of, mean, is_below(mean, bound), said)

    def measured_within(
        self, values: Mapping[int, float], margin: float, what: str, *of: str
    ) -> Verdict:
        """The claim that something's mean over seeds is closer to 0 than a margin."""
        mean = stats.mean(list(values.values())) if values else None
        said = f"{what}: {spread(mean, '+')}, wanted within {margin:g}"
        return self.told(of, mean, is_within(mean, margin), said)

    def told(
        self, of: Sequence[str], mean: stats.Mean | None, judged: Judged, said: str
    ) -> Verdict:
        """What seeds say: nothing as long as some are to come, and by those alone that did not
        diverge no claim holds.

        Args:
          of: the variants whose seeds they are.
          mean: of the seeds that there are; None if there is none.
          judged: what it would be if they were all.
        """
        outcome, p = judged
        diverged = {name: sum(not r.done for r in self.by_variant[name]) for name in of}
        lost = [f"{count} of {name} diverged" for name, count in diverged.items() if count]
        wanted = min(map(self._seeds, of))
        if any(map(self.lacking, of)) or (not lost and (mean is None or mean.count < wanted)):
            outcome = MISSING
        elif lost and outcome != FAILS:
            outcome = OPEN
        return Verdict(outcome, "; ".join([said, *lost]), p)

    def _seeds(self, variant: str) -> int:
        return next(v.seeds for v in self.variants if v.name == variant)


class Study:
    """An experiment; its module's docstring has the SECTIONS.

    Attributes:
      scales: that it is of, by name; None for all.
    """

    scales: tuple[str, ...] | None = None

    def variants(self, scale: Scale) -> list[Variant]:
        """What is trained, the rows of its table."""
        raise NotImplementedError

    def measurements(self, scale: Scale) -> list[Measurement]:
        """What is measured beside training, of its runs or of the machine."""
        return []

    def verdicts(self, results: Results) -> list[Verdict]:
        """On the claim; it holds if all do, and does not if one does not."""
        raise NotImplementedError

    def judged(self, results: Results) -> list[Verdict]:
        """The verdicts, none of which fails by the chance that there are many."""
        return corrected(self.verdicts(results))

    def figure(self, results: Results) -> Figure:
        """By default each variant's difference to what it is compared with, with its interval."""
        return figures.differences(results)

    def more(self, results: Results) -> list[str]:
        """Lines of the report, in Markdown, after the table."""
        return []

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    @property
    def title(self) -> str:
        return self._doc().splitlines()[0]

    def sections(self) -> dict[str, str]:
        """What the docstring says: name of a section -> text.

        Raises:
          ValueError: one is missing.
        """
        found = re.findall(r"^([A-Z]\w+)  +(\S.*(?:\n  +\S.*)*)", self._doc(), re.MULTILINE)
        said = {name: " ".join(text.split()) for name, text in found}
        if list(said) != list(SECTIONS):
            raise ValueError(f"{self.name}'s docstring must have {SECTIONS}, and has {list(said)}")
        return said

    def _doc(self) -> str:
        return inspect.getdoc(inspect.getmodule(type(self))) or ""


def is_below(mean: stats.Mean | None, bound: float) -> Judged:
    """HOLDS if the whole interval is below a bound, FAILS if it is above, else OPEN; and its p."""
    if mean is None:
        return MISSING, None
    outcome = HOLDS if mean.high < bound else FAILS if mean.low > bound else OPEN
    return outcome, mean.p(bound)


def is_above(mean: stats.Mean | None, bound: float) -> Judged:
    """`is_below`'s opposite."""
    outcome, p = is_below(mean, bound)
    return {HOLDS: FAILS, FAILS: HOLDS}.get(outcome, outcome), p


def is_within(mean: stats.Mean | None, margin: float) -> Judged:
    """HOLDS if the whole interval is closer to 0 than a margin, FAILS if all of it is further on
    one side, else OPEN; and the p of the nearer end."""
    if mean is None:
        return MISSING, None
    outcome = OPEN
    if -margin < mean.low and mean.high < margin:
        outcome = HOLDS
    elif mean.low > margin or mean.high < -margin:
        outcome = FAILS
    return outcome, mean.p(math.copysign(margin, mean.value))


def corrected(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Of the parts of a claim, each of which can refute it: with k of them one fails if its p is
    at most 5 % / k (Bonferroni), else it is OPEN. That all hold needs no correction."""
    parts = sum(verdict.p is not None for verdict in verdicts)
    return [
        v._replace(outcome=OPEN)
        if v.outcome == FAILS and v.p is not None and v.p > (1 - stats.CONFIDENCE) / parts
        else v
        for v in verdicts
    ]


def outcome(verdicts: Sequence[Verdict]) -> str:
    """Of a claim with several parts."""
    outcomes = [verdict.outcome for verdict in verdicts]
    return next((kind for kind in (FAILS, MISSING, OPEN) if kind in outcomes), HOLDS)


def results_of(
    study: Study,
    scale: Scale,
    rows: Sequence[Row],
    measured: Sequence[Measured] = (),
    seeds: int | None = None,
) -> Results:
    """The rows of a study's variants and measurements, of those that there are.

    Args:
      seeds: instead of each variant's own number.
    """
    variants = study.variants(scale)
    if seeds is not None:
        variants = [v._replace(seeds=seeds) for v in variants]
    wanted = {one.key for one in study.measurements(scale)}
    by_fingerprint: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.seed):
        by_fingerprint.setdefault(row.fingerprint, []).append(row)
    found = {
        v.name: [
            row for row in by_fingerprint.get(runs.fingerprint(v.config), []) if row.seed < v.seeds
        ]
        for v in variants
    }
    own = [row for row in measured if row.key in wanted]
    return Results(scale, variants, found, rows, own, seeds)


def names() -> list[str]:
    """Of all experiments."""
    return sorted(module.name for module in pkgutil.iter_modules(studies.__path__))


def at(scale: Scale) -> list[Study]:
    """The experiments that are of a scale."""
    every = map(find, names())
    return [one for one in every if one.scales is None or scale.name in one.scales]


def find(name: str) -> Study:
    """The experiment of this name.

    Raises:
      ConfigError: there is none.
    """
    if name not in names():
        hint = did_you_mean(name, names(), f"there are {', '.join(names())}")
        raise ConfigError(f"there is no experiment {name!r}{hint}")
    module = importlib.import_module(f"{studies.__name__}.{name}")
    (own,) = (
        kind
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, Study) and kind.__module__ == module.__name__
    )
    return own()


def _ends(variant: str, other: str, d: stats.Mean | None) -> str:
    if d is None:
        return f"{variant} and {other} have no seed in common"
    return f"{variant} ends {spread(d, '+', 4)} nats from {other}"


def spread(mean: stats.Mean | None, sign: str = "", digits: int = 3, of: str = "seeds") -> str:
    """A mean with its interval, as verdicts say it."""
    if mean is None:
        return "not known yet"
    value, low, high = (f"{x:{sign}.{digits}f}" for x in (mean.value, mean.low, mean.high))
    if mean.count == 1:
        return f"{value} (one {of.removesuffix('s')})"
    return f"{value} [{low}, {high}] ({mean.count} {of})"
