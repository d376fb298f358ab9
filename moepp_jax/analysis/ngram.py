"""N-gram baselines: what counting alone predicts, on the very targets of the language model.

Add-k estimates over token ids, P(w | context) = (count(context w) + k) / (count(context) + k V),
counted within the documents of the training split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

# The smoothing constants that a baseline may choose from.
K_GRID = tuple(10 ** (quarter / 4) for quarter in range(-16, 5))


@dataclasses.dataclass(frozen=True)
class Baseline:
    loss: float  # nats a token
    k: float  # of K_GRID, the best on the evaluated text
    num_targets: int


class NGramCounts:
    """Counts of every run of `order` tokens in one document, by binary search in sorted keys."""

    def __init__(self, documents: Iterable[np.ndarray], vocab_size: int, order: int):
        """
        Raises:
          ValueError: a run of `order` tokens does not fit into a 64-bit key.
        """
        if vocab_size**order > 2**63:
            raise ValueError(f"runs of {order} of {vocab_size} tokens do not fit into 64 bits")
        self.vocab_size = vocab_size
        self.order = order
        stream, in_document = _stream(documents)
        keys = _keys(_windows(stream, order), vocab_size)
        # The first token of a run may open a document, unless it is itself the predicted one.
        keys = keys[_windows(in_document, order)[:, min(order - 1, 1) :].all(axis=1)]
        self._keys, self._counts = np.unique(keys, return_counts=True)
        self._contexts, firsts = np.unique(self._keys // vocab_size, return_index=True)
        totals = np.concatenate([[0], np.cumsum(self._counts)])
        self._context_counts = np.diff(totals[[*firsts, -1]])

    def lookup(self, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Runs [n, order] of tokens -> counts [n] of the runs and of their first order - 1."""
        keys = _keys(runs, self.vocab_size)
        return (
            _find(self._keys, self._counts, keys),
            _find(self._contexts, self._context_counts, keys // self.vocab_size),
        )

    def log_probability(self, runs: np.ndarray, k: float) -> np.ndarray:
        """Runs [n, order] -> log P(last token | the tokens before it) [n], in nats."""
        return _add_k(*self.lookup(runs), k, self.vocab_size)


def unigram_loss(
    train: Iterable[np.ndarray], batches: Iterable[Mapping[str, np.ndarray]], vocab_size: int
) -> Baseline:
    """`ngram_loss` of order 1: the tokens' frequencies."""
    return ngram_loss(train, batches, vocab_size, order=1)


def trigram_loss(
    train: Iterable[np.ndarray], batches: Iterable[Mapping[str, np.ndarray]], vocab_size: int
) -> Baseline:
    """`ngram_loss` of order 3: the two tokens before."""
    return ngram_loss(train, batches, vocab_size, order=3)


def ngram_loss(
    train: Iterable[np.ndarray],
    batches: Iterable[Mapping[str, np.ndarray]],
    vocab_size: int,
    order: int,
) -> Baseline:
    """Mean negative log-likelihood of the batches' targets, each counted once.

    Sees what the language model sees: the context is cut at the start of a segment and of a row,
    and a target with fewer than order - 1 tokens before it gets the estimate of that lower order.
    k is the one of `K_GRID` that is best on this very text, which no honest model could choose: the
    baseline is, if anything, too strong.

    Args:
      train: the documents of the training split, vectors of token ids.
      batches: evaluation batches of packed rows, read once.
      vocab_size: V.
      order: tokens in a run, the predicted one included.

    Raises:
      ValueError: there is no target in the batches.
    """
    runs_of = _runs_by_order(batches, order)
    num_targets = sum(map(len, runs_of.values()))
    if not num_targets:
        raise ValueError("the evaluation batches hold no target")
    documents = list(train)
    counts = [
        NGramCounts(documents, vocab_size, n).lookup(runs)
        for n, runs in runs_of.items()
        if len(runs)
    ]
    run_counts, context_counts = (np.concatenate(parts) for parts in zip(*counts, strict=True))

    def loss(k: float) -> float:
        return -_add_k(run_counts, context_counts, k, vocab_size).mean()

    best = min(K_GRID, key=loss)
    return Baseline(loss=float(loss(best)), k=best, num_targets=num_targets)


def _runs_by_order(batches: Iterable[Mapping], order: int) -> dict[int, np.ndarray]:
    """n -> the runs [., n] that end in a target and have n - 1 tokens of context in their row."""
    runs: dict[int, list] = {n: [np.empty((0, n), np.int64)] for n in range(1, order + 1)}
    for batch in batches:
        tokens, targets = batch["tokens"], batch["targets"]
        context = np.minimum(batch["positions"] + 1, order - 1)
        for n in runs:
            row, column = np.nonzero((batch["loss_mask"] > 0) & (context == n - 1))
            before = [tokens[row, column - back] for back in range(n - 2, -1, -1)]
            runs[n].append(np.stack([*before, targets[row, column]], axis=1).astype(np.int64))
    return {n: np.concatenate(parts) for n, parts in runs.items()}


def _stream(documents: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The documents end to end, and for each token whether the one before is of its document."""
    documents = [document for document in documents if len(document)]
    if not documents:
        return np.empty(0, np.int64), np.empty(0, bool)
    stream = np.concatenate(documents).astype(np.int64)
    in_document = np.ones(len(stream), bool)
    in_document[np.cumsum([0, *map(len, documents[:-1])])] = False
    return stream, in_document


def _windows(values: np.ndarray, order: int) -> np.ndarray:
    if len(values) < order:
        return np.empty((0, order), values.dtype)
    return np.lib.stride_tricks.sliding_window_view(values, order)


def _keys(runs: np.ndarray, vocab_size: int) -> np.ndarray:
    """A run as one integer, its tokens being the digits in base V."""
    keys = np.zeros(len(runs), np.int64)
    for digit in runs.T:
        keys = keys * vocab_size + digit
    return keys


def _find(keys: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The counts of the wanted keys, 0 for those that never occurred."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, counts[places], 0)


def _add_k(run_counts, context_counts, k: float, vocab_size: int) -> np.ndarray:
    return np.log(run_counts + k) - np.log(context_counts + k * vocab_size)
