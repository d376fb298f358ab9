"""A tokenizer_config.json by which `transformers` reads a SentencePiece model as we do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sentencepiece

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space


def settings(file: Path, length: int) -> dict[str, Any] | None:
    """The fields; None for a model that `transformers` would read otherwise.

    It knows BPE only in the class that is named here, and does not in all layouts put a space
    before a text, as models from elsewhere do. Texts get a BOS, as ours do for generation.

    Args:
      length: of the sequences that the model was made for.
    """
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
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
        "add_bos_token": True,
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
