"""Means over tokens and their errors, where the tokens of a document are not independent."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moepp_jax.analysis.record import Record

Z = 1.96  # standard errors to either side of a mean: its 95 % interval
_STRETCH = 1024  # tokens of a long document that count as one sample
_BLOCKS = 2000  # samples of a bootstrap at most


class Means(NamedTuple):
    """Of G groups; NaN where there is nothing, or too little, to tell.

    Attributes:
      error: standard error.
      count: of tokens.
    """

    mean: np.ndarray  # [G]
    error: np.ndarray  # [G]
    count: np.ndarray  # [G]


def stretches(record: Record) -> np.ndarray:
    """[T] numbers of samples: documents, the long ones cut; they lie side by side."""
    rows = record.rows
    part = rows.position // _STRETCH
    new = np.zeros(record.num_tokens, bool)
    for edge in (rows.document, rows.source, part):
        new[1:] |= edge[1:] != edge[:-1]
    return np.cumsum(new)


def blocks(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """Samples for a bootstrap: [T] numbers, and the source of each.

    They are `stretches`, neighbours of a source being taken together where there are many.
    """
    stretch, source = stretches(record), record.rows.source.astype(np.int64)
    if not len(stretch):
        return stretch, source
    together = -(-(int(stretch[-1]) + 1) // _BLOCKS)
    group = stretch // together
    new = np.zeros(len(stretch), bool)
    new[1:] = (group[1:] != group[:-1]) | (source[1:] != source[:-1])
    block = np.cumsum(new)
    return block, source[np.flatnonzero(np.append(True, new[1:]))]


def draws(source_of: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """[count B] how often each block is in a sample, drawn with replacement in each source."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((count, len(source_of)))
    for source in np.unique(source_of):
        mine = np.flatnonzero(source_of == source)
        weights[:, mine] = rng.multinomial(len(mine), np.full(len(mine), 1 / len(mine)), count)
    return weights


def by_group(group: np.ndarray, values: np.ndarray, sample: np.ndarray, num_groups: int) -> Means:
    """Means of the tokens' values by their groups.

    The error is that of a ratio of two sums over independent samples: values, and tokens.

    Args:
      group: [T] from 0; a token of a negative one is left out.
      sample: [T] from 0.
    """
    inside = group >= 0
    group, values, sample = group[inside].astype(np.int64), values[inside], sample[inside]
    count = np.bincount(group, minlength=num_groups)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(group, values, num_groups) / count
        width = int(sample.max(initial=0)) + 1
        pairs, at = np.unique(group * width + sample, return_inverse=True)
        of = pairs // width
        off = np.bincount(at, values) - mean[of] * np.bincount(at) if len(pairs) else np.zeros(0)
        samples = np.bincount(of, minlength=num_groups)
        spread = np.bincount(of, off**2, num_groups) * samples / (samples - 1.0)
        error = np.where(samples > 1, np.sqrt(np.maximum(spread, 0)) / count, np.nan)
    return Means(mean, error, count)


def ffn(record: Record) -> np.ndarray:
    """[T] FFN experts of each token, the mean of the layers."""
    return record.ffn.mean(axis=0, dtype=np.float32).astype(np.float64)


def enough(counts: np.ndarray, usual: int = 20, wanted: int = 40) -> int:
    """Occurrences that a token id must have: the usual, or fewer so that `wanted` ids have them."""
    most = np.sort(counts)[::-1]
    return int(max(2, min(usual, most[wanted - 1] if len(most) >= wanted else 2)))


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's; NaN where one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / scale) if len(x) > 1 and scale > 1e-12 else float("nan")
