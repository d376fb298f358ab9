"""Generation that ends at a piece of text, as requests of the harness ask for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from moepp_jax.config import Config, GenerateConfig
from moepp_jax.data import Tokenizer
from moepp_jax.errors import ConfigError
from moepp_jax.generation import Generator, Reader


def settings_of(
    asked: Mapping[str, Any], config: Config, max_length: int
) -> tuple[GenerateConfig, list[str]]:
    """The settings, and the texts that end it.

    Args:
      asked: the harness's keywords, normalised by it.
      max_length: tokens that the model sees.

    Raises:
      ConfigError: a keyword is not known here, or no room is left for a prompt.
    """
    asked = dict(asked)
    stops = [stop for stop in asked.pop("until") if stop]
    settings = {
        "max_new_tokens": asked.pop("max_gen_toks"),
        "temperature": float(asked.pop("temperature", 0.0)),
        "top_k": int(asked.pop("top_k", 0)),
        "top_p": float(asked.pop("top_p", 1.0)),
        "min_p": float(asked.pop("min_p", 0.0)),
        "repetition_penalty": float(asked.pop("repetition_penalty", 1.0)),
        "seed": int(asked.pop("seed", config.generate.seed)),
    }
    if (beams := asked.pop("num_beams", 1)) != 1:
        raise ConfigError(f"generation_kwargs num_beams = {beams}: moepp_jax has no beams but one")
    if not asked.pop("do_sample"):
        settings["temperature"] = 0.0
    if asked:
        raise ConfigError(
            f"generation_kwargs {', '.join(sorted(asked))}: moepp_jax knows until, max_gen_toks, "
            "do_sample, temperature, top_k, top_p, min_p, repetition_penalty, seed and num_beams: 1"
        )
    if settings["max_new_tokens"] >= max_length:
        raise ConfigError(
            f"max_gen_toks = {settings['max_new_tokens']} leaves no room for a prompt: the model "
            f"sees {max_length} tokens"
        )
    return config.replace("generate", **settings).generate, stops


def generate_until(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: GenerateConfig,
    stops: Sequence[str],
    ends: Collection[int] = (),
) -> list[str]:
    """New text of every prompt, up to the first stop, the end of the text or max_new_tokens.

    Args:
      ends: tokens that end a text beside the tokenizer's.
    """
    readers = [Reader(tokenizer, prompt, stops) for prompt in prompts]
    generator(prompts, settings, {tokenizer.eos_id, *ends}, watch=readers)
    for reader in readers:
        reader.close()
    return [reader.text for reader in readers]
