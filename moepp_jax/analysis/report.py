"""A folder with the answers to all questions: REPORT.md, tables as CSV, and figures.

The same bytes from the same records.
"""

from __future__ import annotations

import csv
import html
import io
import math
import numbers
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moepp_jax.analysis import drawing, question
from moepp_jax.analysis.question import Question, Table, beside
from moepp_jax.analysis.record import KINDS, Record
from moepp_jax.analysis.words import on_line
from moepp_jax.errors import ConfigError
from moepp_jax.storage import write_atomic

PAGE = "REPORT.md"


def write(folder: Path, records: Sequence[Record], command: str) -> Path:
    """The page's file, written with what it shows.

    What an earlier report made there, and this one does not, is removed.

    Args:
      records: one, or two of the same text to show beside each other.
      command: that made them.

    Raises:
      ConfigError: a record holds no token.
    """
    for record in records:
        if not record.num_tokens:
            raise ConfigError(f"the record of {record.meta.name} holds no token")
    folder.mkdir(parents=True, exist_ok=True)
    lines, made = _head(records, command), {PAGE}
    asked = question.every()
    for one in asked:
        lines += [f"## {one.title}", "", one.how, ""]
        why = one.missing(records)
        if why:
            lines += [f"*Not answered.* {why}", ""]
            continue
        answer, files = _answer(folder, one, records)
        lines += answer
        made |= files
    write_atomic(folder / PAGE, "\n".join(lines).rstrip() + "\n")
    for one in asked:
        for name in _may_make(one) - made:
            (folder / name).unlink(missing_ok=True)
    return folder / PAGE


def _may_make(one: Question) -> set[str]:
    tables = {f"{name}.csv" for name in one.table_names}
    return tables | {f"{one.name}.{kind}" for kind in drawing.FORMATS}


def _answer(folder: Path, one: Question, records: Sequence[Record]) -> tuple[list[str], set[str]]:
    """Its part of the page, and the names of the files that were written."""
    lines, made = [], set()
    said = [escaped(line) for line in one.said(records)]
    lines += ["  \n".join(said), ""] if said else []
    for name, table in one.tables(records).items():
        made.add(f"{name}.csv")
        write_atomic(folder / f"{name}.csv", as_csv(table))
        lines += [*as_markdown(table), ""] if table.shown else []
        lines += [_where(f"{name}.csv", table), ""]
    figure = one.figure(records)
    if figure is not None:
        for kind in drawing.FORMATS:
            made.add(f"{one.name}.{kind}")
            write_atomic(folder / f"{one.name}.{kind}", drawing.drawn(figure, kind))
        lines += [f"![{one.title}]({one.name}.png)", ""]
    return lines, made


def _where(file: str, table: Table) -> str:
    count, there = len(table.rows), min(table.shown, len(table.rows))
    rows = f"{count:,} row" + "s" * (count != 1)
    return f"[{file}]({file}): " + (rows if there == count else f"all {rows}")


def _head(records: Sequence[Record], command: str) -> list[str]:
    lines = [f"# Routing of {escaped(' and '.join(question.labels(records)))}", ""]
    lines += [f"    {on_line(command)}", ""]
    lines += [*as_markdown(_runs(records)), ""]
    lines += ["The text:", "", *as_markdown(_text(records)), ""]
    return lines


def _runs(records: Sequence[Record]) -> Table:
    """A line a record."""
    rows = []
    for label, record in zip(question.labels(records), records, strict=True):
        meta = record.meta
        rule = ", ".join(f"{name} {value}" for name, value in meta.rule.items())
        pool = ", ".join(f"{n} {kind}" for kind, n in zip(KINDS, meta.counts, strict=True) if n)
        balance = f"{float(record.ffn.mean()):.3f} ({meta.wanted:.3f})"
        row = [label, meta.step, rule, pool, _ranges(meta.layers), meta.most, balance]
        rows.append([*row, meta.machine])
    columns = ["run", "step", "rule", "pool", "MoE layers", "experts a token at most"]
    columns += ["FFN experts a token (at balance)", "machine"]
    return Table(columns, rows)


def _ranges(layers: Sequence[int]) -> str:
    """1, 2, 3 as 1 to 3."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


def _text(records: Sequence[Record]) -> Table:
    """A line a source."""
    each = []
    for record in records:
        rows, source, ffn = {}, record.rows.source, record.ffn.mean(axis=0)
        for number, (name, kind) in enumerate(record.meta.sources.items()):
            mine = source == number
            documents = len(np.unique(record.rows.document[mine]))
            loss = record.rows.loss[mine]
            loss = loss[np.isfinite(loss)]
            mean = float(loss.mean(dtype=np.float64)) if len(loss) else math.nan
            experts = float(ffn[mine].mean()) if mine.any() else math.nan
            rows[name, kind, int(mine.sum()), documents] = (mean, experts)
        each.append(rows)
    keys, columns = ("source", "is a", "tokens", "documents"), ("loss", "FFN experts a token")
    return beside(records, keys, columns, each, shown=100)


def as_csv(table: Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([on_line(column) for column in table.columns])
    writer.writerows([[_in_csv(cell) for cell in row] for row in table.rows])
    return out.getvalue()


def as_markdown(table: Table) -> list[str]:
    """As far as it is shown; numbers to the right."""
    rows = [list(row) for row in table.rows[: table.shown]]
    right = [
        bool(rows) and all(cell is None or _is_number(cell) for cell in column)
        for column in zip(*rows, strict=True)
    ] or [False] * len(table.columns)
    lines = [
        f"| {' | '.join(escaped(column) for column in table.columns)} |",
        "|" + "".join("---:|" if number else "---|" for number in right),
    ]
    lines += [f"| {' | '.join(_in_markdown(cell) for cell in row)} |" for row in rows]
    return lines


def _is_number(cell: Any) -> bool:
    return isinstance(cell, numbers.Number)


def _in_csv(cell: Any) -> str:
    if cell is None or (isinstance(cell, numbers.Real) and not math.isfinite(cell)):
        return ""
    if isinstance(cell, numbers.Integral):
        return str(int(cell))
    return f"{float(cell):.6g}" if isinstance(cell, numbers.Real) else on_line(str(cell))


def _in_markdown(cell: Any) -> str:
    if cell is None or (isinstance(cell, numbers.Real) and not math.isfinite(cell)):
        return ""
    if isinstance(cell, numbers.Integral):
        return f"{int(cell):,}"
    if isinstance(cell, numbers.Real):
        size = abs(float(cell))
        digits = ".3f" if size >= 0.1 else ".4f" if size >= 0.001 else ".2g"
        return f"{float(cell):{digits}}"
    return escaped(str(cell))


def escaped(text: str) -> str:
    """Text as Markdown shows it, on one line, whatever is in it."""
    text = html.escape(on_line(text), quote=False)
    text = re.sub(r"[|`*\[\]\\~$]", lambda m: f"&#{ord(m[0])};", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", "&#95;", text)  # in a word it is no emphasis
    return text
