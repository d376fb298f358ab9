"""The rows as a table and as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from moepp_jax.analysis import drawing


def show(report: Mapping[str, Any], console: Console) -> None:
    table = Table(title=f"layers of {_about(report)}")
    for name in ("pass", "kind", "layer"):
        table.add_column(name)
    for name in ("ms (quartiles)", "of moepp_jax", "of our MoE++", "off by"):
        table.add_column(name, justify="right")
    for r in report["rows"]:
        low, high = (1e3 * s for s in r["seconds_quartiles"])
        table.add_row(
            r["pass"],
            r["kind"],
            r["layer"],
            f"{1e3 * r['seconds']:.1f} ({low:.1f} to {high:.1f})",
            f"{r['over_own']:.2f}",
            f"{r['over_moepp']:.2f}",
            f"{r['relative_error']:.0e}",
        )
    console.print(table)


def _about(report: Mapping[str, Any]) -> str:
    s = report["sizes"]
    return (
        f"T={s['tokens']}, D={s['width']}, F={s['ffn_size']}, {s['n_ffn']} FFN experts, "
        f"tau={s['tau']}, float32, {report['machine']}, {report['threads']} threads"
    )


def figure(report: Mapping[str, Any]) -> Figure:
    """A bar for each layer, by kind; this package's are coloured."""
    passes = list(dict.fromkeys(row["pass"] for row in report["rows"]))
    drawn = drawing.new(2 + 5 * len(passes), 4.5)
    drawn.suptitle(_about(report), fontsize=8)
    all_axes = drawn.subplots(1, len(passes), sharey=True, squeeze=False)[0]
    for axes, way in zip(all_axes, passes, strict=True):
        rows = [row for row in report["rows"] if row["pass"] == way]
        rows.sort(key=lambda row: row["kind"])
        own = [row["layer"].startswith("moepp_jax") for row in rows]
        colors = [drawing.RUN_COLORS[0] if ours else drawing.GREY for ours in own]
        axes.barh(range(len(rows)), [1e3 * row["seconds"] for row in rows], color=colors)
        axes.set_yticks(range(len(rows)), [f"{row['layer']} ({row['kind']})" for row in rows])
        axes.set(title=way.replace("_", " and "), xlabel="ms")
        axes.grid(axis="x", alpha=0.3)
    all_axes[0].invert_yaxis()
    return drawn
