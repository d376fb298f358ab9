"""The n-gram baselines against counts made by hand."""

import math

import numpy as np
import pytest

from moepp_jax.analysis.ngram import K_GRID, NGramCounts, ngram_loss, trigram_loss, unigram_loss
from tests import tiny

V = 5
# Token 1 opens a document, token 2 closes it.
TRAIN = [np.array([1, 3, 4, 3, 4, 2], np.uint16), np.array([1, 3, 3, 2], np.uint16)]
HELD_OUT = [np.array([1, 3, 4, 4, 2]), np.array([1, 4, 2])]


def batches(documents, row_length):
    packed = tiny.packed(documents, row_length, drop_last=False)
    return [packed.read(np.array([r])) for r in range(len(packed))]


def mean_loss(k, counts):
    """`counts`: (count of the run, count of its context) of every target."""
    return -sum(math.log((run + k) / (context + k * V)) for run, context in counts) / len(counts)


def best_loss(counts):
    return min(mean_loss(k, counts) for k in K_GRID)


def test_counts_stay_within_documents():
    bigrams = NGramCounts(TRAIN, V, 2)
    runs = np.array([[1, 3], [3, 4], [3, 3], [4, 2], [2, 1], [0, 0]])
    run_counts, context_counts = bigrams.lookup(runs)
    assert run_counts.tolist() == [2, 2, 1, 1, 0, 0]
    assert context_counts.tolist() == [2, 4, 4, 2, 0, 0]


def test_unigram_by_hand():
    # Predicted tokens of the training text: 3 four times, 4 twice, 2 twice.
    targets = {3: 4, 4: 2, 2: 2}
    expected = best_loss([(targets[w], 8) for w in (3, 4, 4, 2, 4, 2)])
    baseline = unigram_loss(TRAIN, batches(HELD_OUT, 8), V)
    np.testing.assert_allclose(baseline.loss, expected, rtol=1e-12)
    assert baseline.num_targets == 6 and baseline.k in K_GRID


def test_trigram_by_hand():
    # After BOS there is one token of context, so the bigram is used: (1,3), (1,4).
    # Trigrams: (1,3,4) 1 of 2, (3,4,4) 0 of 2, (4,4,2) 0 of 0, (1,4,2) 0 of 0.
    expected = best_loss([(2, 2), (1, 2), (0, 2), (0, 0), (0, 2), (0, 0)])
    baseline = trigram_loss(TRAIN, batches(HELD_OUT, 8), V)
    np.testing.assert_allclose(baseline.loss, expected, rtol=1e-12)


def test_the_context_is_cut_where_a_row_begins():
    # Rows of 2: 1 3 | 4 4 | 2 1 | 4; the target of the third token has no context but itself.
    # Bigrams (1,3), (4,4), (1,4); trigrams (1,3,4), (4,4,2), (1,4,2) becomes the bigram (4,2).
    expected = best_loss([(2, 2), (1, 2), (0, 2), (0, 0), (0, 2), (1, 2)])
    baseline = trigram_loss(TRAIN, batches(HELD_OUT, 2), V)
    np.testing.assert_allclose(baseline.loss, expected, rtol=1e-12)
    assert baseline.num_targets == 6


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("context", [(1, 3), (3, 4), (0, 0)])
def test_probabilities_sum_to_one(order, context):
    counts = NGramCounts(TRAIN, V, order)
    runs = np.array([[*context, w] for w in range(V)])[:, 3 - order :]
    for k in (1e-4, 0.1, 10.0):
        np.testing.assert_allclose(np.exp(counts.log_probability(runs, k)).sum(), 1)


def test_agrees_with_counting_in_a_dictionary():
    rng = np.random.default_rng(0)
    vocab = 70_000  # more than 16 bits, and three of them more than 32
    used = rng.integers(0, vocab, 12)
    make = lambda n: [rng.choice(used, rng.integers(2, 30)) for _ in range(n)]  # noqa: E731
    train, held_out = make(200), make(20)
    counted: dict[tuple, int] = {}
    for document in train:
        for n in (1, 2, 3):
            for i in range(n > 1 and n - 1, len(document)):
                run = tuple(document[i - n + 1 : i + 1].tolist())
                counted[run] = counted.get(run, 0) + (n > 1 or i > 0)
    terms = []
    for document in held_out:
        for i in range(1, len(document)):
            run = tuple(document[max(i - 2, 0) : i + 1].tolist())
            context = sum(
                c for r, c in counted.items() if len(r) == len(run) and r[:-1] == run[:-1]
            )
            terms.append((counted.get(run, 0), context))
    rows = batches(held_out, 1000)
    losses = {k: -np.mean([math.log((c + k) / (n + k * vocab)) for c, n in terms]) for k in K_GRID}
    baseline = ngram_loss(train, rows, vocab, order=3)
    np.testing.assert_allclose(baseline.loss, min(losses.values()), rtol=1e-10)
    assert baseline.k == min(losses, key=losses.get)


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="no target"):
        unigram_loss(TRAIN, [], V)


def test_runs_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="64 bits"):
        NGramCounts(TRAIN, 70_000, 4)


def test_without_training_text_all_tokens_are_equal():
    baseline = trigram_loss([], batches(HELD_OUT, 8), V)
    np.testing.assert_allclose(baseline.loss, math.log(V))
