"""Readers of files from elsewhere against made-up bytes: the project's own error, or a result."""

import bz2
import contextlib
import functools
import gzip
import itertools
import json
import lzma
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moepp_jax import checksums, metrics, regular, special_tokens, workdir
from moepp_jax.checkpoint import CheckpointError, Checkpoints
from moepp_jax.data import readers, records
from moepp_jax.data.pins import Pins
from moepp_jax.data.prepare import prepare_sources
from moepp_jax.data.sentencepiece_file import SentencePieceFile
from moepp_jax.data.tokenizer import Tokenizer
from moepp_jax.data.tokenizer_json import TokenizerJson
from moepp_jax.data.tokens import TokenDocuments
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


# Numbers of 32 bits that lie, as binary formats have them.
sizes = st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31), 2**20, 2**30]).map(
    lambda n: n.to_bytes(4, "little", signed=True)
)


@st.composite
def damaged(draw, whole: bytes):
    """Bytes that were right: cut, longer, flipped, others."""
    at = draw(st.integers(0, len(whole) - 1))
    how = draw(st.sampled_from(("cut", "flip", "size", "insert", "twice", "bom", "deep", "junk")))
    match how:
        case "cut":
            return whole[:at]
        case "flip":
            return whole[:at] + bytes([whole[at] ^ draw(st.integers(1, 255))]) + whole[at + 1 :]
        case "size":
            return whole[:at] + draw(sizes) + whole[at + 4 :]
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


def empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def attempt(folder: Path, name: str, raw: bytes) -> None:
    """Gives these bytes to a reader: an error of the project's own, or a result that may be.

    Raises:
      AssertionError: the result may not be.
      Exception: any other error.
    """
    try:
        every()[name].read(empty(folder / "read"), raw)
    except OWN as error:
        assert len(str(error)) < 20_000, raw[:100]


class Property(NamedTuple):
    """Attributes:
    inputs: bytes that are tried.
    read: gives some to the reader, in an empty folder.
    """

    inputs: st.SearchStrategy[bytes]
    read: Callable[[Path, bytes], object]


@functools.cache
def every() -> dict[str, Property]:
    """Each reader's property, by its name."""
    found = {}
    for name, (fields, read) in READERS.items():
        found[name] = Property(changed(fields).map(content) | damaged(content(fields)), read)
    for name, whole in TEXTS.items():
        found[name] = Property(damaged(whole), functools.partial(text, name))
    for family in FAMILIES:
        found[f"tokenizer.json of {family}"] = tokenizer_json(family)
    found["tokenizer.model"] = Property(damaged(sentencepiece_model()), a_tokenizer_model)
    for name, make in FOLDERS.items():
        found[name] = make()
    return found


def try_some(folder: Path, name: str, count: int) -> None:
    @given(every()[name].inputs)
    @held(count)
    def run(raw):
        attempt(folder, name, raw)

    run()


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("count", [25, pytest.param(2000, marks=pytest.mark.slow)])
def test_json(tmp_path, name, count):
    try_some(tmp_path, name, count)


# --- text -----------------------------------------------------------------------------------------


def texts(file: Path) -> list[str]:
    pieces = readers.pieces(file, file.name, file.stat().st_size or 1)
    return [found.text for piece in pieces for found in readers.texts(piece, "text")]


def parquet(**options) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["one", "two", None] * 5}), sink, **options)
    return sink.getvalue().to_pybytes()


def arrow(kind, make=pa.ipc.new_stream, compression=None) -> bytes:
    table = pa.table({"n": range(15), "text": pa.array(["one", "two" * 20, None] * 5, kind)})
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with make(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=4)
    return sink.getvalue().to_pybytes()


LINES = b'{"text": "one"}\n' * 50
TEXTS = {
    "a.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
    "a.json": b'[{"text": "one"}, {"text": "two"}]',
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.jsonl.xz": lzma.compress(LINES),
    "a.jsonl.zst": zstd.compress(LINES),
    "a.parquet": parquet(),
    "plain.parquet": parquet(use_dictionary=False, compression="none", write_page_checksum=True),
    "delta.parquet": parquet(
        use_dictionary=False,
        column_encoding={"text": "DELTA_BYTE_ARRAY"},
        compression="zstd",
        data_page_version="2.0",
    ),
    "a.arrow": arrow(pa.string()),
    "zstd.arrow": arrow(pa.large_string(), compression="zstd"),
    "view.arrow": arrow(pa.string_view(), compression="lz4"),
    "dictionary.arrow": arrow(pa.dictionary(pa.int32(), pa.string()), compression="zstd"),
    "file.arrow": arrow(pa.string(), pa.ipc.new_file, "lz4"),
    "a.txt": "one\n\ntwo é\n".encode(),
}

# These formats have sums: what is read to the end is what was packed.
SUMMED = {".gz", ".bz2", ".xz"}


def text(name: str, folder: Path, raw: bytes) -> None:
    (folder / name).write_bytes(raw)
    found = texts(folder / name)
    assert Path(name).suffix not in SUMMED or set(found) <= {"one"}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("count", [25, pytest.param(2000, marks=pytest.mark.slow)])
def test_text(tmp_path, name, count):
    try_some(tmp_path, name, count)


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


def bomb(file: Path, rows: int, **options) -> Path:
    """Ten million bytes a row, of which 20 kB are left."""
    table = pa.table({"text": [chr(97 + i % 26) * (10_000_000 + i) for i in range(rows)]})
    if file.suffix == ".parquet":
        pq.write_table(table, file, compression="zstd", **options)
    else:
        packed = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_stream(file, table.schema, options=packed) as writer:
            writer.write_table(table)
    assert file.stat().st_size < 40_000
    return file


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_60_rows_of_10_megabytes_unpacked_at_once(tmp_path, name):
    [file] = kept(name).glob("bomb-60x10MB")
    said, took = in_child(READ, shutil.copy(file, tmp_path / name))
    assert said.startswith("refused:") and "unpack" in said and "of fewer rows" in said
    assert took < 100


ONE_DICTIONARY = {"dictionary_pagesize_limit": 2**30}
DELTA = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        ("a.arrow", {}, 700),
        ("plain.parquet", {"use_dictionary": False}, 800),
        ("dictionary.parquet", ONE_DICTIONARY, 1300),
        ("delta.parquet", DELTA, 1300),
        ("pages.parquet", {"use_dictionary": False, "write_batch_size": 1}, 200),
    ],
)
def test_50_rows_of_10_megabytes_unpacked_at_once(tmp_path, name, options, most):
    """As much as may be."""
    said, took = in_child(READ, bomb(tmp_path / name, 50, **options))
    assert said == str(sum(10_000_000 + i for i in range(50)))
    assert took < most


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.arrow", "a.parquet"])
def test_the_longest_rows_of_the_widest_characters(tmp_path, name):
    """What docs/DATA.md says that a process takes at most."""
    rows = [chr(0x1F600 + i) + "a" * (readers.opening.LONGEST - 8) for i in range(3)]
    table = pa.table({"text": rows})
    size = sum(map(len, rows))
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name, compression="zstd", **ONE_DICTIONARY)
    else:
        packed = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_stream(tmp_path / name, table.schema, options=packed) as writer:
            writer.write_table(table)
    del rows, table
    said, took = in_child(READ, tmp_path / name)
    assert said == str(size) and took < 2500


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["zstd", "snappy"])
def test_a_row_group_of_300_megabytes(tmp_path, codec):
    letters = np.random.default_rng(0).bytes(150_000_000).hex()
    texts = [letters[i : i + 2000] for i in range(0, len(letters), 2000)]
    del letters
    table = pa.table({"text": texts})
    pq.write_table(table, tmp_path / "a.parquet", compression=codec, row_group_size=10**6)
    size = sum(map(len, texts))
    del table, texts
    said, took = in_child(READ, tmp_path / "a.parquet")
    assert said == str(size) == str(3 * 10**8)
    assert took < 100


@pytest.mark.slow
def test_a_table_of_many_times_its_size(tmp_path):
    """A thousand rows of a megabyte, stored once."""
    table = pa.table({"text": pa.array(["a" * MIB] * 1000)})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    del table
    assert (tmp_path / "a.parquet").stat().st_size < 4 * MIB
    said, took = in_child(READ, tmp_path / "a.parquet")
    assert said == str(1000 * MIB) and took < 200


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


FAMILIES = ("olmoe", "mixtral")


def tokenizer_json(family: str) -> Property:
    whole = json.loads(tokenizer_files.trained(family))
    beside = {"tokenizer_config.json": content({"eos_token": tokenizer_files.SPECIAL[family][-1]})}
    # Their model is most of the file, and words of its vocabulary say nothing new.
    small = whole | {"model": whole["model"] | {"vocab": {}, "merges": []}}
    return Property(
        st.one_of(changed(whole), changed(small)).map(content) | damaged(content(whole)),
        lambda folder, raw: used(Tokenizer(TokenizerJson(raw, beside))),
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [15, pytest.param(1000, marks=pytest.mark.slow)])
def test_tokenizer_json(tmp_path, family, count):
    try_some(tmp_path, f"tokenizer.json of {family}", count)


def sentencepiece_model() -> bytes:
    return (Path(__file__).parent / "data" / "before_rules" / "tokenizer.model").read_bytes()


def test_a_piece_that_is_no_text():
    raw = sentencepiece_model().replace(b"<0x01>", b"\xbc0x01>")
    with pytest.raises(ConfigError, match="is not a SentencePiece"):
        SentencePieceFile(raw)


def a_tokenizer_model(folder: Path, raw: bytes) -> None:
    used(Tokenizer(SentencePieceFile(raw)))


@pytest.mark.parametrize("count", [25, pytest.param(2000, marks=pytest.mark.slow)])
def test_sentencepiece(tmp_path, count):
    try_some(tmp_path, "tokenizer.model", count)


# --- folders: one file of them is another ---------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


@st.composite
def one_changed(draw, whole: dict[str, bytes]):
    """A file's name, a line end, and what it holds instead."""
    name = draw(st.sampled_from(sorted(whole)))
    old = whole[name]
    other = damaged(old)
    if name.endswith(".json"):
        other |= changed(json.loads(old)).map(content)
    return name.encode() + b"\n" + draw(other)


def put_folder(folder: Path, whole: dict[str, bytes], raw: bytes) -> Path:
    """The folder with the one file that `raw` is of; returns that."""
    name, _, instead = raw.partition(b"\n")
    for known, content in (whole | {name.decode(): instead}).items():
        file = folder / known
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder / name.decode()


@functools.cache
def prepared() -> dict[str, dict[str, bytes]]:
    """The files of a text data set and of a token data set."""
    with tempfile.TemporaryDirectory() as folder:
        c = tiny.config(**{"data.dir": folder})
        made = prepare_sources(c, lambda line: None, workers=1)
        tokens = made.tokens["text"]
        [text] = Path(folder).glob("text-*")
        return {"text": files_of(text), "tokens": files_of(tokens)}


def of_text(folder: Path) -> list[bytes]:
    shards = [shard for split in records.SPLITS for shard in records.shards(folder, split)]
    return [record for shard in shards for record in records.read_shard(folder, shard)]


def of_tokens(folder: Path) -> list[bytes]:
    splits = [TokenDocuments(folder, split) for split in records.SPLITS]
    return [document.tobytes() for split in splits for document in split]


def prepared_data(kind: str, read: Callable[[Path], list[bytes]]) -> Property:
    """An error, or just what was written; of another manifest, which has no sum, what it says."""
    whole = prepared()[kind]
    with tempfile.TemporaryDirectory() as folder:
        put_folder(Path(folder), whole, b"manifest.json\n" + whole["manifest.json"])
        right = read(Path(folder))

    def reader(folder: Path, raw: bytes) -> None:
        file = put_folder(folder, whole, raw)
        assert read(folder) == right or file.name == "manifest.json"

    return Property(one_changed(whole), reader)


def array_records() -> Property:
    """Shards of which the manifest says what is right of them now: any result will do."""
    whole = prepared()["text"]
    shards = {name: content for name, content in whole.items() if "array_record-" in name}

    def reader(folder: Path, raw: bytes) -> None:
        file = put_folder(folder, whole, raw)
        manifest = json.loads(whole["manifest.json"])
        for shard in itertools.chain.from_iterable(manifest["shards"].values()):
            shard["size"] = (folder / shard["file"]).stat().st_size
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert file.is_file()
        of_text(folder)

    return Property(one_changed(shards), reader)


STATE = {"params": {"a": np.arange(600, dtype=np.float32)}, "opt_state": {"n": np.int32(7)}}


@functools.cache
def a_checkpoint() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        with Checkpoints(folder, 1) as checkpoints:
            checkpoints.save(3, jax.tree.map(jax.numpy.asarray, STATE))
        return files_of(Path(folder))


def restored(folder: Path) -> dict:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), STATE
    )
    with Checkpoints(folder, 1) as checkpoints:
        checkpoints.latest_intact_step(lambda line: None)
        return checkpoints.restore(3, abstract)


def checkpoint() -> Property:
    """An error, or the state bit for bit."""
    whole = a_checkpoint()

    def reader(folder: Path, raw: bytes) -> None:
        put_folder(folder, whole, raw)
        found = restored(folder)
        assert jax.tree.structure(found) == jax.tree.structure(STATE)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), found, STATE)

    return Property(one_changed(whole), reader)


def checkpoint_with_right_sums() -> Property:
    """As somebody makes one who means harm: any result will do."""
    whole = {n: c for n, c in a_checkpoint().items() if not n.endswith("checksums.json")}

    def reader(folder: Path, raw: bytes) -> None:
        put_folder(folder, whole, raw)
        checksums.write(folder / "checkpoints" / "3", ["meta", "params", "rest"])
        restored(folder)

    return Property(one_changed(whole), reader)


FOLDERS = {
    "prepared text": lambda: prepared_data("text", of_text),
    "prepared tokens": lambda: prepared_data("tokens", of_tokens),
    "ArrayRecord": array_records,
    "checkpoint": checkpoint,
    "checkpoint with right sums": checkpoint_with_right_sums,
}


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_folders(tmp_path, name, count):
    try_some(tmp_path, name, count)


# --- what was found once --------------------------------------------------------------------------

KEPT = Path(__file__).parent / "data" / "fuzz"


def kept(name: str) -> Path:
    """The folder of the inputs that are tried again, of a reader."""
    return KEPT / name.replace(" ", "_").replace("'", "")


def test_what_was_kept(tmp_path):
    tried = 0
    for name in every():
        for file in sorted(kept(name).glob("*")):
            attempt(tmp_path, name, file.read_bytes())
            tried += 1
    assert tried == sum(1 for file in KEPT.rglob("*") if file.is_file())
