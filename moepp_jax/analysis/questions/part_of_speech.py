"""Do verbs get more FFN experts than nouns, and word fragments the fewest?

FFN experts per token, averaged over the MoE layers, by what the token is: a part of speech if it is
a whole word (textblob's PatternTagger, a lexicon with rules), else a word fragment, a number,
punctuation or white space. The first 200,000 tokens are tagged, the same share of every source.
Standard errors take documents as samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from moepp_jax.analysis import drawing, means, words
from moepp_jax.analysis.question import Question, Table, beside, labels
from moepp_jax.analysis.record import Record

_MOST = 200_000  # tokens, for the tagger's sake
_FRAGMENT = "word fragment"


class PartOfSpeech(Question):
    place = 4

    def of(self, record: Record) -> dict[str, tuple[int, float, float]]:
        """What a token is -> tokens, mean FFN experts, standard error; the highest first."""
        tokens = _sample(record)
        kinds = _kinds(words.spell(record, tokens))
        names = sorted(set(kinds))
        number = {name: n for n, name in enumerate(names)}
        group = np.array([number[kind] for kind in kinds], np.int64)
        each = means.by_group(
            group, means.ffn(record)[tokens], means.stretches(record)[tokens], len(names)
        )
        order = sorted(range(len(names)), key=lambda n: -each.mean[n])
        return {
            names[n]: (int(each.count[n]), float(each.mean[n]), float(each.error[n])) for n in order
        }

    def missing(self, records: Sequence[Record]) -> str:
        return "" if words.can_tag() else words.NO_TAGGER

    def tables(self, records: Sequence[Record]) -> dict[str, Table]:
        each = [{(n,): of for n, of in found.items()} for found in self.found(records)]
        columns = ("tokens", "FFN experts", "standard error")
        return {self.name: beside(records, ("token is",), columns, each)}

    def said(self, records: Sequence[Record]) -> list[str]:
        return ["In the paper (7B): verbs most, nouns 1.5 to 1.7, word fragments fewest."]

    def figure(self, records: Sequence[Record]) -> Figure:
        found = self.found(records)
        names = list(found[0])
        nothing = (0, np.nan, np.nan)
        figure = drawing.new(7.5, 1.2 + 0.22 * len(names) * (1 + 0.4 * (len(found) - 1)))
        axes = figure.subplots()
        values = [[of.get(name, nothing)[1] for name in names] for of in found]
        errors = [[of.get(name, nothing)[2] for name in names] for of in found]
        drawing.bars(axes, names, values, errors)
        axes.axvline(records[0].meta.wanted, color=drawing.GREY, ls=":", lw=1.2)
        axes.set_xlabel("FFN experts per token, mean of layers (dotted: balance)")
        drawing.runs_legend(figure, labels(records))
        return figure


def _sample(record: Record) -> np.ndarray:
    """The first tokens of each source, in the order of the text."""
    source = record.rows.source
    keep = min(1.0, _MOST / max(record.num_tokens, 1))
    chosen = [
        mine[: int(np.ceil(keep * len(mine)))]
        for mine in (np.flatnonzero(source == s) for s in range(len(record.meta.sources)))
    ]
    return np.sort(np.concatenate(chosen))


def _kinds(spelling: words.Spelling) -> list[str]:
    """What each token is."""
    parts = words.parts_of_speech(spelling.units)
    names = [_FRAGMENT if form == "fragment" else form for form in words.FORMS]
    return [
        parts[unit] if names[form] == "word" else names[form]
        for form, unit in zip(spelling.form.tolist(), spelling.unit.tolist(), strict=True)
    ]
