"""Files of every format and compression give the same documents, in bounded memory."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import struct
import zlib

import pyarrow
import pyarrow.parquet
import pytest

from moepp_jax.data import json_records, opening
from moepp_jax.data.files import FilesCorpus
from moepp_jax.errors import ConfigError

zstd = opening.zstd

TEXTS = [f"Text {i} has its words: é, 🙂.\nAnd a second line{'.' * (37 * i)}" for i in range(40)]
RECORDS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
MARK = codecs.BOM_UTF8


def documents(path) -> list[str]:
    return [d.text for part in FilesCorpus(str(path)).parts() for d in part.documents()]


def long_window(content: bytes) -> bytes:
    options = {
        zstd.CompressionParameter.window_log: 28,
        zstd.CompressionParameter.compression_level: 1,
    }
    packed = io.BytesIO()
    with zstd.ZstdFile(packed, "w", options=options) as file:
        file.write(content)
    return packed.getvalue()


def arrow_stream(kind=None, texts=TEXTS, as_file=False) -> bytes:
    column = pyarrow.array(texts, kind or pyarrow.string())
    table = pyarrow.table({"id": range(len(texts)), "text": column})
    sink = pyarrow.BufferOutputStream()
    make = pyarrow.ipc.new_file if as_file else pyarrow.ipc.new_stream
    with make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return sink.getvalue().to_pybytes()


def parquet(kind) -> bytes:
    sink = io.BytesIO()
    content = [text.encode() for text in TEXTS] if "binary" in str(kind) else TEXTS
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(content, kind)}), sink)
    return sink.getvalue()


AS_THEY_LIE = {
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.jsonl.xz": lzma.compress(LINES),
    "a.json.zstd": zstd.compress(LINES),
    "long.jsonl.zst": long_window(LINES),
    "A.JSONL": LINES,
    "a.Json.GZ": gzip.compress(LINES),
    "marked.jsonl": MARK + LINES,
    "marked.jsonl.gz": gzip.compress(MARK + LINES),
    "array.json": json.dumps(RECORDS, indent=1).encode(),
    "one-line.json": json.dumps(RECORDS).encode(),
    "array.json.xz": lzma.compress(json.dumps(RECORDS, ensure_ascii=False).encode()),
    "marked-array.json": MARK + b" \n" + json.dumps(RECORDS, indent=2).encode() + b"\n",
    "a.arrow": arrow_stream(),
    "large.arrow": arrow_stream(pyarrow.large_string()),
    "view.arrow": arrow_stream(pyarrow.string_view()),
    "dictionary.arrow": arrow_stream(pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
    "file.arrow": arrow_stream(as_file=True),
    "view.parquet": parquet(pyarrow.string_view()),
    "binary.parquet": parquet(pyarrow.binary()),
    "large-binary.parquet": parquet(pyarrow.large_binary()),
    "binary-view.parquet": parquet(pyarrow.binary_view()),
}


@pytest.mark.parametrize("chunk", [5, 2**20])
@pytest.mark.parametrize("name", AS_THEY_LIE)
def test_every_format_gives_the_same_documents(tmp_path, monkeypatch, name, chunk):
    monkeypatch.setattr(json_records, "_CHUNK", chunk)
    (tmp_path / name).write_bytes(AS_THEY_LIE[name])
    assert documents(tmp_path) == TEXTS
    assert documents(tmp_path / name) == TEXTS
    everything = [d for p in FilesCorpus(str(tmp_path)).parts() for d in p.documents()]
    assert len({d.id for d in everything}) == len(TEXTS)
    read = [d.read for d in everything]
    assert read == sorted(read) and read[-1] <= len(AS_THEY_LIE[name])


def test_the_window_is_longer_than_arrow_reads():
    """Else the case above shows nothing."""
    packed = pyarrow.py_buffer(AS_THEY_LIE["long.jsonl.zst"])
    with pytest.raises(OSError, match="Frame requires too much memory"):
        pyarrow.CompressedInputStream(pyarrow.BufferReader(packed), "zstd").read()


def test_an_array_is_one_part_and_is_read_a_record_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("moepp_jax.data.files._PART_BYTES", 500)
    monkeypatch.setattr(json_records, "_CHUNK", 64)
    file = tmp_path / "a.json"
    file.write_text(json.dumps(RECORDS[:10]) + "x" * 10_000)
    [part] = FilesCorpus(str(file)).parts()
    found = part.documents()
    assert [next(found).text for _ in range(10)] == TEXTS[:10]
    with pytest.raises(ConfigError, match=r"a\.json, record 11: not JSON: 'x' comes after the end"):
        next(found)


@pytest.mark.parametrize("content", [b"[]", b" [ ]\n", MARK + b"[]"])
def test_an_empty_array_holds_nothing(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert documents(tmp_path) == []


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(MARK + "é".encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(MARK + b"b\n\n\xef\xbb\xbfc"))
    assert documents(tmp_path) == ["é", "b\n\n\ufeffc"]
    assert documents(tmp_path / "b.txt.gz") == ["b\n\n\ufeffc"]


DEEP = b'{"text": "x"}\n{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", DEEP, r"a\.jsonl, line 2: its values are nested too deep"),
        (
            "a.json",
            b"[" + DEEP.replace(b"\n", b",") + b"{}]",
            r"record 2: its values are nested too",
        ),
        ("a.json", b'[{"text": "x"}', r"a\.json, record 2: not JSON: here is to be , or \], and t"),
        ("a.json", b"[", r"a\.json, record 1: not JSON: here is to be \], and the file ends"),
        ("a.json", b'[{"text": "x"} {}]', r"record 2: not JSON: here is to be , or \], not '{'"),
        ("a.json", b'[{"text": "x"},]', r"record 2: not JSON \(Expecting value"),
        ("a.json", b'[{"text": "x"}, {"text": tru', r"record 2: not JSON \(Expecting value"),
        ("a.json", b'[{"text": "x"}, {"text": "', r"record 2: not JSON \(Unterminated string"),
        ("a.json", b'[{"text": "x"}, {text: "y"}' + b" " * 99, r"record 2: not JSON \(Expecting p"),
        (
            "a.json",
            b'[{"text": "x"}, 7]',
            r"record 2: a number, where an object with the field 'te",
        ),
        ("a.jsonl", b'["x"]\n"y"\n', r"record 1: a string, where .*: write \{\"text\": \"...\"\}"),
        ("a.json", b'[{"text": "x"}, {"text": {}}]', r"record 2: the field 'text' holds an object"),
        ("a.json", b'[{"text": "\xff"}]', r"record 1: it or one after it is not UTF-8: .* 0xff"),
        ("a.json", b'{\n "text": "x"\n}', r"line 1: not JSON .* an object a line, or one array of"),
        (
            "a.jsonl",
            json.dumps(dict.fromkeys(map(str, range(99)))).encode(),
            r"line 1: no field 'text'; there is '0', .* '19' and 79 more: set",
        ),
        ("a.jsonl.xz", lzma.compress(LINES)[:-9], r"a\.jsonl\.xz cannot be read to its end"),
        ("a.jsonl.xz", LINES, r"a\.jsonl\.xz cannot be read to its end"),
        ("a.jsonl.bz2", bz2.compress(LINES)[:-9], r"a\.jsonl\.bz2 cannot be read to its end"),
        ("a.jsonl.bz2", LINES, r"a\.jsonl\.bz2 cannot be read to its end"),
        ("a.jsonl.zstd", zstd.compress(LINES)[:-9], r"a\.jsonl\.zstd cannot be read to its end"),
        ("a.arrow", arrow_stream()[:700], r"a\.arrow is no Arrow file, or is damaged"),
        ("a.arrow", b"", r"a\.arrow is no Arrow file, or is damaged"),
        ("a.arrow", LINES, r"a\.arrow is no Arrow file, or is damaged"),
        ("a.arrow", arrow_stream(pyarrow.int64(), [1]), r"the column 'text' is int64, not text"),
        ("a.arrow", arrow_stream(pyarrow.binary(), [b"x", b"\xff"]), r"row 1, is not UTF-8: byte"),
    ],
)
def test_what_cannot_be_read_is_one_error_with_file_and_record(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        documents(tmp_path / name)


def test_offsets_out_of_range_are_found_before_they_are_read(tmp_path):
    content = bytearray(arrow_stream(texts=["a" * 10] * 5))
    offsets = b"".join((10 * i).to_bytes(4, "little") for i in range(6))
    at = content.index(offsets)
    content[at + 8 : at + 12] = (10**9).to_bytes(4, "little")
    (tmp_path / "a.arrow").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.arrow is no Arrow file, or is damaged: .*ffset"):
        documents(tmp_path)


# --- what is too long -----------------------------------------------------------------------------

LONG = 10_000


@pytest.fixture
def longest(monkeypatch):
    monkeypatch.setattr(opening, "LONGEST", LONG)
    monkeypatch.setattr(json_records, "_CHUNK", 1000)


def record(size: int) -> str:
    """Of so many bytes."""
    return json.dumps({"text": "x" * (size - 12)})


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", f"{record(LONG - 1)}\n{record(LONG)}\n", r"a\.jsonl, line 2 is longer than t"),
        ("a.json", f"[{record(LONG)},\n{record(3 * LONG)}]", r"a\.json, record 2: it is longer t"),
        ("a.txt", "y" * LONG + "\n\n" + "x" * LONG + "\n", r"a\.txt, line 1, is longer than the"),
    ],
)
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_a_long_line_is_refused_by_its_number(tmp_path, longest, name, content, where, packed):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstd.compress}[packed]
    (tmp_path / f"{name}{packed}").write_bytes(pack(content.encode()))
    where = where.replace(name.replace(".", r"\."), (name + packed).replace(".", r"\."))
    with pytest.raises(ConfigError, match=where):
        documents(tmp_path / f"{name}{packed}")


def test_what_is_as_long_as_allowed_is_read(tmp_path, longest):
    (tmp_path / "a.jsonl").write_text(record(LONG - 1) + "\n" + record(LONG))
    (tmp_path / "b.json").write_text(f"[{record(LONG)}, {record(LONG)}]")
    assert [len(text) for text in documents(tmp_path)] == [LONG - 13, *[LONG - 12] * 3]


def test_a_long_document_among_others_is_refused(tmp_path, longest):
    (tmp_path / "a.txt").write_text("x" * LONG)
    assert len(documents(tmp_path)) == 1
    (tmp_path / "b.txt").write_text("x\n" * LONG)
    with pytest.raises(ConfigError, match=r"b\.txt, which is one document among others .* longer"):
        documents(tmp_path)


def test_a_long_row_is_refused(tmp_path, longest):
    for texts in (["x" * LONG], ["y", "x" * (LONG + 1)]):
        (tmp_path / "a.arrow").write_bytes(arrow_stream(texts=texts))
        if len(texts) == 1:
            assert documents(tmp_path) == texts
    with pytest.raises(ConfigError, match=r"a\.arrow, row 1, is longer than the 10,000 bytes"):
        documents(tmp_path)


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.binary_view()])
def test_a_value_that_is_stored_once_for_many_rows_is_in_memory_once(tmp_path, kind):
    size, rows = 1_000_000, 200
    text = b"x" * size if "binary" in str(kind) else "x" * size
    table = pyarrow.table({"text": pyarrow.array([text] * rows, kind)})
    pyarrow.parquet.write_table(
        table, tmp_path / "a.parquet", compression="zstd", dictionary_pagesize_limit=2**30
    )
    del table
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    [part] = FilesCorpus(str(tmp_path)).parts()
    before, most, count = pyarrow.total_allocated_bytes(), 0, 0
    for document in part.documents():
        assert len(document.text) == size
        most, count = max(most, pyarrow.total_allocated_bytes() - before), count + 1
    assert count == rows and most < 20 * size


# --- what is unpacked at once ---------------------------------------------------------------------

AT_ONCE = 1_000_000


@pytest.fixture
def little_at_once(monkeypatch):
    monkeypatch.setattr(opening, "AT_ONCE", AT_ONCE)


ENCODED = {
    "plain": {"use_dictionary": False},
    "dictionary": {"dictionary_pagesize_limit": 2**30},
    "delta": {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
}


@pytest.mark.parametrize("codec", ["none", "zstd", "snappy", "gzip", "brotli", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("encoded", ENCODED)
def test_a_page_that_unpacks_to_too_much(tmp_path, little_at_once, encoded, version, codec):
    file, texts = tmp_path / "a.parquet", [letter * 300_000 for letter in "abcd"]
    options = ENCODED[encoded] | {"compression": codec, "data_page_version": version}
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, file, **options)
    with pytest.raises(
        ConfigError, match=r"a\.parquet: in row group 0 a page of 'text' .* unpacks"
    ):
        documents(file)
    pyarrow.parquet.write_table(table, file, row_group_size=2, **options)  # what it says to do
    assert documents(file) == texts


@pytest.mark.parametrize("encoding", ["DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"])
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_lengths_that_no_value_has(tmp_path, encoding, codec):
    """8 GiB of them, of a file of a kilobyte."""
    texts = [f"{i:020}" for i in range(15)]
    schema = pyarrow.schema([pyarrow.field("text", pyarrow.string(), codec == "zstd")])
    options = {"use_dictionary": False, "column_encoding": {"text": encoding}}
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"text": texts}, schema=schema)
    pyarrow.parquet.write_table(table, file, compression=codec, **options)
    assert documents(file) == texts
    if codec == "none":
        content = bytearray(file.read_bytes())
        at = content.index(b"\x80\x01\x04\x0f")  # 128 in a block, in 4 parts; 15 of them
        content[at : at + 7] = b"\x80\x01\x04\xff\xff\xff\x07"
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=r"a page of 15 values has 16,777,215 lengths"):
            documents(file)


def test_the_name_of_a_column_is_that_of_the_schema(tmp_path, little_at_once):
    """Another one, which each row group has, is not what Arrow goes by."""
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 2 * AT_ONCE]}), file)
    content = file.read_bytes()
    path = content.rindex(b"\x19\x18\x04text")
    file.write_bytes(content[:path] + b"\x19\x18\x04tent" + content[path + 7 :])
    with pytest.raises(ConfigError, match="unpacks to"):
        documents(file)


def test_rows_of_a_large_row_group_are_read_some_at_a_time(tmp_path):
    """Of a dictionary that was too small for all of them, too."""
    texts = [f"{i:02000}" for i in range(20_000)]
    table = pyarrow.table({"text": texts})
    options = {"row_group_size": len(texts), "compression": "none"}
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", **options)
    [part] = FilesCorpus(str(tmp_path)).parts()
    before, most = pyarrow.total_allocated_bytes(), 0
    for document, text in zip(part.documents(), texts, strict=True):
        assert document.text == text
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < 12_000_000  # two pages and a dictionary of a megabyte each, and what reads ahead


@pytest.mark.parametrize("make", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
@pytest.mark.parametrize("codec", ["zstd", "lz4", None])
@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.dictionary("int32", "string")])
def test_a_record_batch_that_unpacks_to_too_much(tmp_path, little_at_once, kind, codec, make):
    file = tmp_path / "a.arrow"
    texts = [letter * 300_000 for letter in "abcd"]

    def write(**options):
        table = pyarrow.table({"text": pyarrow.array(texts).cast(kind)})
        packed = pyarrow.ipc.IpcWriteOptions(compression=codec)
        with make(file, table.schema, options=packed) as writer:
            writer.write_table(table, **options)

    write()
    if codec is None:  # it is used where it lies
        assert documents(file) == texts
        return
    what = "its dictionaries" if pyarrow.types.is_dictionary(kind) else "record batch 0"
    with pytest.raises(ConfigError, match=rf"a\.arrow: {what} would unpack to 1,200,0\d\d bytes"):
        documents(file)
    if kind == pyarrow.string():
        write(max_chunksize=2)  # what it says to do
        assert documents(file) == texts


def test_columns_that_are_not_read_are_not_unpacked(tmp_path):
    """Nor told to be damaged."""
    table = pyarrow.table({"image": [b"x" * 5_000_000], "text": ["text"]})
    packed = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema, options=packed) as writer:
        writer.write_table(table)
    content = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(content.replace(b"\x28\xb5\x2f\xfd", b"none", 1))
    assert documents(tmp_path) == ["text"]


def test_views_of_one_value_are_in_memory_once(tmp_path):
    text, rows = b"x" * 1_000_000, 200
    views = struct.pack("<i4sii", len(text), text[:4], 0, 0) * rows
    buffers = [None, pyarrow.py_buffer(views), pyarrow.py_buffer(text)]
    table = pyarrow.table(
        {"text": pyarrow.Array.from_buffers(pyarrow.string_view(), rows, buffers)}
    )
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    before, count = pyarrow.total_allocated_bytes(), 0
    [part] = FilesCorpus(str(tmp_path)).parts()
    for document in part.documents():
        assert len(document.text) == len(text)
        assert pyarrow.total_allocated_bytes() - before < 10_000_000
        count += 1
    assert count == rows


def xz(content: bytes, dictionary: int) -> bytes:
    """Packed, with the number by which an .xz file says how large its dictionary is."""
    packed = bytearray(lzma.compress(content, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0}]))
    size = 4 * (packed[12] + 1)  # of the header of its first block, which ends with its sum
    packed[16] = dictionary
    packed[12 + size - 4 : 12 + size] = zlib.crc32(packed[12 : 12 + size - 4]).to_bytes(4, "little")
    return bytes(packed)


def test_an_xz_file_that_asks_for_4_gigabytes(tmp_path):
    file = tmp_path / "a.jsonl.xz"
    file.write_bytes(xz(LINES, 40))
    with pytest.raises(ConfigError, match=r"a\.jsonl\.xz asks for more than the 536,870,912 bytes"):
        documents(file)
    for enough in (lzma.compress(LINES, preset=9), xz(LINES, 32)):  # 32: 256 MiB
        file.write_bytes(enough)
        assert documents(file) == TEXTS


def test_streams_of_xz_that_follow_each_other(tmp_path):
    half = LINES.index(b"\n", len(LINES) // 2) + 1
    file = tmp_path / "a.jsonl.xz"
    zeros = bytes(4 * 5000)
    packed = [lzma.compress(LINES[:half]), zeros, lzma.compress(LINES[half:]), zeros]
    file.write_bytes(b"".join(packed))
    assert documents(file) == TEXTS
    for rest in (b"rest", packed[2][:20]):
        file.write_bytes(packed[0] + rest)
        with pytest.raises(ConfigError, match=r"a\.jsonl\.xz cannot be read to its end"):
            documents(file)


# --- lines ----------------------------------------------------------------------------------------


def test_lines_without_a_blank_one_between_are_cut(tmp_path, longest):
    lines = [f"{i:099}\n" for i in range(1000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    found = documents(tmp_path / "a.txt")
    assert [line + "\n" for text in found for line in text.split("\n")] == lines
    assert [len(text) for text in found] == [LONG - 1] * 10


def test_a_part_that_begins_in_a_long_line_goes_on_after_it(tmp_path, longest, monkeypatch):
    monkeypatch.setattr("moepp_jax.data.files._PART_BYTES", LONG // 5)
    texts = ["a", "x" * (LONG - 100), "b", "c"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    assert documents(tmp_path) == texts


def test_a_part_that_begins_in_too_long_a_line_does_not_look_for_its_end(
    tmp_path, longest, monkeypatch
):
    """Of a file of nothing but zeros, a terabyte of them, that would take half an hour."""
    monkeypatch.setattr("moepp_jax.data.files._PART_BYTES", 2 * LONG)
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n')
    os.truncate(file, 2**40)
    first, *_, last = FilesCorpus(str(file)).parts()
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 2 is longer than the 10,000 bytes"):
        list(first.documents())
    where = r"a\.jsonl, the line that byte 1,\d\d\d,\d\d\d,\d\d\d,\d\d\d is in, is longer than the"
    with pytest.raises(ConfigError, match=where):
        list(last.documents())
