"""The rows of `benchmarks.layer` as a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def show(rows: list[dict], title: str, console: Console) -> None:
    table = Table(title=title)
    for name in ("mode", "pass", "experts", "tau", "ms (quartiles)", "path/products"):
        table.add_column(name, justify="right")
    for name in ("speed-up", "theory", "of theory", "roofline", "flops/ideal", "temporary MiB"):
        table.add_column(name, justify="right")
    for r in rows:
        low, high = (1e3 * s for s in r["seconds_quartiles"])
        over = r["compiler_flops_over_ideal"]
        table.add_row(
            r["mode"],
            r["pass"],
            r["experts"],
            "vanilla" if r["tau"] is None else f"{r['tau']:.2f}",
            f"{1e3 * r['seconds']:.0f} ({low:.0f} to {high:.0f})",
            f"{r['over_bare_products']:.3f}",
            f"{r['speedup']:.2f}",
            f"{r['theory']:.2f}",
            f"{r['fraction_of_theory']:.1%}",
            f"{r['roofline']:.2f}",
            "" if over is None else f"{over:.3f}",
            f"{r['temp_bytes'] / 2**20:,.0f}",
        )
    console.print(table)
