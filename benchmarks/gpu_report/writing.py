"""The report's folder: report.json, a page of tables, and figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from moepp_jax import markdown

PAGE, JSON = "REPORT.md", "report.json"
_TITLES = {
    "equality": "Equality with the CPU",
    "exchanges": "Both exchanges over several devices",
    "step": "Training steps",
    "paper": "The paper's table of expert throughput",
    "attention": "Attention",
    "layer": "A layer beside a vanilla one and its bare products",
}


def write(report: Mapping[str, Any], folder: Path) -> None:
    (folder / JSON).write_text(json.dumps(report, indent=1) + "\n")
    lines = [f"# {report['machine']}", "", f"{_about(report)}. {summary(report)}.", ""]
    for name, part in report["parts"].items():
        lines += [f"## {_TITLES[name]}", "", *_part(part), ""]
        if figure := _figure(name, part.get("rows", [])):
            figure.savefig(folder / f"{name}.png")
            lines += [f"![{_TITLES[name]}]({name}.png)", ""]
    (folder / PAGE).write_text("\n".join(lines))


def is_sound(report: Mapping[str, Any]) -> bool:
    """Whether every part was measured and every comparison holds."""
    return not _troubles(report)


def summary(report: Mapping[str, Any]) -> str:
    troubles = _troubles(report)
    return f"not right: {'; '.join(troubles)}" if troubles else "everything measured, all equal"


def _troubles(report: Mapping[str, Any]) -> list[str]:
    found = []
    for name, part in report["parts"].items():
        found += [f"{name} {how}: {part[how]}" for how in ("failed", "skipped") if how in part]
        wrong = [row for row in part.get("rows", []) if not row.get("holds", True)]
        found += [f"{row['what']} is {row['relative_error']:.1e} off" for row in wrong]
    return found


def _about(report: Mapping[str, Any]) -> str:
    if report["platform"] == "cpu":
        return "Small sizes on a CPU: they show that the report works, and nothing else"
    s = report["sizes"]
    return (
        f"Layers of {s['tokens']:,} tokens in {s['dtype']}; {s['memory'] / 2**30:.1f} GiB a "
        "device; medians of interleaved rounds"
    )


def _part(part: Mapping[str, Any]) -> list[str]:
    if "rows" not in part:
        return [f"**{how}**: {said}" for how, said in part.items() if how != "seconds"]
    if not part["rows"]:
        return ["Nothing to compare: there is one device."]
    return table(part["rows"])


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown, of all columns that any row has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    head = [column.replace("_", " ") for column in columns]
    return markdown.table(head, ([_cell(row.get(column)) for column in columns] for row in rows))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(one)}" for name, one in value.items())
    if isinstance(value, list):
        return " to ".join(_cell(one) for one in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _figure(name: str, rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    if not rows or name not in ("paper", "step"):
        return None
    return _of_paper(rows) if name == "paper" else _of_steps(rows)


def _of_paper(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Speed-ups over the vanilla layer by tau: theory, the paper, here."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = _new(2.9 * len(models))
    for axes, model in zip(_axes(figure, len(models)), models, strict=True):
        own = [row for row in rows if row["model"] == model and row["tau"] is not None]
        taus = [row["tau"] for row in own]
        for column, label, style in (
            ("theory", "theory", ":"),
            ("paper_speedup", "paper", "s--"),
            ("speedup", "here", "o-"),
        ):
            axes.plot(taus, [row[column] for row in own], style, label=label)
        axes.set(title=model, xlabel="tau", ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("speed-up over the vanilla layer")
    figure.axes[0].legend()
    return figure


def _of_steps(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Milliseconds of a step beside its bounds."""
    figure = _new(3.6 * len(rows))
    for axes, row in zip(_axes(figure, len(rows)), rows, strict=True):
        bars = {name: 1e3 * bound for name, bound in (row["bounds"] or {}).items()}
        bars["measured"] = 1e3 * row["seconds"]
        axes.barh(list(bars), list(bars.values()))
        axes.set(title=row["dispatch"], xlabel="ms")
    return figure


def _new(width: float) -> Figure:
    return Figure(figsize=(width, 3.6), dpi=130, layout="constrained")


def _axes(figure: Figure, count: int) -> Iterable[Any]:
    return figure.subplots(1, count, squeeze=False)[0]
