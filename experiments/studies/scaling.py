"""How much compute does MoE++ save, over sizes and lengths of training?

Question  held-out loss of four sizes trained for four lengths each, MoE++ and vanilla, against the
          tokens, the training FLOPs and the expert-forward time that it took.
Paper     none: it trains each size for one number of tokens.
Claim     at every length the usual size of MoE++ gets to its loss with less compute than the
          vanilla MoE of that size needs for it, by its fitted curve.
Refuted   if at a length the gain's 95 % interval is below 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from ml_collections import ConfigDict

from moepp_jax import markdown
from moepp_jax.config import Config
from moepp_jax.configs import base
from moepp_jax.errors import ConfigError
from moepp_jax.experiments import figures, gain, stats
from moepp_jax.experiments.measure import Measurement
from moepp_jax.experiments.scale import MOEPP, VANILLA, Scale, Variant
from moepp_jax.experiments.study import FAILS, HOLDS, MISSING, OPEN, Results, Study, Verdict

COLORS = {MOEPP: "C0", VANILLA: "C1"}


class Scaling(Study):
    def variants(self, scale: Scale) -> list[Variant]:
        return [
            gain.of_length(scale, steps, kind, size)
            for size in scale.growing
            for steps in scale.lengths
            for kind in (VANILLA, MOEPP)
        ]

    def measurements(self, scale: Scale) -> list[Measurement]:
        return [
            Measurement(_layer_of(size), None, functools.partial(_layer_times, recipe=recipe))
            for size, recipe in scale.growing.items()
        ]

    def verdicts(self, results: Results) -> list[Verdict]:
        curve = results.curve
        if curve is None:
            return [Verdict(MISSING, "the vanilla curve of the usual size has too few rows yet")]
        size = _usual(results.scale)
        found = []
        for steps in results.scale.lengths:
            name = gain.of_length(results.scale, steps, MOEPP, size).name
            loss, realised = results.mean(name), results.mean(name, "realised_flops")
            if loss is None:
                found.append(Verdict(MISSING, f"{name} has no row yet"))
                continue
            g = gain.gain(curve, loss, realised.value)
            outcome = HOLDS if g.low > 1 else FAILS if g.high < 1 else OPEN
            found.append(Verdict(outcome, f"{steps} steps: a compute gain of {g}"))
        return found

    def figure(self, results: Results) -> Figure:
        figure = figures.new(13.5, 4.6)
        by_tokens, by_flops, by_time = figure.subplots(1, 3, sharey=True)
        lengths = set()
        for number, size in enumerate(results.scale.growing):
            for kind in (VANILLA, MOEPP):
                means = _means(results, size, kind)
                if not means:
                    continue
                tokens, compute, loss = map(np.array, zip(*means, strict=True))
                lengths |= set(tokens)
                how = {"color": COLORS[kind], "alpha": 0.4 + 0.2 * number, "marker": "o", "ms": 4}
                label = size if kind == MOEPP else None
                by_tokens.plot(tokens, loss, **how)
                line = by_flops.plot(compute, loss, **how)[0]
                if seconds := _seconds_per_token(results, size, kind):
                    by_time.plot(tokens * seconds, loss, **how)
                if label:
                    by_flops.annotate(
                        label,
                        (compute[-1], loss[-1]),
                        (0, -7),
                        textcoords="offset points",
                        ha="center",
                        va="top",
                        fontsize=8,
                        color=line.get_color(),
                    )
        _band(by_flops, results.curve)
        for kind, name in ((MOEPP, "MoE++"), (VANILLA, "vanilla")):
            by_tokens.plot([], [], color=COLORS[kind], marker="o", label=name)
        by_tokens.set(xscale="log", xlabel="training tokens", ylabel="held-out loss, nats a token")
        by_tokens.set_xticks(sorted(lengths))
        by_tokens.xaxis.set_major_formatter(EngFormatter(places=1))
        by_tokens.minorticks_off()
        by_flops.set(xscale="log", xlabel="training FLOPs")
        by_time.set(xscale="log", xlabel="s in MoE layers, forward")
        for axes in (by_tokens, by_flops, by_time):
            axes.margins(y=0.1)  # the sizes stand below
            axes.grid(alpha=0.3)
        figures.legend(by_tokens)
        return figure

    def more(self, results: Results) -> list[str]:
        """The gains of all sizes, the times of the layers, and the fitted laws."""
        lines, times = [], [*_gains(results), *_times(results)]
        for size in results.scale.growing:
            for kind, name in ((VANILLA, "vanilla"), (MOEPP, "MoE++")):
                means = _means(results, size, kind)
                if len(means) >= 3:
                    law = stats.power_law([c for _, c, _ in means], [y for _, _, y in means])
                    lines.append([name, size, f"{law.floor:.3f}", f"{law.exponent:.3f}"])
        if not lines:
            return times
        head = ["model", "layers x width", "floor, nats a token", "exponent"]
        said = "Fits of loss = floor + scale FLOPs^-exponent to the means over seeds:"
        return [said, "", *markdown.table(head, lines), "", *times]


def _usual(scale: Scale) -> str:
    """The name among the growing sizes of the scale's usual one."""
    usual = scale.variant("usual").config.model
    for size, recipe in scale.growing.items():
        if scale.variant(size, of=recipe).config.model == usual:
            return size
    raise ConfigError(f"scale {scale.name!r} has no curve of its usual size")


def _layer_of(size: str) -> str:
    """The name of its measurement."""
    return f"layer of {size}"


def _layer_times(folder: Path | None, recipe: Callable[[], ConfigDict]) -> Mapping[str, float]:
    """Milliseconds of a MoE layer forward on a training batch, MoE++ and vanilla by turns.

    With capacity they are the same wherever tokens go; else the routers are at balance.
    """
    from moepp_jax.benchmarks import layer, timing

    cases = {}
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
        cases[f"{kind}_ms"] = layer.cases_of(subject, shape, moe.dispatch, "forward")["layer"]
    seconds = timing.interleaved(cases, rounds=40, label="layers")
    return {name: 1e3 * of.median for name, of in seconds.items()}


def _seconds_per_token(results: Results, size: str, kind: str) -> float | None:
    """In all MoE layers, forward; None if it is not measured."""
    found = {row.name: row.values for row in results.measured}.get(_layer_of(size))
    if found is None:
        return None
    config = Config.parse(base.variant(results.scale.growing[size](), kind))
    layers = config.model.num_layers // config.model.moe_every
    return layers * found[f"{kind}_ms"] / 1e3 / config.batch_tokens


def _times(results: Results) -> list[str]:
    rows = {row.name: row.values for row in results.measured}
    sizes = [size for size in results.scale.growing if _layer_of(size) in rows]
    if not sizes:
        return []
    lines = []
    for size in sizes:
        vanilla, ours = (rows[_layer_of(size)][f"{kind}_ms"] for kind in (VANILLA, MOEPP))
        lines.append([size, f"{vanilla:.4g}", f"{ours:.4g}", f"{vanilla / ours:.2f}"])
    head = ["layers x width", "vanilla, ms", "MoE++, ms", "speed-up"]
    said = "A MoE layer forward on a training batch, medians by turns:"
    return [said, "", *markdown.table(head, lines), ""]


def _gains(results: Results) -> list[str]:
    """Of MoE++, to the vanilla MoE of its own size."""
    scale, lines = results.scale, []
    for size in scale.growing:
        curve = gain.curve(scale, results.all_rows, size)
        if curve is None:
            continue
        cells = [size]
        for steps in scale.lengths:
            name = gain.of_length(scale, steps, MOEPP, size).name
            loss, realised = results.mean(name), results.mean(name, "realised_flops")
            cells.append("" if loss is None else str(gain.gain(curve, loss, realised.value)))
        lines.append(cells)
    if not lines:
        return []
    head = ["layers x width", *(f"{steps} steps" for steps in scale.lengths)]
    said = "Compute gain of MoE++ to the vanilla MoE of its own size:"
    return [said, "", *markdown.table(head, lines), ""]


def _means(results: Results, size: str, kind: str) -> list[tuple[float, float, float]]:
    """(tokens, training FLOPs, held-out loss) of every length that has rows."""
    found = []
    for steps in results.scale.lengths:
        name = gain.of_length(results.scale, steps, kind, size).name
        columns = ("tokens", "realised_flops", "eval_loss")
        if results.rows(name):
            found.append(tuple(results.mean(name, column).value for column in columns))
    return found


def _band(axes, curve: gain.Curve | None) -> None:
    """The vanilla curve that gains are read from, and 95 % of its fits."""
    if curve is None:
        return
    x = np.geomspace(curve.least, curve.most, 60)
    axes.plot(x, curve.law.loss(x), color="k", lw=1, ls="--", label="fit, vanilla, usual size")
    if curve.fits:
        each = np.array([fit.loss(x) for fit in curve.fits])
        low, high = np.quantile(each, [0.025, 0.975], axis=0)
        axes.fill_between(x, low, high, color="k", alpha=0.12, lw=0)
    figures.legend(axes)
