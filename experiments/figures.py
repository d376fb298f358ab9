"""Figures of reports, the same bytes from the same rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moepp_jax.experiments import stats
from moepp_jax.experiments.stats import Mean

if TYPE_CHECKING:
    from moepp_jax.experiments.study import Results

GREY = "0.45"


def new(width: float = 7.5, height: float = 4.5) -> Figure:
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def differences(results: Results) -> Figure:
    """Held-out losses less those that they are compared with, with intervals; seeds below them."""
    shown = [v for v in results.variants if results.difference(v.name)]
    baselines = list(dict.fromkeys(v.against for v in shown))
    figure = new(height=1.2 + 0.36 * max(len(shown), 2))
    axes = figure.subplots()
    axes.axvline(0, color=GREY, lw=1)
    for y, (name, _, _, against) in enumerate(shown):
        d, color = results.difference(name), f"C{baselines.index(against)}"
        base = {row.seed: row.eval_loss for row in results.rows(against)}
        seeds = [r.eval_loss - base[r.seed] for r in results.rows(name) if r.seed in base]
        axes.plot(seeds, [y + 0.22] * len(seeds), "o", color=color, ms=4, alpha=0.5, mew=0)
        if math.isfinite(d.low):
            axes.plot([d.low, d.high], [y, y], color=color, lw=2, solid_capstyle="butt")
        axes.plot(d.value, y, "o", color=color, ms=6)
    axes.set_yticks(range(len(shown)), [v.name for v in shown])
    axes.set_ylim(max(len(shown), 1) - 0.5, -0.5)
    other = baselines[0] if len(baselines) == 1 else "what it is compared with"
    # Under long names of variants the axis is shorter than its label.
    axes.set_xlabel(f"held-out loss less that of {other}, nats a token", loc="right")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def by_chips(axes: Axes, chips: Sequence[int]) -> None:
    """Numbers of TPU v5p chips on a logarithmic axis, each with its own tick."""
    axes.set(xscale="log", xlabel="TPU v5p chips")
    axes.set_xticks(chips, [f"{n:,}" for n in chips], rotation=45)
    axes.minorticks_off()


def legend(axes: Axes, place: str = "best") -> None:
    """Where there is something to name."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=place)


def with_errors(
    axes: Axes,
    x: Sequence[float],
    means: Sequence[Mean],
    color: str,
    label: str,
    each: Sequence[Sequence[float]] = (),
) -> None:
    """A line through means over seeds, with their standard errors.

    Args:
      each: what the means are of, drawn too, beside the bars.
    """
    beside = 0.015 * (max(x) - min(x)) if each else 0.0
    for at, values in zip(x, each, strict=False):
        dots(axes, [at + beside] * len(values), values, color)
    y, errors = [m.value for m in means], [_error(m) for m in means]
    axes.errorbar(x, y, errors, color=color, marker="o", ms=5, capsize=3, label=label)


def point(
    axes: Axes, pairs: Sequence[tuple[float, float]], color: str, marker: str, label: str = ""
) -> tuple[Mean, Mean]:
    """The mean of (x, y) over seeds with its standard errors, and every seed; the two means."""
    x, y = (stats.mean(values) for values in zip(*pairs, strict=True))
    dots(axes, *zip(*pairs, strict=True), color, marker)
    bars = {"xerr": _error(x), "yerr": _error(y)}
    axes.errorbar(x.value, y.value, **bars, color=color, fmt=marker, ms=6, lw=1.2, label=label)
    return x, y


def level(axes: Axes, mean: Mean, color: str, label: str) -> None:
    """A mean that does not depend on x, in a band of its standard error."""
    axes.axhline(mean.value, color=color, ls="--", label=label)
    axes.axhspan(
        mean.value - _error(mean), mean.value + _error(mean), color=color, alpha=0.15, lw=0
    )


def dots(axes: Axes, x: Sequence[float], y: Sequence[float], color: str, marker: str = "o") -> None:
    """Of single seeds, small and faint."""
    axes.plot(x, y, marker, color=color, ms=3.5, alpha=0.5, mew=0)


def averaged(means: Sequence[Mean]) -> str:
    """What points and their bars are: for the label of an axis."""
    counts = sorted({m.count for m in means})
    if counts in ([], [1]):
        return "one seed"
    return f"mean and standard error of {' or '.join(map(str, counts))} seeds (dots)"


def _error(mean: Mean) -> float:
    """None is drawn of one seed."""
    return 0.0 if math.isnan(mean.error) else mean.error


def labelled(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Names beside their points, each in the nearest place that is still free."""
    axes.margins(0.15)
    axes.figure.draw_without_rendering()
    places = {name: axes.transData.transform(point) for name, point in points.items()}
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in places.values()]
    for name, (px, py) in places.items():
        text = axes.annotate(
            name, points[name], (0, 0), textcoords="offset pixels", fontsize=8, va="bottom"
        )
        size = text.get_window_extent()
        for distance, angle in [(d, a) for d in range(14, 250, 9) for a in range(0, 360, 15)]:
            towards = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            # The near edge or corner of the text is at that distance, its middle behind it.
            dx = distance * towards[0] + size.width * (towards[0] - 1) / 2
            dy = distance * towards[1] + size.height * (towards[1] - 1) / 2
            left, bottom = px + dx - 3, py + dy - 3
            box = (left, bottom, left + size.width + 6, bottom + size.height + 6)
            inside = axes.bbox.contains(*box[:2]) and axes.bbox.contains(*box[2:])
            if inside and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        text.set_position((dx, dy))
        if distance > 14:
            end = (dx + size.width / 2, dy + size.height / 2)
            line = {"arrowstyle": "-", "lw": 0.5, "color": "0.5", "relpos": (0.5, 0.5)}
            axes.annotate("", points[name], end, textcoords="offset pixels", arrowprops=line)


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two boxes (left, bottom, right, top) do."""
    return bool(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])
