"""An experiment: one file of `experiments/studies`, with its question, sweep, claim and figure."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
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
    """Of a claim that was made before the runs.

    Attributes:
      outcome: HOLDS, FAILS, OPEN or MISSING.
      said: with its numbers.
    """

    outcome: str
    said: str


@dataclasses.dataclass(frozen=True)
class Results:
    """What is known of an experiment's variants at a scale.

    Attributes:
      by_variant: its rows of this code's fingerprint, in the order of seeds.
      all_rows: of the scale, other experiments' too.
      measured: what the experiment measures beside training.
    """

    scale: Scale
    variants: Sequence[Variant]
    by_variant: dict[str, list[Row]]
    all_rows: Sequence[Row]
    measured: Sequence[Measured] = ()

    def rows(self, variant: str) -> list[Row]:
        """Those that did not diverge."""
        return [row for row in self.by_variant[variant] if row.done]

    def mean(self, variant: str, column: str = "eval_loss") -> stats.Mean | None:
        """None where there is no row."""
        values = [getattr(row, column) for row in self.rows(variant)]
        return stats.mean(values) if values else None

    def difference(self, variant: str, other: str = "") -> stats.Difference | None:
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
        if d is None:
            return Verdict(MISSING, f"{variant} and {other} have no seed in common yet")
        return Verdict(is_below(d, 0.0), f"{variant} ends {_signed(d)} nats from {other}")

    def within(self, variant: str, other: str, margin: float) -> Verdict:
        """The claim that two variants' losses differ by less than a margin, either way."""
        d = self.difference(variant, other)
        if d is None:
            return Verdict(MISSING, f"{variant} and {other} have no seed in common yet")
        inside = -margin < d.low and d.high < margin
        outcome = HOLDS if inside else FAILS if d.low > margin or d.high < -margin else OPEN
        return Verdict(outcome, f"{variant} ends {_signed(d)} nats from {other}")


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


def is_below(d: stats.Difference, bound: float) -> str:
    """HOLDS if the whole interval is below a bound, FAILS if it is above; else OPEN."""
    return HOLDS if d.high < bound else FAILS if d.low > bound else OPEN


def below_bound(values: Mapping[int, float], bound: float, what: str) -> Verdict:
    """The claim that something's mean over seeds is below a bound.

    Args:
      values: seed -> value.
      what: is measured.
    """
    d = stats.paired(values, dict.fromkeys(values, 0.0))
    if d is None:
        return Verdict(MISSING, f"{what}: not measured yet")
    said = f"{what}: {d.value:.3f} [{d.low:.3f}, {d.high:.3f}] ({d.count} seeds)"
    return Verdict(is_below(d, bound), f"{said}, wanted below {bound:g}")


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
        v.name: by_fingerprint.get(runs.fingerprint(v.config), [])[: v.seeds] for v in variants
    }
    own = [row for row in measured if row.key in wanted]
    return Results(scale, variants, found, rows, own)


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


def _signed(d: stats.Difference) -> str:
    if d.count == 1:
        return f"{d.value:+.4f} (one seed)"
    return f"{d.value:+.4f} [{d.low:+.4f}, {d.high:+.4f}] ({d.count} seeds)"
