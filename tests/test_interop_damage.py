"""Damaged checkpoints, at random: each is converted as it is, or refused in one clear line."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from moepp_jax import interop
from moepp_jax.interop import ConversionError
from tests import checkpoints

SILENT = {"report": lambda line: None}
SMALL = {
    "num_experts": [6],
    "moe_2layer_gate": False,
    "moe_use_mixtral_gating": False,
    "vocab_size": 5,
    "hidden_size": 8,
    "intermediate_size": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
VALUES = [None, -1, 0, 3, 10**30, 1.5, float("nan"), "8", "", True, [], [None], [10**9], {}]
VALUES += [{"type": "dynamic", "factor": 2.0}, {"factor": 2.0}]


def one(rng, choices):
    choices = [*choices]
    return choices[rng.integers(len(choices))]


# Each says what it did.


def a_field(rng, folder):
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    name, value = one(rng, sorted(fields)), one(rng, [*VALUES, "gone"])
    fields[name] = value
    if value == "gone":
        del fields[name]
    file.write_text(json.dumps(fields))
    return f"{name} = {value!r}"


def text(rng, folder):
    file = one(rng, sorted(folder.glob("*.json")))
    was = file.read_text()
    strange = (
        "[]",
        "null",
        "[" * 100_000,
        "\ufeff" + was,
        was + was,
        was[: rng.integers(len(was))],
    )
    file.write_text(one(rng, strange))
    return f"{file.name} is {file.read_text()[:40]}"


def a_file(rng, folder):
    file = one(rng, sorted(folder.iterdir()))
    data = bytearray(file.read_bytes())
    kind = rng.integers(6)
    if kind == 0:
        file.rename(folder / f"old_{file.name}")
    elif kind == 1:
        file.unlink()
        file.mkdir()
    elif kind == 2:
        file.write_bytes(data[: rng.integers(len(data))])
    elif kind == 3:
        file.write_bytes(data + rng.bytes(3))
    elif kind == 4:
        file.write_bytes(rng.bytes(100))
    else:
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        file.write_bytes(data)
    return f"{file.name}, {('renamed', 'folder', 'cut', 'longer', 'random', 'flipped')[kind]}"


def a_header(rng, folder):
    file = one(rng, sorted(folder.glob("*.safetensors")))
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name, other = (one(rng, sorted(header.keys() - {"__metadata__"})) for _ in range(2))
    entry, kind = header[name], rng.integers(6)
    if kind == 0:
        entry["dtype"] = one(rng, ("F64", "I16", "F32", "BF16", "X", 3, None, []))
    elif kind == 1:
        entry["shape"] = one(
            rng, ([], [0], entry["shape"][::-1], [-8], [8.0], ["8"], None, [2**62])
        )
    elif kind == 2:
        offsets = ([0], [0, 0], [-8, 8], [0.0, 1.0], [0, 10**18], header[other]["data_offsets"])
        entry["data_offsets"] = one(rng, offsets)
    elif kind == 3:
        header[f"{name}x"] = header.pop(name)
    elif kind == 4:
        header[name] = one(rng, (None, 3, [], {}))
    else:
        del header[name]
    written = json.dumps(header).encode()
    file.write_bytes(len(written).to_bytes(8, "little") + written + data[8 + size :])
    return f"{name} of {file.name}: {header.get(name)}"


def an_index(rng, folder):
    file = folder / "model.safetensors.index.json"
    if not file.exists():
        return a_file(rng, folder)
    index = json.loads(file.read_text())
    name, other = (one(rng, sorted(index["weight_map"])) for _ in range(2))
    places = ("/etc/passwd", "../x", "", "..", 3, None, "gone", "a\0b", "x" * 5000, "\ud800")
    index["weight_map"][name] = one(rng, (*places, index["weight_map"][other]))
    file.write_text(json.dumps(index))
    return f"{name} in {index['weight_map'][name]!r:.40}"


def a_value(rng, folder):
    file = one(rng, sorted(folder.glob("*.safetensors")))
    tensors = load_file(file)
    name = one(rng, sorted(tensors))
    tensors[name] = tensors[name].copy()
    tensors[name].flat[rng.integers(tensors[name].size)] = one(rng, (np.nan, np.inf))
    save_file(tensors, file)
    return f"{name} is not finite"


DAMAGES = (a_field, a_field, text, a_file, a_header, a_header, an_index, a_value)


def as_safetensors_reads_it(folder: Path):
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    files = set(json.loads(index.read_text())["weight_map"].values())
    return {name: a for file in files for name, a in load_file(folder / file).items()}


def attempt(folder: Path, seed: int) -> bool:
    """Whether the damaged checkpoint was converted."""
    folder.mkdir()
    rng = np.random.default_rng([1, seed])
    source, run = folder / "source", folder / "run"
    checkpoints.make(0, source, length=4, new=1, **SMALL)
    (source / "expected.npz").unlink()
    what = one(rng, DAMAGES)(rng, source)
    try:
        interop.from_hf(source, run, **SILENT)
    except ConversionError as error:
        said = str(error)
        assert str(folder) in said and "\n" not in said and len(said) < 1000, what
        assert [path.name for path in folder.iterdir()] == ["source"], what
        return False
    try:
        want = as_safetensors_reads_it(source)
    except (SafetensorError, OSError) as error:
        raise AssertionError(f"{what} was converted, and safetensors says: {error}") from error
    interop.to_hf(run, folder / "back", **SILENT)
    back = as_safetensors_reads_it(folder / "back")
    assert back.keys() == want.keys(), what
    assert all(np.array_equal(back[name], want[name]) for name in want), what
    return True


def test_some(tmp_path):
    assert not any(attempt(tmp_path / str(seed), seed) for seed in REFUSED)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_many(tmp_path, block):
    converted = [attempt(tmp_path / str(i), 100 * block + i) for i in range(100)]
    assert 0 < sum(converted) < 50


# Seeds of quick tests: each is refused, for a reason of its own.
REFUSED = (
    0,
    1,
    2,
    3,
    5,
    6,
    7,
    8,
    9,
    10,
    12,
    17,
    23,
    29,
    33,
    43,
    48,
    59,
    60,
    65,
    66,
    74,
    75,
    78,
    84,
    118,
)
