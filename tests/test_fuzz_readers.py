"""Readers of files from elsewhere against made-up bytes: the project's own error, or a result."""

import contextlib
import gzip
import json
import pickle
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moepp_jax import checksums, metrics, regular, special_tokens, workdir
from moepp_jax.checkpoint import CheckpointError
from moepp_jax.data import readers, records
from moepp_jax.data.pins import Pins
from moepp_jax.data.sentencepiece_file import SentencePieceFile
from moepp_jax.data.tokenizer import Tokenizer
from moepp_jax.data.tokenizer_json import TokenizerJson
from moepp_jax.errors import ConfigError
from moepp_jax.interop import safetensors_file, source
from tests import tiny, tokenizer_files

OWN = (ConfigError, CheckpointError)
MIB = 2**20

words = st.sampled_from(
    ["", "a", "../x", "/etc/passwd", "\0", "\x1b[2J", "</svg>", "<script>", "\ud800", "n" * 3000]
)
numbers = st.sampled_from([0, 1, -1, 2**31, 2**63, 10**12, 10**18, 10**400, 0.5, 1e308])
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


def content(fields) -> bytes:
    return json.dumps(fields).encode()


@st.composite
def changed(draw, fields):
    """A right JSON object with a field that is another, or gone, at some depth."""
    fields = json.loads(json.dumps(fields))
    place = fields
    while True:
        name = draw(st.sampled_from(sorted(place)))
        if isinstance(place[name], dict) and place[name] and draw(st.booleans()):
            place = place[name]
            continue
        if draw(st.booleans()):
            place[name] = draw(values)
        else:
            del place[name]
        return fields


@st.composite
def damaged(draw, whole: bytes):
    """Bytes that were right: cut, longer, flipped, others."""
    at = draw(st.integers(0, len(whole) - 1))
    how = draw(st.sampled_from(("cut", "flip", "insert", "twice", "bom", "deep", "junk")))
    match how:
        case "cut":
            return whole[:at]
        case "flip":
            return whole[:at] + bytes([whole[at] ^ draw(st.integers(1, 255))]) + whole[at + 1 :]
        case "insert":
            return whole[:at] + draw(st.binary(min_size=1, max_size=9)) + whole[at:]
        case "twice":
            return whole + whole
        case "bom":
            return b"\xef\xbb\xbf" + whole
        case "deep":
            return b"[" * 100_000
    return draw(st.binary(max_size=64))


RUN = json.loads(tiny.config().to_json())
ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
HEADER = {"a": ENTRY, "b": ENTRY | {"shape": [1], "data_offsets": [24, 28]}}
INDEX = {"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}
SUMS = {"params/a": ["0" * 32], "meta/metadata": "0" * 64}
PINS = {"tokenizer": "0", "sources": {"t": {"text": "t-1", "tokens": "u-1", "content": "0"}}}
SHARD = {"file": "x", "size": 1, "sha256": "0", "records": 1, "num_bytes": 1}
MANIFEST = {"files": {"x": {"size": 1, "sha256": ""}}, "shards": {"train": [SHARD]}}
ENDS = {"eos_token_id": [2, 3], "bos_token_id": 1, "temperature": 0.5}


def tensors(folder: Path, text: bytes) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(28))
    for entry in safetensors_file.entries(file).values():
        if entry.dtype in safetensors_file.TYPES.values():
            assert safetensors_file.read(file, entry).nbytes <= 28


def an_index(folder: Path, text: bytes) -> None:
    tensors(folder, content(HEADER))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(text)
    for tensor in source.open_tensors(folder).values():
        assert tensor.file.parent == folder


def sums(folder: Path, text: bytes) -> None:
    (folder / "params").mkdir(exist_ok=True)
    (folder / "params" / "a").write_bytes(b"a")
    (folder / "checksums.json").write_bytes(text)
    said = checksums.verdict(folder, ["params"], ["params"])
    assert said.damage or said.doubt  # none of these sums is right
    checksums.are_there(folder)
    with contextlib.suppress(regular.IrregularError):
        checksums.of_all(folder)


def pins(folder: Path, text: bytes) -> None:
    from moepp_jax import run_data

    (folder / "data.json").write_bytes(text)
    (folder / "config.json").write_text("{}")
    found = run_data._pins(folder)
    for pin in (found or Pins.parse(PINS)).sources.values():
        assert "/" not in pin.text + pin.tokens


def manifest(folder: Path, text: bytes) -> None:
    (folder / records._MANIFEST).write_bytes(text)
    for shard in records.shards(folder, "train"):
        assert "/" not in shard.file


def put(name: str, read):
    def reader(folder: Path, text: bytes) -> None:
        (folder / name).write_bytes(text)
        read(folder)

    return reader


def ends(folder: Path) -> None:
    file = folder / "generation_config.json"
    found = special_tokens.ends(special_tokens.of_file(file), {}, folder)
    special_tokens.require_below(found, 9, file)


READERS = {
    "a run's config.json": (RUN, put("config.json", workdir.read_config)),
    "config.json": (ENDS, put("config.json", source.read_config)),
    "generation_config.json": (ENDS, put("generation_config.json", ends)),
    "metrics.jsonl": ({"step": 1, "loss": 2.0}, put("metrics.jsonl", metrics.read_metrics)),
    "data.json": (PINS, pins),
    "checksums.json": (SUMS, sums),
    "manifest": (MANIFEST, manifest),
    "safetensors": (HEADER, tensors),
    "index": (INDEX, an_index),
}


def held(count: int):
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=count, deadline=None, derandomize=True, suppress_health_check=quiet
    )


def attempt(folder: Path, name: str, data) -> None:
    fields, read = READERS[name]
    own = folder / name.replace(" ", "_").replace("'", "")
    own.mkdir(exist_ok=True)
    for leftover in own.glob("*"):
        if leftover.is_file():
            leftover.unlink()
    text = data.draw(changed(fields).map(content) | damaged(content(fields)))
    try:
        read(own, text)
    except OWN as error:
        assert len(str(error)) < 20_000, text[:100]


@pytest.mark.parametrize("name", READERS)
def test_some_json(tmp_path, name):
    @given(st.data())
    @held(25)
    def run(data):
        attempt(tmp_path, name, data)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_much_json(tmp_path, name):
    @given(st.data())
    @held(2000)
    def run(data):
        attempt(tmp_path, name, data)

    run()


# --- text -----------------------------------------------------------------------------------------


def texts(file: Path) -> list[str]:
    pieces = readers.pieces(file, file.name, file.stat().st_size or 1)
    return [found.text for piece in pieces for found in readers.texts(piece, "text")]


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["one", "two", None] * 5}), sink)
    return sink.getvalue().to_pybytes()


TEXTS = {
    "a.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
    "a.json": b'[{"text": "one"}, {"text": "two"}]',
    "a.jsonl.gz": gzip.compress(b'{"text": "one"}\n' * 50),
    "a.jsonl.zst": zstd.compress(b'{"text": "one"}\n' * 50),
    "a.parquet": parquet(),
    "a.txt": "one\n\ntwo é\n".encode(),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("count", [25, pytest.param(2000, marks=pytest.mark.slow)])
def test_text(tmp_path, name, count):
    @given(damaged(TEXTS[name]))
    @held(count)
    def run(raw):
        (tmp_path / name).write_bytes(raw)
        with contextlib.suppress(ConfigError):
            texts(tmp_path / name)

    run()


# --- what takes memory, in a process of its own ---------------------------------------------------


def in_child(code: str, *arguments: object, limit: int = 6000) -> tuple[str, float]:
    """What it prints, and the MiB that it took more than before `code`."""
    program = """
    import os, resource, sys
    os.environ["JAX_PLATFORMS"] = "cpu"
    from pathlib import Path
    from moepp_jax.data import readers
    from moepp_jax.data.tokenizer import Tokenizer
    from moepp_jax.errors import ConfigError
    import pyarrow.parquet
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        exec(sys.argv[1])
    except ConfigError as error:
        print("refused:", str(error)[:500].replace(chr(10), " "))
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    """

    def limited():
        resource.setrlimit(resource.RLIMIT_AS, (limit * MIB, limit * MIB))

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=limited,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *said, took = done.stdout.splitlines()
    return "\n".join(said), float(took)


READ = """
file = Path(sys.argv[2])
print(sum(len(t.text) for p in readers.pieces(file, "f", 10**9) for t in readers.texts(p, "text")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt"])
def test_a_line_of_500_megabytes(tmp_path, name):
    """Of compressed ones, a file of half a megabyte."""
    line = b'{"text": "' + b"a" * (500 * MIB) + b'"}\n'
    packed = {".gz": lambda b: gzip.compress(b, 1), ".zst": zstd.compress}
    (tmp_path / name).write_bytes(packed.get(Path(name).suffix, bytes)(line))
    said, took = in_child(READ, tmp_path / name)
    assert said.startswith("refused:") and "longer than the" in said
    assert took < 700


@pytest.mark.slow
def test_a_table_of_many_times_its_size(tmp_path):
    """A thousand rows of a megabyte, stored once."""
    table = pa.table({"text": pa.array(["a" * MIB] * 1000)})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    del table
    assert (tmp_path / "a.parquet").stat().st_size < 4 * MIB
    said, took = in_child(READ, tmp_path / "a.parquet")
    assert said == str(1000 * MIB) and took < 1500


def test_extension_types_hold_no_code(tmp_path):
    """Some versions of Arrow would have unpickled what a file says of its types."""
    code = pickle.dumps(_Owned(tmp_path / "owned"))
    about = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": code}
    field = pa.field("text", pa.string(), metadata=about)
    table = pa.table([pa.array(["one"])], schema=pa.schema([field]))
    pq.write_table(table, tmp_path / "a.parquet")
    with contextlib.suppress(ConfigError):
        texts(tmp_path / "a.parquet")
    assert not (tmp_path / "owned").exists()


class _Owned:
    def __init__(self, file: Path):
        self._file = file

    def __reduce__(self):
        return (Path.touch, (self._file,))


# --- tokenizers -----------------------------------------------------------------------------------


def used(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("of a bee <0x41> </s>")
    tokenizer.decode(ids)
    for i in [*ids, 0, tokenizer.vocab_size - 1]:
        tokenizer.piece(i)
    np.asarray(tokenizer.surplus(10))


def tokenizer_texts() -> dict[str, dict]:
    return {family: json.loads(tokenizer_files.trained(family)) for family in ("olmoe", "mixtral")}


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
@pytest.mark.parametrize("count", [15, pytest.param(1000, marks=pytest.mark.slow)])
def test_tokenizer_json(family, count):
    whole = tokenizer_texts()[family]
    ends = {"eos_token": tokenizer_files.SPECIAL[family][-1]}
    beside = {"tokenizer_config.json": content(ends)}
    # Their model is most of the file, and words of its vocabulary say nothing new.
    small = whole | {"model": whole["model"] | {"vocab": {}, "merges": []}}

    @given(st.one_of(changed(whole), changed(small)).map(content) | damaged(content(whole)))
    @held(count)
    def run(raw):
        with contextlib.suppress(ConfigError):
            used(Tokenizer(TokenizerJson(raw, beside)))

    run()


def sentencepiece_model() -> bytes:
    return (Path(__file__).parent / "data" / "before_rules" / "tokenizer.model").read_bytes()


def test_a_piece_that_is_no_text():
    raw = sentencepiece_model().replace(b"<0x01>", b"\xbc0x01>")
    with pytest.raises(ConfigError, match="is not a SentencePiece"):
        SentencePieceFile(raw)


@pytest.mark.parametrize("count", [25, pytest.param(2000, marks=pytest.mark.slow)])
def test_sentencepiece(count):
    whole = sentencepiece_model()

    @given(damaged(whole))
    @held(count)
    def run(raw):
        with contextlib.suppress(ConfigError):
            used(Tokenizer(SentencePieceFile(raw)))

    run()
