"""Training curves of one or several runs as one figure, from their metrics.jsonl."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from moepp_jax.metrics import read_metrics
from moepp_jax.storage import write_atomic


def plot_curves(
    workdirs: Mapping[str, str | Path | Sequence[str | Path]],
    out: str | Path,
    references: Mapping[str, float] | None = None,
) -> Path:
    """Draws loss, FFN experts per token and drop rate against the tokens seen.

    Args:
      workdirs: label -> the folder of a run, or those of several, such as seeds.
      out: the PNG to write; its folder is made.
      references: label -> a loss in nats a token to compare with, drawn as a horizontal line.

    Raises:
      FileNotFoundError: a folder has no metrics.
      ValueError: a run has no training row yet.
    """
    figure = Figure(figsize=(11, 5.5), dpi=150, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.7, 1))
    loss = figure.add_subplot(grid[:, 0])
    experts = figure.add_subplot(grid[0, 1], sharex=loss)
    drops = figure.add_subplot(grid[1, 1], sharex=loss)
    for number, (label, folders) in enumerate(workdirs.items()):
        color = f"C{number}"
        for workdir in [folders] if isinstance(folders, str | Path) else folders:
            rows = read_metrics(workdir)
            training = [row for row in rows if "loss" in row]
            if not training:
                raise ValueError(f"{workdir} ({label}) has no training row yet: nothing to draw")
            tokens = _column(training, "tokens")
            style = {"color": color, "marker": "." if len(training) == 1 else ""}  # no line
            loss.plot(tokens, _column(training, "loss"), alpha=0.4, lw=1, **style)
            _plot_held_out(loss, rows, training, color)
            experts.plot(tokens, _column(training, "ffn_experts_per_token"), lw=1.3, **style)
            drops.plot(tokens, _column(training, "drop_rate"), lw=1.3, **style)
        loss.plot([], [], color=color, lw=3, label=label)
    loss.plot([], [], color="0.4", alpha=0.6, lw=1, label="training batches")
    loss.plot([], [], color="0.4", marker="o", ms=4, lw=1.6, label="held-out text")
    for label, value in (references or {}).items():
        loss.axhline(value, color="0.35", ls="--", lw=1)
        loss.annotate(  # beside the curves, which would run through it
            f"{label}\n{value:.2f}",
            (1, value),
            xycoords=loss.get_yaxis_transform(),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color="0.25",
        )
    _dress(loss, "loss, nats a token")
    _dress(experts, "FFN experts per token")
    _dress(drops, "dropped assignments")
    drops.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    drops.set_ylim(bottom=0)
    loss.legend(loc="upper right")
    return _save(figure, Path(out))


def _plot_held_out(
    axes: Axes, rows: list[dict[str, Any]], training: list[dict[str, Any]], color: str
) -> None:
    """Rows of an evaluation have a step only: the tokens seen by then are those of training.

    It may come before training's first row: at step 0 no token was seen.
    """
    held_out = [row for row in rows if "eval_loss" in row]
    steps, seen = ([0, *_column(training, key)] for key in ("step", "tokens"))
    tokens = np.interp(_column(held_out, "step"), steps, seen)
    axes.plot(tokens, _column(held_out, "eval_loss"), color=color, marker="o", ms=4, lw=1.6)


def _column(rows: list[dict[str, Any]], key: str) -> np.ndarray:
    """What is null or absent becomes NaN, a gap in a line."""
    return np.array([row.get(key) for row in rows], dtype=float)


def _dress(axes: Axes, label: str) -> None:
    axes.set_xlabel("tokens seen")
    axes.set_ylabel(label)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, out: Path) -> Path:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, png.getvalue())
    return out
