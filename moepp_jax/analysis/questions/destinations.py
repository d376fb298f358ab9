"""Which tokens go to the zero expert, to the copy expert, and to each constant expert?

Of the ids that occur often enough, the share of their occurrences, over all MoE layers, that an
expert served; experts of zero and of copy are taken together, constant ones each by itself. The
examples are the occurrences that it served in most layers, of the five ids with the highest share.
Standard errors take documents as samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from moepp_jax.analysis import drawing, means, words
from moepp_jax.analysis.question import Question, Table, beside, expert_names, labels
from moepp_jax.analysis.record import Record

_ROWS, _BARS, _EXAMPLES = 50, 12, 5


class Found(NamedTuple):
    """Of each destination: the ids by their share there, the highest first."""

    tokens: dict[str, np.ndarray]
    shares: dict[str, np.ndarray]
    errors: dict[str, np.ndarray]
    count: np.ndarray  # [V] occurrences
    examples: list[tuple]
    least: int


class Destinations(Question):
    place = 7
    makes = ("destinations", "destinations_examples")

    def of(self, record: Record) -> Found:
        token, V = record.rows.token, len(record.meta.pieces)
        count = np.bincount(token, minlength=V)
        least = means.enough(count)
        ids = np.flatnonzero(count >= least)
        tokens, shares, errors, examples = {}, {}, {}, []
        sample = means.stretches(record)
        for name, experts in _destinations(record):
            layers = _layers_there(record, experts)
            each = means.by_group(token, layers / record.num_layers, sample, V)
            order = ids[np.argsort(-each.mean[ids], kind="stable")]
            tokens[name], shares[name], errors[name] = order, each.mean[order], each.error[order]
            for one in tokens[name][:_EXAMPLES]:
                where = np.flatnonzero(token == one)
                examples.append(
                    _example(record, name, int(where[np.argmax(layers[where])]), layers)
                )
        return Found(tokens, shares, errors, count, examples, least)

    def missing(self, records: Sequence[Record]) -> str:
        if not any(sum(record.meta.counts[1:]) for record in records):
            return "The pool has no zero-computation experts."
        if not any(len(ids) for found in self.found(records) for ids in found.tokens.values()):
            return "No token occurs twice in the text."
        return ""

    def tables(self, records: Sequence[Record]) -> dict[str, Table]:
        found = self.found(records)
        wanted = {
            (name, int(token))
            for of in found
            for name, ids in of.tokens.items()
            for token in ids[:_ROWS]
        }
        each = [_rows(record, of, wanted) for record, of in zip(records, found, strict=True)]
        keys = ("goes to", "id", "token", "occurrences")
        table = beside(records, keys, ("share", "standard error"), each)
        rows = [
            (label, *example)
            for label, of in zip(labels(records), found, strict=True)
            for example in of.examples
        ]
        columns = ("run", "goes to", "example", "layers", "source", "document", "position")
        return {
            "destinations": table._replace(shown=0),
            "destinations_examples": Table(columns, rows, shown=80),
        }

    def said(self, records: Sequence[Record]) -> list[str]:
        """The first few of each destination: the table's first rows would be of one alone."""
        lines = [f"Of the ids that occur at least {self.found(records)[0].least} times:"]
        for record, label, found in zip(records, labels(records), self.found(records), strict=True):
            for name, ids in found.tokens.items():
                top = ", ".join(
                    f"{words.shown(record, int(token))} {share:.0%}"
                    for token, share in zip(ids[:10], found.shares[name], strict=False)
                )
                lines.append(f"{name}{f' ({label})' if len(records) > 1 else ''}: {top}")
        return lines

    def figure(self, records: Sequence[Record]) -> Figure:
        found = self.found(records)
        names = list(dict.fromkeys(name for of in found for name in of.tokens))[: drawing.PANELS]
        figure, axes = drawing.panels(
            len(names), 4, 2.7, 1.1 + 0.21 * _BARS * (1 + 0.4 * (len(found) - 1)), extra=0.3
        )
        for one, name in zip(axes, names, strict=True):
            with_it = next(n for n, of in enumerate(found) if name in of.tokens)
            ids = found[with_it].tokens[name][:_BARS]
            shown = [words.shown(records[with_it], int(token)) for token in ids]
            values = [_of_ids(of.tokens.get(name), of.shares.get(name), ids) for of in found]
            errors = [_of_ids(of.tokens.get(name), of.errors.get(name), ids) for of in found]
            color = drawing.KIND_COLORS[name.split()[0]]
            drawing.bars(one, shown, values, errors, colors=(color, "0.6"))
            one.set_title(name, fontsize=10)
            one.set_xlabel("share of the occurrences", fontsize=9)
            one.set_xlim(left=0)
        if len(records) > 1:
            said = [drawing.label(name, 40) for name in labels(records)]
            figure.suptitle(f"coloured: {said[0]}; grey: {said[1]}", fontsize=10)
        return figure


def _rows(record: Record, of: Found, wanted: Set[tuple[str, int]]) -> dict[tuple, tuple]:
    """Of the wanted destinations and ids: keys -> share and its error."""
    return {
        (name, int(token), words.shown(record, int(token)), int(of.count[token])): (share, error)
        for name, ids in of.tokens.items()
        for token, share, error in zip(ids, of.shares[name], of.errors[name], strict=True)
        if (name, int(token)) in wanted
    }


def _of_ids(tokens: np.ndarray | None, values: np.ndarray | None, ids: np.ndarray) -> list[float]:
    """The values of these ids; NaN where there is none."""
    if tokens is None or values is None:
        return [float("nan")] * len(ids)
    there = dict(zip(tokens.tolist(), values.tolist(), strict=True))
    return [there.get(int(token), float("nan")) for token in ids]


def _destinations(record: Record) -> Iterator[tuple[str, list[int]]]:
    """Name -> the experts' numbers: zero, copy, each constant one."""
    starts, names = record.meta.starts, expert_names(record.meta)
    for kind, name in ((3, "zero"), (2, "copy")):
        if record.meta.counts[kind]:
            yield name, list(range(starts[kind], starts[kind + 1]))
    for expert in range(starts[1], starts[2]):
        yield names[expert], [expert]


def _layers_there(record: Record, experts: Sequence[int]) -> np.ndarray:
    """[T] layers in which one of these experts served the token."""
    layers = np.zeros(record.num_tokens)
    for expert, kept in zip(record.rows.experts, record.rows.kept, strict=True):
        layers += ((expert >= min(experts)) & (expert <= max(experts)) & kept).any(axis=1)
    return layers


def _example(record: Record, name: str, at: int, layers: np.ndarray) -> tuple:
    source = list(record.meta.sources)[record.rows.source[at]]
    return (
        name,
        words.context(record, at),
        int(layers[at]),
        source,
        int(record.rows.document[at]),
        int(record.rows.position[at]),
    )
