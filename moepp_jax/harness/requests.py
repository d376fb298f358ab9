"""Texts of benchmark requests to rows of tokens, as the harness's `hf` model class makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moepp_jax.data import Tokenizer
from moepp_jax.harness.scoring import Row


class Pair(NamedTuple):
    """Token ids of a context, never empty, and of the continuation to score."""

    context: list[int]
    continuation: list[int]


def encode(tokenizer: Tokenizer, texts: Sequence[str], bos: bool) -> list[list[int]]:
    first = tokenizer.beginning if bos else []
    return [first + ids for ids in tokenizer.encode_batch(texts)]


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], bos: bool = True
) -> list[Pair]:
    """Contexts and continuations, cut where the tokens of the context alone end.

    Both are encoded together, so that the tokens are those of running text; spaces at the end of a
    context go to the continuation, whose words begin with them. An empty context is BOS, or EOS
    where there is none. Where nothing is left after the context's tokens, as the continuation
    merges into the last of them, it is encoded apart.
    """
    moved = [_move_spaces(*pair) for pair in pairs]
    contexts = encode(tokenizer, [context for context, _ in moved], bos)
    wholes = encode(tokenizer, [context + continuation for context, continuation in moved], bos)
    cut = []
    for (context, _), before, whole in zip(moved, contexts, wholes, strict=True):
        if context:
            cut.append(Pair(before, whole[len(before) :]))
        else:
            start = len(tokenizer.beginning) if bos else 0
            cut.append(Pair(tokenizer.beginning or [tokenizer.prefix_id], whole[start:]))
    merged_into = [i for i, pair in enumerate(cut) if not pair.continuation]
    apart = encode(tokenizer, [moved[i][1] for i in merged_into], bos=False)
    for i, continuation in zip(merged_into, apart, strict=True):
        cut[i] = Pair(cut[i].context, continuation)
    return cut


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def can_be_scored(pair: Pair, max_length: int) -> bool:
    """Whether the continuation has tokens, and no more than the model sees."""
    return 0 < len(pair.continuation) <= max_length


def row_of(pair: Pair, max_length: int) -> Row:
    """What the model reads, the last token left out, and the places of the continuation.

    Too long a context loses its beginning.

    Raises:
      ValueError: the continuation has no token, or does not fit.
    """
    asked = len(pair.continuation)
    if not can_be_scored(pair, max_length):
        raise ValueError(
            f"a continuation of {asked} tokens cannot be scored: it must have 1 to {max_length}"
        )
    whole = (pair.context + pair.continuation)[-(max_length + 1) :]
    tokens = whole[:-1]
    return Row(tokens, range(len(tokens) - asked, len(tokens)), whole[-asked:])


def merged(rows: Sequence[Row]) -> tuple[list[Row], list[tuple[int, slice]]]:
    """Rows of the same tokens as one: answers that are one token long share what leads to them.

    Returns:
      The rows, and for each of those given the row and the part of its queries that are its own.
    """
    numbers: dict[tuple[int, ...], int] = {}
    places: list[list[int]] = []
    targets: list[list[int]] = []
    where = []
    for row in rows:
        number = numbers.setdefault(tuple(row.tokens), len(numbers))
        if number == len(places):
            places.append([])
            targets.append([])
        start = len(places[number])
        places[number] += row.places
        targets[number] += row.targets
        where.append((number, slice(start, len(places[number]))))
    return [Row(*parts) for parts in zip(numbers, places, targets, strict=True)], where
