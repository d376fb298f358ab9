"""Predicted times by part as a bar chart, of several configurations beside each other."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from moepp_jax import storage
from moepp_jax.compile import parts


def write(file: storage.AnyPath, reports: Mapping[str, Mapping[str, Any]], topology: str) -> None:
    """A PNG, whatever the file is called.

    Args:
      reports: name -> what `profile.predict` found.
    """
    out = io.BytesIO()
    draw(reports, topology).savefig(out, format="png")
    storage.write_atomic(file, out.getvalue())


def draw(reports: Mapping[str, Mapping[str, Any]], topology: str) -> Figure:
    """Bars are with links at their peak; lines reach to where links are slower."""
    figure = Figure(figsize=(8.5, 5.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(reports)
    for number, (name, report) in enumerate(reports.items()):
        low, high = zip(*(report["parts_ms"][part] for part in parts.ALL), strict=True)
        places = [y + height * (number + 0.5) - 0.4 for y in range(len(parts.ALL))]
        axes.barh(places, low, height, color=f"C{number}", label=f"{name}: {_said(report)}")
        axes.hlines(places, low, [max(ends) for ends in zip(low, high, strict=True)], "0.3", lw=1.2)
        for y, ms, end in zip(places, low, high, strict=True):
            said = f"{ms:,.0f} to {end:,.0f}" if end > 1.01 * ms else f"{ms:,.0f}"
            axes.annotate(
                said if end else "",
                (end, y),
                (3, 0),
                textcoords="offset points",
                va="center",
                size=7,
            )
    axes.set_yticks(range(len(parts.ALL)), parts.ALL)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("ms of a step, predicted; to the right: links at a quarter of their peak")
    axes.set_title(f"A training step by part, on {topology}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right")
    return figure


def _said(report: Mapping[str, Any]) -> str:
    low, high = report["predicted_ms"]
    return f"{low:,.0f} to {high:,.0f} ms"
