"""Tiny checkpoints of other families, as their classes save them, and changed ones."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests import tokenizer_files

ROOT = Path(__file__).parent / "data" / "upcycle"


def fields_in(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    return {n: a for f in folder.glob("*.safetensors") for n, a in load_file(f).items()}


def checkpoint(folder: Path, name: str = "mixtral", tensors=None, **changes) -> Path:
    """A committed one in one file, with other tensors (None: without it) or fields."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields_in(ROOT / name) | changes))
    wanted = tensors_in(ROOT / name) | (tensors or {})
    save_file({n: a for n, a in wanted.items() if a is not None}, folder / "model.safetensors")
    return folder


def with_rows(folder: Path, rows: int, name: str = "mixtral", **changes) -> Path:
    """A committed one with so many rows in its embedding."""
    rng = np.random.default_rng(0)
    shape = (rows, fields_in(ROOT / name)["hidden_size"])
    names = ("model.embed_tokens.weight", "lm_head.weight")
    tensors = {n: rng.normal(0, 0.2, shape).astype(np.float32) for n in names}
    return checkpoint(folder, name, tensors, vocab_size=rows, **changes)


def whole(folder: Path, family: str, rows: int = 512) -> Path:
    """OLMoE or Qwen3-MoE with its tokenizer.json alone, and more rows than that has pieces.

    As published, config.json names a BOS that no text gets.
    """
    end = {"olmoe": 482, "qwen3_moe": 480}[family]
    with_rows(folder, rows, family, eos_token_id=end, bos_token_id=end)
    (folder / "tokenizer.json").write_text(tokenizer_files.trained(family), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 481]}))
    return folder
