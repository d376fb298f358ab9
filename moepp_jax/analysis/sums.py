"""Sums over blocks of documents, from which any weighted sample of them is made at once."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from moepp_jax.analysis import means
from moepp_jax.analysis.record import Record

FEWEST = 5  # blocks of a source, to draw from


class Sums(NamedTuple):
    """Of B blocks (`means.blocks`) of the sources that have enough of them."""

    source: np.ndarray  # [B] numbers in `Meta.sources`
    tokens: np.ndarray  # [B]
    load: np.ndarray  # [B J N] tokens that each expert served
    ffn: np.ndarray  # [B J] FFN experts
    products: np.ndarray  # [B J J] of FFN experts in two layers

    @property
    def num_layers(self) -> int:
        return self.ffn.shape[1]

    @property
    def sources(self) -> list[int]:
        """Those that are there."""
        return np.unique(self.source).tolist()


def of(record: Record) -> Sums:
    """Sources of fewer than `FEWEST` blocks are left out."""
    block, source = means.blocks(record)
    B, N, J = len(source), record.meta.num_experts, record.num_layers
    edges = [*np.searchsorted(block, np.arange(B)).tolist(), len(block)]
    load = np.zeros((B, J, N))
    for j in range(J):
        kept, expert = record.rows.kept[j], record.rows.experts[j].astype(np.int64)
        at = (block[:, None] * (N + 1) + expert)[kept]
        load[:, j] = np.bincount(at, minlength=B * (N + 1)).reshape(B, N + 1)[:, :N]
    ffn, products = np.zeros((B, J)), np.zeros((B, J, J))
    for b, (start, end) in enumerate(itertools.pairwise(edges)):
        x = record.ffn[:, start:end].astype(np.float64)
        ffn[b], products[b] = x.sum(axis=1), x @ x.T
    tokens = np.diff(edges).astype(np.float64)
    enough = np.bincount(source)[source] >= FEWEST
    return Sums(*(each[enough] for each in (source, tokens, load, ffn, products)))


def per_source(sums: Sums, weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Weighted sums of [B ...] over the blocks of each source: [R S ...].

    Args:
      weights: [R B] how often each block is in a sample.
    """
    each = [
        np.tensordot(weights[:, sums.source == s], values[sums.source == s], 1)
        for s in sums.sources
    ]
    return np.stack(each, axis=1)


def shares(sums: Sums, weights: np.ndarray) -> np.ndarray:
    """[R S J N] each expert's share of a source's assignments."""
    return _shared(per_source(sums, weights, sums.load))


def _shared(load: np.ndarray) -> np.ndarray:
    return load / np.maximum(load.sum(axis=-1, keepdims=True), 1)


def correlations(sums: Sums, weights: np.ndarray) -> np.ndarray:
    """[R J J] over tokens, of the FFN experts of two layers."""
    tokens = (weights @ sums.tokens)[:, None, None]
    mean = np.tensordot(weights, sums.ffn, 1) / tokens[:, 0]
    cov = np.tensordot(weights, sums.products, 1) / tokens - mean[:, :, None] * mean[:, None, :]
    return normalised(cov)


def correlations_of_sources(sums: Sums, weights: np.ndarray) -> np.ndarray:
    """[R J J] over sources, of the mean FFN experts of two layers."""
    tokens = per_source(sums, weights, sums.tokens)
    mean = per_source(sums, weights, sums.ffn) / tokens[..., None]
    off = mean - mean.mean(axis=1, keepdims=True)
    return normalised(np.einsum("rsj,rsk->rjk", off, off) / off.shape[1])


def normalised(cov: np.ndarray) -> np.ndarray:
    """Covariances as correlations; NaN of what does not vary."""
    scale = np.sqrt(np.maximum(np.diagonal(cov, axis1=1, axis2=2), 0))
    scale = np.where(scale > 1e-9, scale, np.nan)
    return cov / scale[:, :, None] / scale[:, None, :]


def spread(sums: Sums, weights: np.ndarray) -> np.ndarray:
    """[R J] how far the loads of sources are from their mean: total variation, their mean."""
    found = np.empty((len(weights), sums.num_layers))
    for some in np.array_split(np.arange(len(weights)), max(len(weights) // 50, 1)):
        each = shares(sums, weights[some])
        off = np.abs(each - each.mean(axis=1, keepdims=True)).sum(axis=-1) / 2
        found[some] = off.mean(axis=1)
    return found


def halves(
    load: np.ndarray, source: np.ndarray, rng: np.random.Generator, times: int = 3
) -> tuple[float, float]:
    """The mean distance between random halves of two sources, and between those of one.

    Between halves both, since then both have the same errors.

    Args:
      load: [B J N].
      source: [B].
    """
    sources, between, within = np.unique(source), [], []
    same = np.eye(len(sources), dtype=bool)
    for _ in range(times):
        inside = np.zeros((2, len(sources), len(source)))
        for s, one in enumerate(sources):
            mine = rng.permutation(np.flatnonzero(source == one))
            for half, blocks in enumerate(np.array_split(mine, 2)):
                inside[half, s, blocks] = 1
        ours, theirs = _shared(np.tensordot(inside, load, 1))
        apart = np.stack([np.abs(one - theirs).sum(axis=-1).mean(axis=-1) / 2 for one in ours])
        between.append(apart[~same].mean())
        within.append(apart[same].mean())
    return float(np.mean(between)), float(np.mean(within))
