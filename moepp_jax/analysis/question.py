"""A question about routing: one file of `moepp_jax.analysis.questions`.

Its module's docstring says what is asked, in a first line that ends with a question mark, and then
how the answer is computed. It reads records alone, and needs no JAX.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from moepp_jax.analysis import questions
from moepp_jax.analysis.record import KINDS, Meta, Record


class Table(NamedTuple):
    """What is written as CSV, and shown in the report as far as `shown` rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    shown: int = 20


class Question:
    """Asked of one record, or of two of the same text beside each other.

    Attributes:
      makes: names of all tables that it may make; by default one, of the question's own name.
      place: in the report, the lowest first.
    """

    makes: tuple[str, ...] = ()
    place: int = 100

    def __init__(self) -> None:
        self._found: dict[int, tuple[Record, Any]] = {}

    def of(self, record: Record) -> Any:
        """What is counted of one record, on which tables, figure and words all draw."""
        raise NotImplementedError

    def found(self, records: Sequence[Record]) -> list[Any]:
        """`of` each record, computed once."""
        for record in records:
            if id(record) not in self._found:
                self._found[id(record)] = record, self.of(record)
        return [self._found[id(record)][1] for record in records]

    def missing(self, records: Sequence[Record]) -> str:
        """Why it cannot be answered of these records, in one sentence; empty if it can."""
        return ""

    def tables(self, records: Sequence[Record]) -> dict[str, Table]:
        """Name, which is its file's too -> table."""
        return {}

    def figure(self, records: Sequence[Record]) -> Figure | None:
        return None

    def said(self, records: Sequence[Record]) -> list[str]:
        """Lines of the report, before the tables."""
        return []

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    @property
    def table_names(self) -> tuple[str, ...]:
        return self.makes or (self.name,)

    @property
    def title(self) -> str:
        return self._doc().splitlines()[0]

    @property
    def how(self) -> str:
        """How the answer is computed."""
        return " ".join(self._doc().partition("\n")[2].split())

    def _doc(self) -> str:
        return inspect.getdoc(inspect.getmodule(type(self))) or ""


def every() -> list[Question]:
    """All questions, in their order in the report."""
    found = []
    for one in sorted(pkgutil.iter_modules(questions.__path__), key=lambda m: m.name):
        module = importlib.import_module(f"{questions.__name__}.{one.name}")
        found += [
            kind()
            for _, kind in inspect.getmembers(module, inspect.isclass)
            if issubclass(kind, Question) and kind.__module__ == module.__name__
        ]
    return sorted(found, key=lambda one: (one.place, one.name))


def labels(records: Sequence[Record]) -> list[str]:
    """What tells the records apart: the run's name, with the step where names are the same."""
    names = [record.meta.name for record in records]
    if len(set(names)) < len(names):
        names = [f"{record.meta.name}, step {record.meta.step}" for record in records]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return names


def each_said(records: Sequence[Record], lines: Iterable[str]) -> list[str]:
    """A line a record, that says which where there are several."""
    return [
        f"{label}: {line}" if len(records) > 1 else line[:1].upper() + line[1:]
        for label, line in zip(labels(records), lines, strict=True)
    ]


def sample_said(records: Sequence[Record], found: Iterable[Mapping[str, Any]]) -> list[str]:
    """Of how many tokens a thing is that was found beside the rows."""
    lines = (f"of {of['tokens']:,} tokens." if "tokens" in of else "not asked." for of in found)
    return each_said(records, lines)


def beside(
    records: Sequence[Record],
    keys: Sequence[str],
    columns: Sequence[str],
    each: Sequence[Mapping[tuple, Sequence[Any]]],
    shown: int = 20,
) -> Table:
    """A table whose rows are told apart by `keys`, with every record's columns beside each other.

    Args:
      each: of each record, a row's keys -> its columns; the first one's order is kept.
    """
    rows = dict.fromkeys(itertools.chain.from_iterable(each))
    empty = (None,) * len(columns)
    values = [
        [*key, *itertools.chain(*zip(*(one.get(key, empty) for one in each), strict=True))]
        for key in rows
    ]
    if len(records) == 1:
        return Table([*keys, *columns], values, shown)
    headed = [f"{column}, {label}" for column in columns for label in labels(records)]
    return Table([*keys, *headed], values, shown)


def expert_names(meta: Meta) -> list[str]:
    """By number: the kind, and which of it where there are several."""
    return [
        kind if count == 1 else f"{kind} {number}"
        for kind, count in zip(KINDS, meta.counts, strict=True)
        for number in range(1, count + 1)
    ]


def balanced(meta: Meta) -> list[float]:
    """By expert: the share of the tokens that it serves at balance."""
    ffn, others = meta.counts[0], sum(meta.counts[1:])
    rest = max(meta.most - meta.wanted, 0.0)
    return [meta.wanted / max(ffn, 1)] * ffn + [rest / max(others, 1)] * others
