"""Checkpoints in the released layout for tests to change, and to be refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moepp_jax import interop
from moepp_jax.interop import ConversionError
from tests import reference

SILENT = {"report": lambda line: None}
NORM = "model.norm.weight"


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    return {n: a for f in folder.glob("*.safetensors") for n, a in load_file(f).items()}


def fields_in(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def checkpoint(folder: Path, tensors=None, **changes) -> Path:
    """The reference with little in it, in one file; other tensors (None: without it) or fields."""
    folder.mkdir()
    fields = fields_in(reference.ROOT / "mixtral_gating") | changes
    (folder / "config.json").write_text(json.dumps(fields))
    wanted = tensors_in(reference.ROOT / "mixtral_gating") | (tensors or {})
    save_file({n: a for n, a in wanted.items() if a is not None}, folder / "x")
    (folder / "x").rename(folder / "model.safetensors")
    return folder


def same_bytes(a, b) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes()
        for n in a
    )


def refused(source: Path, folder: Path, said: str) -> None:
    there = {*folder.iterdir()}
    with pytest.raises(ConversionError, match=said) as caught:
        interop.from_hf(source, folder / "run", **SILENT)
    assert str(folder) in str(caught.value)
    assert {*folder.iterdir()} == there
