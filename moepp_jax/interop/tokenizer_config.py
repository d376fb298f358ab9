"""A tokenizer's files as `transformers` reads them, and the ids that a config.json says."""

from __future__ import annotations

import json
from typing import Any

import sentencepiece

from moepp_jax.data import Tokenizer
from moepp_jax.special_tokens import SETTINGS

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space


def ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The ids of special tokens; without a tokenizer, those of one that we train."""
    bos, eos, pad = (1, 2, 0)
    if tokenizer is not None:
        bos, eos, pad = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}


def files(tokenizer: Tokenizer | None, length: int) -> dict[str, bytes]:
    """The tokenizer's files with a tokenizer_config.json, by name.

    A SentencePiece model that `transformers` would read otherwise than we do goes without. It knows
    BPE only in the class that is named here, and does not in all layouts put a space before a text,
    as models from elsewhere do.

    Args:
      length: of the sequences that the model was made for.
    """
    if tokenizer is None:
        return {}
    found = dict(tokenizer.files)
    if SETTINGS not in found:
        (model,) = found.values()
        settings = _settings(sentencepiece.SentencePieceProcessor(model_proto=model), length)
        if settings is not None:
            found[SETTINGS] = (json.dumps(settings, indent=2) + "\n").encode()
    return found


def _settings(model: sentencepiece.SentencePieceProcessor, length: int) -> dict[str, Any] | None:
    """Of a SentencePiece model. Texts get a BOS, as ours do for generation."""
    if not _is_bpe(model) or model.encode("a", out_type=str)[0].startswith(_SPACE):
        return None
    special = {
        "bos_token": model.bos_id(),
        "eos_token": model.eos_id(),
        "unk_token": model.unk_id(),
        "pad_token": model.pad_id(),
    }
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": model.bos_id() >= 0,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": length,
        **{name: model.id_to_piece(i) for name, i in special.items() if i >= 0},
    }


def _is_bpe(model: sentencepiece.SentencePieceProcessor) -> bool:
    """Scores of BPE are ranks, 0, -1, -2 ...; those of a unigram model are log-probabilities."""
    return all(model.get_score(i).is_integer() for i in range(model.vocab_size()))
