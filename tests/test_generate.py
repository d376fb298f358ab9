"""Text from the cache is text from the whole model; sampling draws from the right distribution."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax import model as model_lib
from moepp_jax import vocabulary
from moepp_jax.config import ConfigError, GenerateConfig
from moepp_jax.generate import Generator, sampler
from tests import reference, tiny

GREEDY = GenerateConfig(max_new_tokens=12, temperature=0.0, top_k=0, top_p=1.0, seed=0)
PROMPTS = [[5, 6, 7], [300, 20, 10, 4, 4, 4, 9, 8, 31], [17] * 13 + [18, 19]]


@functools.cache
def case():
    """Two blocks of a dense and a MoE++ layer with grouped queries: every part of the cache."""
    c = tiny.config(
        **{"model.num_layers": 4, "model.moe_every": 2, "model.num_kv_heads": 2},
        **{"moe.dispatch": "dropless"},
    )
    model = model_lib.build(c)
    params = jax.jit(functools.partial(model_lib.init, model))(jax.random.key(0))
    return model, params, Generator(model, params)


@functools.cache
def without_cache(length=32):
    """Greedy text of one prompt by the forward pass of the whole text, again for each token."""
    model, params, _ = case()
    causal = jnp.tril(jnp.ones((1, length, length), bool))

    @jax.jit
    def best(tokens, place):
        out = model.apply({"params": params}, tokens[None], jnp.arange(length)[None], causal)
        return jnp.argmax(vocabulary.logits(params, out.hidden[0, place]))

    def generate(prompt, steps):
        text = list(prompt)
        for _ in range(steps):
            padded = np.zeros(length, np.int32)
            padded[: len(text)] = text
            text.append(int(best(padded, len(text) - 1)))
        return text[len(prompt) :]

    return generate


@pytest.mark.parametrize("name", reference.NAMES)
def test_the_authors_text_comes_out(name):
    config = reference.config(name)
    params = jax.tree.map(jnp.asarray, reference.params(name))
    want = reference.expected(name)
    prompts, whole = want["greedy_prompt"], want["greedy_tokens"]
    generate = Generator(model_lib.build(config, dispatch="dropless"), params)
    settings = dataclasses.replace(GREEDY, max_new_tokens=whole.shape[1] - prompts.shape[1])
    new = generate(prompts.tolist(), settings)
    np.testing.assert_array_equal(new, whole[:, prompts.shape[1] :])


def test_prompts_of_any_length_together_are_each_alone_without_a_cache():
    *_, generate = case()
    together = generate(PROMPTS, GREEDY)
    assert together == [without_cache()(prompt, 12) for prompt in PROMPTS]
    assert len({tuple(text) for text in together}) == 3


def test_the_end_token_ends_its_text_only_and_is_not_returned():
    *_, generate = case()
    texts = generate(PROMPTS, GREEDY)
    end = next(t for t in texts[0] if t not in texts[1])
    stopped = generate(PROMPTS, GREEDY, end)
    assert stopped[0] == texts[0][: texts[0].index(end)]
    assert stopped[1] == texts[1]
    seen = []
    alone = generate([PROMPTS[0]] * 3, GREEDY, end, on_token=seen.append)
    assert alone == [stopped[0]] * 3
    assert len(seen) == len(stopped[0]) + 1  # it does not go on after the last text has ended
    assert [tokens[0] for tokens in seen] == [*stopped[0], end]


def test_as_many_tokens_as_asked_for_and_a_function_compiled_once(monkeypatch):
    model, params, _ = case()
    traces = []
    logits = vocabulary.logits

    def counted(*args):
        traces.append(1)
        return logits(*args)

    monkeypatch.setattr(vocabulary, "logits", counted)
    generate = Generator(model, params)
    for count in (1, 2, 12, 16):
        settings = dataclasses.replace(GREEDY, max_new_tokens=count, seed=count)
        texts = generate(PROMPTS, settings)
        assert [len(text) for text in texts] == [count] * 3
        assert len(traces) == (1 if count == 1 else 2)  # prefill; decode
    generate([prompt[:2] for prompt in PROMPTS], GREEDY)  # other lengths, the same shapes
    assert len(traces) == 2


def test_a_seed_is_a_text():
    *_, generate = case()
    hot = dataclasses.replace(GREEDY, temperature=1e6)  # every token is equally likely
    first, again = generate(PROMPTS, hot), generate(PROMPTS, hot)
    assert first == again != generate(PROMPTS, dataclasses.replace(hot, seed=1))
    assert len({token for text in first for token in text}) > 24  # of 36: each drawn anew


def test_what_cannot_be_continued():
    *_, generate = case()
    assert generate([], GREEDY) == []
    with pytest.raises(ConfigError, match="prompt 1 is empty: give at least one token"):
        generate([[1], []], GREEDY)
    for ids in ([1, 384], [-1]):
        with pytest.raises(ConfigError, match="prompt 0 holds ids outside the vocabulary of 384"):
            generate([ids], GREEDY)


# Sampling


def drawn(probs, n=20_000, **settings):
    """Frequencies of n draws from logits whose softmax is probs."""
    sample = sampler(dataclasses.replace(GREEDY, **settings))
    logits = jnp.log(jnp.asarray(probs)) + 3.0
    tokens = sample(jnp.broadcast_to(logits, (n, len(probs))), jax.random.key(0))
    return np.bincount(tokens, minlength=len(probs)) / n


PROBS = [0.1, 0.5, 0.15, 0.25]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"temperature": 1.0}, PROBS),
        # p^2 over its sum, p^(1/2) over its sum
        ({"temperature": 0.5}, [0.01 / 0.345, 0.25 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345]),
        ({"temperature": 2.0}, [0.3162 / 1.9106, 0.7071 / 1.9106, 0.3873 / 1.9106, 0.5 / 1.9106]),
        ({"temperature": 1.0, "top_k": 1}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"temperature": 1.0, "top_k": 4}, PROBS),
        ({"temperature": 1.0, "top_k": 9}, PROBS),
        ({"temperature": 1.0, "top_p": 1e-6}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.49}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.7}, [0, 2 / 3, 0, 1 / 3]),
        ({"temperature": 1.0, "top_p": 0.85}, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
        ({"temperature": 1.0, "top_p": 0.95}, PROBS),
        # After the temperature: 0.725 of the mass is the best token's.
        ({"temperature": 0.5, "top_p": 0.7}, [0, 1, 0, 0]),
        # Of the three that top_k leaves, 5/9 is the best one's.
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.55}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.56}, [0, 2 / 3, 0, 1 / 3]),
    ],
)
def test_the_distribution_is_the_one_by_hand(settings, expected):
    expected = np.array(expected)
    frequencies = drawn(PROBS, **settings)
    assert (frequencies[expected == 0] == 0).all()  # never outside the allowed set
    np.testing.assert_allclose(frequencies, expected, atol=0.012)  # over 3 deviations


def test_rows_are_filtered_and_drawn_each_on_its_own():
    sample = sampler(dataclasses.replace(GREEDY, temperature=1.0, top_p=0.6))
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.05, 0.15, 0.8]] * 2000))
    tokens = np.asarray(sample(logits, jax.random.key(0))).reshape(-1, 2)
    assert set(tokens[:, 0]) == {0, 1} and set(tokens[:, 1]) == {2}
