"""Log-likelihoods are those of each text alone, whatever the batch, its shape and the mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax import mesh as mesh_lib
from moepp_jax import model as model_lib
from moepp_jax import vocabulary
from moepp_jax.data import Tokenizer
from moepp_jax.errors import ConfigError
from moepp_jax.harness import generation as harness_generation
from moepp_jax.harness import requests, scoring
from moepp_jax.harness.scoring import Row, Score, Scorer
from tests import tiny, tokenizer_files

# The shorter bucket, and the longest length that a row may have.
BUCKET, LONGEST = 64, 96


@functools.cache
def parameters():
    model = model_lib.build(tiny.config())
    return jax.jit(model.init)(jax.random.key(0))


def scorer(axes=(1, 1, 1), batch_size=1):
    names = ("mesh.data", "mesh.fsdp", "mesh.expert")
    # Room for a balanced load only: scoring must not drop what does not fit it.
    c = tiny.config(**dict(zip(names, axes, strict=True)), **{"moe.exchange_buffer": 0.25})
    mesh = mesh_lib.make_mesh(c, jax.devices()[: np.prod(axes)])
    params = jax.device_put(parameters(), mesh_lib.shardings(model_lib.describe(c), mesh))
    return Scorer(c, mesh, params, batch_size, LONGEST)


@functools.cache
def on_one_device():
    return scorer(batch_size=2)


def rows():
    """Lengths of both buckets; some ask for one token, some for all, one for a place twice."""
    rng = np.random.default_rng(0)
    made = []
    for length, asked in [(1, 1), (40, 3), (63, 1), (64, 64), (65, 5), (90, 1), (96, 96)]:
        tokens = rng.integers(3, 384, length + 1).tolist()
        made.append(Row(tokens[:-1], range(length - asked, length), tokens[length + 1 - asked :]))
    return [*made, Row(made[1].tokens, [7, 39, 39], [5, 6, 7])]


@functools.cache
def scores():
    return on_one_device()(rows())


@functools.cache
def naive():
    """For every row the log-probabilities (tokens, V) and the experts' counts, by itself."""
    c = tiny.config()
    model = model_lib.build(c, dispatch="dropless")

    @jax.jit
    def run(tokens):
        places = jnp.arange(LONGEST)[None]
        out = model(parameters(), tokens[None], places, jnp.zeros_like(places))
        return vocabulary.logits(out.matrix, out.hidden[0]), out.router_logits[:, 0]

    found = []
    for row in rows():
        n = len(row.tokens)
        # What stands behind a row is nothing to it: another filler than the scorer's.
        logits, router = run(np.array([*row.tokens, *[9] * (LONGEST - n)], np.int32))
        logits = np.asarray(logits[:n], np.float64)
        best = np.argsort(-np.asarray(router[:, :n]), axis=-1)[..., : c.moe.rule.top_k]
        counts = (best[..., None] == np.arange(12)).sum(axis=(1, 2))
        found.append((logits - np.log(np.exp(logits).sum(-1, keepdims=True)), counts))
    return found


def test_they_are_the_models_own():
    for row, score, (log_probs, counts) in zip(rows(), scores(), naive(), strict=True):
        want = log_probs[list(row.places), row.targets]
        np.testing.assert_allclose(score.log_probs, want, rtol=1e-5, atol=1e-5)
        best = log_probs[list(row.places)].argmax(axis=-1)
        np.testing.assert_array_equal(score.greedy, best == row.targets)
        np.testing.assert_array_equal(score.served, counts)


def test_the_best_continuation_is_told():
    row = rows()[3]
    best = naive()[3][0].argmax(axis=-1).tolist()
    score = on_one_device()([row._replace(targets=best)])[0]
    assert score.greedy.all()
    best[5] = (best[5] + 1) % 384
    assert not on_one_device()([row._replace(targets=best)])[0].greedy[5]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a.log_probs, b.log_probs, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(a.greedy, b.greedy)
        np.testing.assert_array_equal(a.served, b.served)


def test_company_does_not_matter():
    alone = [on_one_device()([row])[0] for row in rows()]
    assert_same(alone, scores())
    assert_same(on_one_device()(rows()[::-1])[::-1], scores())


def test_the_bucket_does_not_matter():
    short = [row for row in rows() if len(row.tokens) <= BUCKET]
    want = [score for row, score in zip(rows(), scores(), strict=True) if row in short]
    for row, score in zip(short, want, strict=True):
        # A batch of the longest bucket, the row in it with another.
        batch = scoring.padded([rows()[6], row], 2, LONGEST, 96)
        got = on_one_device().score(parameters(), batch)
        asked = len(row.places)
        got = Score(got.log_probs[1, :asked], got.greedy[1, :asked], got.served[1])
        assert_same([got], [score])


def test_the_mesh_does_not_matter():
    assert_same(scorer((2, 2, 2), batch_size=8)(rows()), scores())


def test_lengths_are_rounded_to_two_steps_an_octave():
    given = [1, 64, 65, 96, 97, 128, 129, 192, 193, 1025, 1537, 2048]
    assert [scoring.rounded(n) for n in given] == [
        64, 64, 96, 96, 128, 128, 192, 192, 256, 1536, 2048, 2048,
    ]  # fmt: skip


def test_progress_counts_rows():
    done = []
    on_one_device()(rows(), done.append)
    assert sum(done) == len(rows()) and len(done) > 1


@pytest.mark.parametrize(
    "row", [Row([], [], []), Row([1], [], []), Row([1] * (LONGEST + 1), [0], [0])]
)
def test_what_cannot_be_scored_is_refused(row):
    with pytest.raises(ValueError, match="1 to 96 tokens and at least one query"):
        on_one_device()([row])


@pytest.fixture(scope="module")
def tokenizer():
    texts = [file.read_text(encoding="utf-8") for file in sorted(tiny.TEXT.glob("*.txt"))]
    return Tokenizer.train(texts, 384)


def test_a_pair_is_cut_where_the_contexts_tokens_end(tokenizer):
    plain, spaced, empty, blank = requests.encode_pairs(
        tokenizer,
        [("the king", " and the"), ("the king ", "and the"), ("", "the king"), (" ", "x")],
    )
    assert plain == spaced
    assert plain.context == [tokenizer.bos_id, *tokenizer.encode("the king")]
    assert plain.context + plain.continuation == [
        tokenizer.bos_id, *tokenizer.encode("the king and the"),
    ]  # fmt: skip
    assert empty == ([tokenizer.bos_id], tokenizer.encode("the king"))
    assert blank == ([tokenizer.bos_id], tokenizer.encode(" x"))


def test_a_continuation_that_merges_into_the_context_is_encoded_apart(tokenizer):
    assert len(tokenizer.encode("and the")) <= len(tokenizer.encode("and th"))
    merged, plain, nothing = requests.encode_pairs(
        tokenizer, [("and th", "e"), ("and", " the"), ("and", "")]
    )
    assert merged == ([tokenizer.bos_id, *tokenizer.encode("and th")], tokenizer.encode("e"))
    assert plain.context + plain.continuation == [tokenizer.bos_id, *tokenizer.encode("and the")]
    assert nothing.continuation == []
    assert [requests.can_be_scored(p, 9) for p in (merged, plain, nothing)] == [True, True, False]
    assert not requests.can_be_scored(requests.Pair([1], [2] * 10), 9)


ASKED = {"until": ["\n"], "max_gen_toks": 9, "do_sample": True}


def test_generation_takes_the_settings_of_task_files():
    asked = {"temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 7}
    asked |= {"repetition_penalty": 1.3, "num_beams": 1}
    settings, stops = harness_generation.settings_of(ASKED | asked, tiny.config(), 64)
    assert vars(settings) == {
        "max_new_tokens": 9,
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.3,
        "seed": 7,
    }
    assert stops == ["\n"]
    greedy = ASKED | {"do_sample": False, "repetition_penalty": 1.3, "temperature": 0.5}
    settings, _ = harness_generation.settings_of(greedy, tiny.config(), 64)
    assert settings.temperature == 0 and settings.repetition_penalty == 1.3
    own = tiny.config(**{"generate.seed": 3})
    assert harness_generation.settings_of(ASKED, own, 64)[0].seed == 3


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_beams": 4}, "num_beams = 4: moepp_jax has no beams but one"),
        ({"penalty_alpha": 1}, "generation_kwargs penalty_alpha: moepp_jax knows until, .*min_p"),
        ({"min_p": 1.5}, r"config\.generate\.min_p = 1\.5 must be"),
        ({"repetition_penalty": 0}, r"config\.generate\.repetition_penalty = 0\.0 must be"),
        ({"max_gen_toks": 64}, "max_gen_toks = 64 leaves no room"),
    ],
)
def test_settings_that_cannot_be_had_are_named(asked, message):
    with pytest.raises(ConfigError, match=message):
        harness_generation.settings_of(ASKED | asked, tiny.config(), 64)


def test_bos_can_be_left_out_but_not_of_an_empty_context(tokenizer):
    pair, empty = requests.encode_pairs(tokenizer, [("the", " king"), ("", "king")], bos=False)
    assert pair.context == tokenizer.encode("the")
    assert empty == ([tokenizer.bos_id], tokenizer.encode("king"))


def test_where_there_is_no_bos_an_empty_context_is_the_end_of_another_text(tmp_path):
    tokenizer = Tokenizer.load(tokenizer_files.save(tmp_path, "olmoe"))
    for bos in (True, False):
        pair, empty = requests.encode_pairs(tokenizer, [("the", " king"), ("", "king")], bos)
        assert pair.context + pair.continuation == tokenizer.encode("the king")
        assert empty == ([tokenizer.eos_id], tokenizer.encode("king"))


def test_too_long_a_context_loses_its_beginning():
    pair = requests.Pair([1, 2, 3, 4, 5], [6, 7])
    assert requests.row_of(pair, 6) == Row([1, 2, 3, 4, 5, 6], range(4, 6), [6, 7])
    assert requests.row_of(pair, 3) == Row([4, 5, 6], range(1, 3), [6, 7])
    assert requests.row_of(pair, 2) == Row([5, 6], range(0, 2), [6, 7])
    for bad in (pair._replace(continuation=[]), pair._replace(continuation=[6] * 3)):
        with pytest.raises(ValueError, match="continuation of"):
            requests.row_of(bad, 2)


def test_choices_of_one_token_share_a_row():
    given = [Row([1, 2], [1], [7]), Row([1, 3], [1], [7]), Row([1, 2], [0, 1], [2, 8])]
    distinct, where = requests.merged(given)
    assert [row.tokens for row in distinct] == [(1, 2), (1, 3)]
    assert where == [(0, slice(0, 1)), (1, slice(0, 1)), (0, slice(1, 3))]
    for row, (number, part) in zip(given, where, strict=True):
        assert distinct[number].places[part] == list(row.places)
        assert distinct[number].targets[part] == row.targets
