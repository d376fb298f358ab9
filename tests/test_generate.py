"""Text from the cache is text from the whole model, whatever else is in the batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax import model as model_lib
from moepp_jax import vocabulary
from moepp_jax.errors import ConfigError
from moepp_jax.generation import Generator
from tests import reference, tiny

GREEDY = tiny.config(**{"generate.max_new_tokens": 12}).generate
WARM = dataclasses.replace(GREEDY, temperature=0.9, top_k=50, repetition_penalty=1.1, seed=3)
PROMPTS = [[5, 6, 7], [300, 20, 10, 4, 4, 4, 9, 8, 31], [17] * 13 + [18, 19]]


@functools.cache
def case():
    """Two blocks of a dense and a MoE++ layer with grouped queries: every part of the cache."""
    c = tiny.config(
        **{"model.num_layers": 4, "model.moe_every": 2, "model.num_kv_heads": 2},
        **{"moe.dispatch": "dropless", "moe.n_ffn": 4},
    )
    model = model_lib.build(c)
    params = jax.jit(model.init)(jax.random.key(0))
    # Caches that 12 new tokens outgrow: all texts here go on in a larger one.
    return model, params, Generator(model, params, least_places=16)


@functools.cache
def without_cache(length=32):
    """Greedy text of one prompt by the forward pass of the whole text, again for each token."""
    model, params, _ = case()
    one_document = jnp.zeros((1, length), jnp.int32)

    @jax.jit
    def best(tokens, place):
        out = model(params, tokens[None], jnp.arange(length)[None], one_document)
        return jnp.argmax(vocabulary.logits(out.matrix, out.hidden[0, place]))

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
    ends = [end, texts[1][5]]
    assert generate(PROMPTS, GREEDY, ends)[1] == texts[1][: texts[1].index(texts[1][5])]


def test_texts_have_limits_and_watchers_of_their_own():
    *_, generate = case()
    whole = generate(PROMPTS, GREEDY)
    assert generate(PROMPTS, GREEDY, limits=[3, 12, 1]) == [whole[0][:3], whole[1], whole[2][:1]]
    heard = []

    def ends_with_the_fourth(token):
        heard.append(token)
        return len(heard) == 4

    watch = [lambda token: False, ends_with_the_fourth, lambda token: True]
    assert generate(PROMPTS, GREEDY, watch=watch) == [whole[0], whole[1][:4], whole[2][:1]]
    assert heard == whole[1][:4]  # and is not called again


def test_the_stream_is_the_text_in_pieces():
    *_, generate = case()
    pieces = list(generate.stream(PROMPTS, GREEDY))
    assert len(pieces) > 2 and [len(tokens) for tokens in pieces[0]] == [1, 1, 1]
    joined = [[token for piece in pieces for token in piece[i]] for i in range(3)]
    assert joined == generate(PROMPTS, GREEDY)


def test_programs_are_compiled_once_for_a_size():
    *_, generate = case()
    generate(PROMPTS, GREEDY)
    for count in (1, 5, 16):  # 3 prompts are 4 rows
        settings = dataclasses.replace(GREEDY, max_new_tokens=count, seed=count)
        texts = generate([*PROMPTS, [7] * count][: 3 + count % 2], settings)
        assert [len(text) for text in texts] == [count] * len(texts)
        assert generate.speed.programs == 0 and generate.speed.compile_seconds == 0


def test_values_of_rules_are_not_compiled():
    *_, generate = case()
    generate(PROMPTS, WARM)
    generate(PROMPTS, dataclasses.replace(WARM, temperature=0.8, top_k=9))
    assert generate.speed.programs == 0


def test_a_full_cache_goes_on_in_a_larger_one():
    *_, generate = case()
    long = dataclasses.replace(GREEDY, max_new_tokens=40)
    (text,) = generate(PROMPTS[:1], long)
    assert text == without_cache(64)(PROMPTS[0], 40)
    kinds = [name[0] for name in generate._programs.compiled if 32 in name[1] or 64 in name[1]]
    assert kinds.count("grow") == 1
    assert generate.speed.decode_steps == 39


def test_a_cache_is_updated_where_it_is():
    """A copy of one layer's keys alone would show among the temporary arrays."""
    model, params, _ = case()
    generate = Generator(model, params, least_places=4096)
    generate(PROMPTS[:1], dataclasses.replace(GREEDY, max_new_tokens=2))
    assert generate.speed.programs == 2 and generate.speed.compile_seconds > 0.05
    (memory,) = (
        program.memory_analysis()
        for name, program in generate._programs.compiled.items()
        if name[0] == "decode"
    )
    c = model.config
    keys = 4 * 4096 * c.num_kv_heads * c.head_width
    assert memory.alias_size_in_bytes >= 2 * c.num_layers * keys
    assert memory.temp_size_in_bytes < keys


# Drawing


def test_a_seed_is_a_text():
    *_, generate = case()
    hot = dataclasses.replace(WARM, temperature=1e6, top_k=384)  # every token is equally likely
    first, again = generate(PROMPTS, hot), generate(PROMPTS, hot)
    assert first == again != generate(PROMPTS, dataclasses.replace(hot, seed=1))
    assert len({token for text in first for token in text}) > 24  # of 36: each drawn anew


def test_a_text_is_the_same_in_any_company():
    *_, generate = case()
    texts = generate(PROMPTS, WARM)
    assert generate(PROMPTS[::-1], WARM) == texts[::-1]
    assert generate([PROMPTS[1]], WARM) == [texts[1]]
    assert generate([*PROMPTS, PROMPTS[0]], WARM) == [*texts, texts[0]]
    samples = generate([PROMPTS[0]] * 3, WARM, samples=[1, 0, 2])
    assert samples[1] == texts[0] and len({tuple(s) for s in samples}) == 3
    assert generate([PROMPTS[0]], WARM, samples=[2]) == [samples[2]]


def test_a_repeated_token_is_penalised():
    *_, generate = case()
    never = dataclasses.replace(WARM, top_k=1, repetition_penalty=1e6)
    for prompt, text in zip(PROMPTS, generate(PROMPTS, never), strict=True):
        assert len({*prompt, *text}) == len(set(prompt)) + 12
    assert any(len(set(text)) < 12 for text in generate(PROMPTS, GREEDY))


def test_what_was_done_is_told():
    *_, generate = case()
    generate(PROMPTS, GREEDY)
    speed = generate.speed
    assert (speed.prompt_tokens, speed.decoded_tokens, speed.decode_steps) == (27, 33, 11)
    assert 0 < speed.ffn_experts_per_token <= 2
    assert speed.ffn_experts_per_token / 4 <= speed.experts_read_per_step <= 4
    assert "27 in" in str(speed) and "33 in" in str(speed)


def test_what_cannot_be_continued():
    *_, generate = case()
    assert generate([], GREEDY) == []
    with pytest.raises(ConfigError, match="prompt 1 is empty: give at least one token"):
        generate([[1], []], GREEDY)
    for ids in ([1, 384], [-1]):
        with pytest.raises(ConfigError, match="prompt 0 holds ids outside the vocabulary of 384"):
            generate([ids], GREEDY)
    with pytest.raises(ConfigError, match="limit 1 = 0 must be at least 1 new token"):
        generate([[1], [1]], GREEDY, limits=[1, 0])
