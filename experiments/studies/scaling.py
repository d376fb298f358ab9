"""How much compute does MoE++ save, over sizes and lengths of training?

Question  held-out loss of four sizes trained for four lengths each, MoE++ and vanilla, against the
          tokens, the training FLOPs and the expert-forward time that it took.
Paper     no curve: its sizes are trained on 100 B tokens, the largest on 1 T too, by another
          schedule.
Claim     at every size and length MoE++ gets to its loss with less compute than the vanilla MoE of
          that size needs for it, by its runs of several lengths.
Refuted   if the interval of one of these gains is below 1.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from moepp_jax import markdown
from moepp_jax.config import Config
from moepp_jax.configs import base
from moepp_jax.errors import ConfigError
from moepp_jax.experiments import figures, gain, stats
from moepp_jax.experiments.measure import TIMED, Measurement
from moepp_jax.experiments.scale import MOEPP, VANILLA, Scale, Variant
from moepp_jax.experiments.study import (
    FAILS,
    HOLDS,
    MISSING,
    OPEN,
    Judged,
    Results,
    Study,
    Verdict,
)

COLORS = {MOEPP: "C0", VANILLA: "C1"}
NAMES = {MOEPP: "MoE++", VANILLA: "vanilla"}
LAYERS = "layers"  # the name of what is measured
MARKERS = "os^D"  # of sizes, the smallest first


class Scaling(Study):
    def variants(self, scale: Scale) -> list[Variant]:
        first, *lengths = gain.lengths(scale)
        return [
            gain.of_length(scale, steps, kind, size)
            for size in scale.growing
            for steps in (first, *lengths)
            for kind in (VANILLA, MOEPP)
            if steps != first or kind == VANILLA
        ]

    def measurements(self, scale: Scale) -> list[Measurement]:
        return [Measurement(LAYERS, None, functools.partial(_layer_times, scale=scale), TIMED)]

    def verdicts(self, results: Results) -> list[Verdict]:
        return [
            _verdict(results, size, steps, found)
            for size in results.scale.growing
            for steps, found in _gains_of(results, size).items()
        ]

    def figure(self, results: Results) -> Figure:
        figure = figures.new(13.5, 4.8)
        by_tokens, by_flops, by_time = figure.subplots(1, 3, sharey=True)
        lengths = set()
        for size, marker in zip(results.scale.growing, itertools.cycle(MARKERS)):
            for kind, color in COLORS.items():
                means = _means(results, size, kind)
                if not means:
                    continue
                tokens, compute, loss, errors = map(np.array, zip(*means, strict=True))
                lengths |= set(tokens)
                how = {"color": color, "marker": marker, "ms": 5, "lw": 1, "alpha": 0.8}
                by_tokens.errorbar(tokens, loss, errors, **how)
                by_flops.errorbar(compute, loss, errors, **how)
                if seconds := _seconds_per_token(results, size, kind):
                    by_time.errorbar(tokens * seconds, loss, errors, **how)
        for kind, color in COLORS.items():
            _band(by_flops, results, _usual(results.scale), kind)
            by_tokens.plot([], [], color=color, label=NAMES[kind])
        for size, marker in zip(results.scale.growing, itertools.cycle(MARKERS)):
            by_tokens.plot([], [], color=figures.GREY, marker=marker, ls="", label=size)
        by_tokens.set(xscale="log", xlabel="training tokens", ylabel="held-out loss, nats a token")
        by_tokens.set_xticks(sorted(lengths))
        by_tokens.xaxis.set_major_formatter(EngFormatter(places=1))
        by_tokens.minorticks_off()
        by_flops.set(xscale="log", xlabel="training FLOPs")
        by_time.set(xscale="log", xlabel="s in MoE layers, forward")
        for axes in (by_tokens, by_flops, by_time):
            axes.grid(alpha=0.3)
        figures.legend(by_tokens)
        figures.legend(by_flops, "lower left")
        return figure

    def more(self, results: Results) -> list[str]:
        """The gains of all sizes, the times of the layers, and the fitted laws."""
        return [*_gains(results), *_times(results), *_laws(results)]


def _verdict(results: Results, size: str, steps: int, found: gain.Gain | None) -> Verdict:
    """That MoE++ of a size and length needs less compute than the vanilla MoE of that size."""
    ours = gain.of_length(results.scale, steps, MOEPP, size).name
    curve = (gain.of_length(results.scale, n, VANILLA, size) for n in gain.lengths(results.scale))
    of = [ours, *(v.name for v in curve)]
    if found is None:
        return results.told(of, None, (MISSING, None), f"{ours}: no compute gain is known")
    said = f"{ours}: a compute gain of {found} ({found.logs.count} seeds)"
    return results.told(of, found.logs, is_gained(found), said)


def is_gained(found: gain.Gain) -> Judged:
    """HOLDS if the whole interval is above 1, FAILS if it is below, else OPEN; and its p.

    A gain that is only known to be at most so large does not hold, and one at least so large does
    not fail.
    """
    low, high = found.interval
    outcome = OPEN
    if low > 1 and found.bound in ("", gain.AT_LEAST):
        outcome = HOLDS
    elif high < 1 and found.bound in ("", gain.AT_MOST):
        outcome = FAILS
    return outcome, found.logs.p(0.0)


def _gains_of(results: Results, size: str) -> dict[int, gain.Gain | None]:
    """Of MoE++ to the vanilla MoE of its own size: steps -> gain, None where it is not known."""
    curve = gain.curve(results.scale, results.all_rows, size)
    names = {n: gain.of_length(results.scale, n, MOEPP, size).name for n in results.scale.lengths}
    return {n: curve and gain.gain(curve, results.rows(name)) for n, name in names.items()}


def _usual(scale: Scale) -> str:
    """The name among the growing sizes of the scale's usual one."""
    usual = scale.variant("usual").config.model
    for size, recipe in scale.growing.items():
        if scale.variant(size, of=recipe).config.model == usual:
            return size
    raise ConfigError(f"scale {scale.name!r} has no curve of its usual size")


def _column(size: str, kind: str) -> str:
    """Of the time of its layer."""
    return f"{size} {kind}_ms"


def _layer_times(folder: Path | None, scale: Scale) -> Mapping[str, float]:
    """Milliseconds of a MoE layer forward on a training batch, all sizes and both twins by turns.

    With capacity they are the same wherever tokens go; else the routers are at balance.
    """
    from moepp_jax.benchmarks import layer, timing

    cases = {}
    for size, recipe in scale.growing.items():
        for kind in COLORS:
            config = Config.parse(base.variant(recipe(), kind))
            moe, data = config.moe, config.data
            tokens = config.batch_tokens
            groups = tokens // max(moe.group_size, data.seq_len)
            others = (moe.n_const, moe.n_copy, moe.n_zero)
            shape = layer.Shape(
                tokens, groups, config.model.hidden_size, moe.ffn_size, moe.n_ffn, others
            )
            tau = moe.rule.tau if kind == MOEPP else None
            subject = layer.Subject(moe.rule.pool, tau)
            made = layer.cases_of(subject, shape, moe.dispatch, "forward")
            cases[_column(size, kind)] = made["layer"]
    seconds = timing.interleaved(cases, rounds=60, label=LAYERS)
    return {name: 1e3 * of.median for name, of in seconds.items()}


def _milliseconds(results: Results, size: str, kind: str) -> float | None:
    """Of a layer; None if it is not measured."""
    column = _column(size, kind)
    return next((row.values[column] for row in results.measured if column in row.values), None)


def _seconds_per_token(results: Results, size: str, kind: str) -> float | None:
    """In all MoE layers, forward; None if it is not measured."""
    found = _milliseconds(results, size, kind)
    if found is None:
        return None
    config = Config.parse(base.variant(results.scale.growing[size](), kind))
    layers = config.model.num_layers // config.model.moe_every
    return layers * found / 1e3 / config.batch_tokens


def _times(results: Results) -> list[str]:
    lines = []
    for size in results.scale.growing:
        vanilla, ours = (_milliseconds(results, size, kind) for kind in (VANILLA, MOEPP))
        if vanilla is not None and ours is not None:
            lines.append([size, f"{vanilla:.4g}", f"{ours:.4g}", f"{vanilla / ours:.2f}"])
    if not lines:
        return []
    head = ["layers x width", "vanilla, ms", "MoE++, ms", "speed-up"]
    said = "A MoE layer forward on a training batch, medians by turns:"
    return [said, "", *markdown.table(head, lines), ""]


def _gains(results: Results) -> list[str]:
    lines = []
    for size in results.scale.growing:
        found = _gains_of(results, size).values()
        if any(found):
            lines.append([size, *("" if g is None else str(g) for g in found)])
    if not lines:
        return []
    head = ["layers x width", *(f"{steps} steps" for steps in results.scale.lengths)]
    said = "Compute gain of MoE++ to the vanilla MoE of its own size:"
    return [said, "", *markdown.table(head, lines), ""]


def _means(results: Results, size: str, kind: str) -> list[tuple[float, float, float, float]]:
    """(tokens, training FLOPs, held-out loss, its standard error) of every length with rows."""
    found = []
    for steps in results.scale.lengths:
        name = gain.of_length(results.scale, steps, kind, size).name
        if results.rows(name):
            tokens, compute = (results.mean(name, c).value for c in ("tokens", "realised_flops"))
            loss = results.mean(name)
            found.append((tokens, compute, loss.value, np.nan_to_num(loss.error)))
    return found


class Law(NamedTuple):
    """A power law of a size's lengths.

    Attributes:
      fits: to seeds drawn with replacement.
      least, most: training FLOPs of its points.
      off: the largest distance of a length's mean loss from it, in nats.
    """

    law: stats.PowerLaw
    fits: Sequence[stats.PowerLaw]
    least: float
    most: float
    off: float


def _law(results: Results, size: str, kind: str) -> Law | None:
    """None where no seed has all lengths."""
    names = [gain.of_length(results.scale, n, kind, size).name for n in results.scale.lengths]
    points = [
        {row.seed: (row.realised_flops, row.eval_loss) for row in results.rows(name)}
        for name in names
    ]
    by_seed = {s: [p[s] for p in points] for s in set.intersection(*map(set, points))}
    if not by_seed or len(names) < 3:
        return None
    means = np.mean(list(by_seed.values()), axis=0)
    law = stats.power_law(*means.T)
    off = float(np.max(np.abs(law.loss(means[:, 0]) - means[:, 1])))
    return Law(law, stats.bootstrapped(by_seed), means[0, 0], means[-1, 0], off)


def _laws(results: Results) -> list[str]:
    lines = []
    for size in results.scale.growing:
        for kind, name in NAMES.items():
            found = _law(results, size, kind)
            if found is None:
                continue
            law, fits, off = found.law, found.fits, found.off
            low, high = stats.interval([fit.exponent for fit in fits])
            floor = f"{law.floor:.3f}" if law.floor > 1e-3 else "0, its bound"
            cells = [name, size, floor, f"{law.exponent:.3f} [{low:.3f}, {high:.3f}]", f"{off:.3f}"]
            lines.append(cells)
    if not lines:
        return []
    head = ["model", "layers x width", "floor, nats a token", "exponent", "furthest point, nats"]
    return [
        "Fits of loss = floor + scale FLOPs^-exponent to the means over seeds, in brackets the "
        "middle 95 % of fits to",
        "seeds drawn with replacement (of three seeds hardly more than their range). Gains do not "
        "hang on them.",
        "",
        *markdown.table(head, lines),
        "",
    ]


def _band(axes: Axes, results: Results, size: str, kind: str) -> None:
    """The power law of a size, and the middle 95 % of its fits."""
    found = _law(results, size, kind)
    if found is None:
        return
    x, color = np.geomspace(found.least, found.most, 60), COLORS[kind]
    axes.plot(
        x, found.law.loss(x), color=color, lw=1.5, ls=":", label=f"power law, {NAMES[kind]} {size}"
    )
    each = np.array([fit.loss(x) for fit in found.fits])
    low, high = np.quantile(each, [0.025, 0.975], axis=0)
    axes.fill_between(x, low, high, color=color, alpha=0.25, lw=0)
