"""Files as they are published: the same documents from every format, and damage named."""

import gzip
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moepp_jax.data import files
from moepp_jax.data.files import FilesCorpus
from moepp_jax.errors import ConfigError

TEXTS = [f"Text {i} has its words: é, 🙂.\nAnd a second line{'.' * (37 * i)}" for i in range(40)]


def documents(corpus: FilesCorpus) -> list[str]:
    return [d.text for part in corpus.parts() for d in part.documents()]


def json_lines(texts=TEXTS, **more) -> bytes:
    return "".join(json.dumps({"text": text, **more}) + "\n" for text in texts).encode()


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def parquet(texts=TEXTS, rows=7, kind=None) -> bytes:
    kind = kind or pyarrow.string()
    table = pyarrow.table({"id": range(len(texts)), "text": pyarrow.array(texts, kind)})
    sink = io.BytesIO()
    pyarrow.parquet.write_table(
        table, sink, row_group_size=rows, compression=None, write_page_checksum=True
    )
    return sink.getvalue()


AS_PUBLISHED = {
    "a.jsonl": json_lines(id=1),
    "a.jsonl.gz": gzip.compress(json_lines()),
    "two-members.json.gz": gzip.compress(json_lines(TEXTS[:9]))
    + gzip.compress(json_lines(TEXTS[9:])),
    "a.json.zst": zstd(json_lines()),
    "two-frames.jsonl.zst": zstd(json_lines(TEXTS[:9])) + zstd(json_lines(TEXTS[9:])),
    "a.parquet": parquet(),
    "large.parquet": parquet(kind=pyarrow.large_string()),
    "dictionary.parquet": parquet(kind=pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
}


@pytest.mark.parametrize("name", AS_PUBLISHED)
@pytest.mark.parametrize("part_bytes", [500, 10**6])
def test_every_format_gives_the_same_documents_however_it_is_cut(
    tmp_path, name, part_bytes, monkeypatch
):
    monkeypatch.setattr(files, "_PART_BYTES", part_bytes)
    (tmp_path / name).write_bytes(AS_PUBLISHED[name])
    corpus = FilesCorpus(str(tmp_path / name))
    assert documents(corpus) == TEXTS
    parts = corpus.parts()
    can_be_cut = name in ("a.jsonl", "a.parquet", "large.parquet", "dictionary.parquet")
    assert (len(parts) > 3) == (can_be_cut and part_bytes == 500)
    everything = [d for part in parts for d in part.documents()]
    assert len({d.id for d in everything}) == len(TEXTS)
    for part in parts:
        read = [d.read for d in part.documents()]
        assert read == sorted(read) and (not read or read[-1] <= part.num_bytes)


def test_a_line_that_starts_where_a_part_does_is_in_one_part(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PART_BYTES", 100)
    texts = [f"{i:09}" for i in range(40)]
    (tmp_path / "a.jsonl").write_bytes(content := json_lines(texts))
    corpus = FilesCorpus(str(tmp_path / "a.jsonl"))
    assert len(content) == 40 * 22 and len(corpus.parts()) == 9
    monkeypatch.setattr(files, "_PART_BYTES", 110)
    assert len(corpus.parts()) == 8  # of five lines each
    assert documents(corpus) == texts


def test_a_folder_is_searched_to_its_leaves_and_hidden_ones_are_left_out(tmp_path):
    for name in ("a/x.jsonl", "a/b/x.jsonl.gz", "y.json.zst", ".cache/z.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        content = json_lines([name])
        packed = {".gz": gzip.compress(content), ".zst": zstd(content)}
        (tmp_path / name).write_bytes(packed.get(Path(name).suffix, content))
    (tmp_path / "README.md").write_text("no text")
    assert documents(FilesCorpus(str(tmp_path))) == ["a/b/x.jsonl.gz", "a/x.jsonl", "y.json.zst"]


def test_a_pattern_takes_files_of_any_name(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "x.py").write_text("print(1)\n")
    (tmp_path / "a" / "b" / "y.py").write_text("print(2)\n")
    (tmp_path / "a" / "z.pyc").write_bytes(b"\xff")
    corpus = FilesCorpus(f"{tmp_path}/**/*.py")
    assert {d.id: d.text for part in corpus.parts() for d in part.documents()} == {
        "x.py": "print(1)",
        "a/b/y.py": "print(2)",
    }


def test_small_files_share_parts_and_every_byte_is_in_one(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PART_BYTES", 1000)
    for i in range(50):
        (tmp_path / f"{i:02}.txt").write_text(f"{i:02}" * 50)
    parts = FilesCorpus(str(tmp_path)).parts()
    assert 3 <= len(parts) <= 7
    assert sum(part.num_bytes for part in parts) == 50 * 100


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not JSON \("),
        (
            "a.jsonl",
            b'\n{"text": "x"}\n["x"]\n',
            r"a\.jsonl, line 3: an array, where an object with",
        ),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', r"line 1: no field 'text'; there is 'body', 'id'"),
        (
            "a.jsonl",
            b'{"text": 5}\n',
            r"a\.jsonl, line 1: the field 'text' holds a number, not text",
        ),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, line 1: not UTF-8: byte 10 .* 0xff"),
        ("a.jsonl", b'{"text": "a\\ud800"}\n', r"line 1: .* not Unicode text: character 1"),
        (
            "a.jsonl.gz",
            gzip.compress(json_lines(), mtime=0)[:-20],
            r"a\.jsonl\.gz cannot be read to its end",
        ),
        ("a.jsonl.gz", json_lines(), r"a\.jsonl\.gz cannot be read to its end: Not a gzipped"),
        ("a.jsonl.zst", zstd(json_lines())[:-3], r"a\.jsonl\.zst cannot be read to its end"),
        ("a.jsonl.zst", json_lines(), r"a\.jsonl\.zst cannot be read to its end"),
        (
            "a.txt.gz",
            gzip.compress(b"caf\xe9", mtime=0),
            r"a\.txt\.gz is not UTF-8: byte 3 is 0xe9",
        ),
        ("a.parquet", parquet()[:-9], r"a\.parquet is no Parquet file, or is damaged"),
        (
            "a.parquet",
            parquet([1, 2], kind=pyarrow.int64()),
            r"the column 'text' is int64, not tex",
        ),
        ("a.parquet", b"", r"a\.parquet is no Parquet file"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_file_and_record(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        documents(FilesCorpus(str(tmp_path / name)))


def test_the_line_of_an_error_is_that_of_the_file_not_of_its_part(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PART_BYTES", 300)
    lines = json_lines().splitlines(keepends=True)
    lines[31] = b"{\n"
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    corpus = FilesCorpus(str(tmp_path / "a.jsonl"))
    assert len(corpus.parts()) > 10
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 32: not JSON"):
        documents(corpus)


def test_a_flipped_byte_of_a_parquet_page_is_found(tmp_path):
    content = bytearray(parquet([f"{i:0500}" for i in range(50)], rows=50))
    at = content.index(b"00007") - 40
    content[at] ^= 1
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.parquet is no Parquet file, or is damaged"):
        documents(FilesCorpus(str(tmp_path / "a.parquet")))


def test_text_of_a_parquet_file_that_is_not_utf8_names_the_row(tmp_path):
    texts = pyarrow.array([b"fine", b"caf\xe9"], pyarrow.binary())
    array = pyarrow.StringArray.from_buffers(2, texts.buffers()[1], texts.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"text": array}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet, row 1, is not UTF-8: byte 3 is 0xe9"):
        documents(FilesCorpus(str(tmp_path / "a.parquet")))


def test_empty_and_absent_texts_are_empty_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ""}\n\n{"text": null}\n{"text": " x "}\n')
    (tmp_path / "b.parquet").write_bytes(parquet(["", None, " \n"]))
    assert documents(FilesCorpus(str(tmp_path / "a.jsonl"))) == ["", "", "x"]
    assert documents(FilesCorpus(str(tmp_path / "b.parquet"))) == ["", "", ""]


def test_another_field_may_hold_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "no", "content": "yes"}\n')
    assert documents(FilesCorpus(str(tmp_path / "a.jsonl"), text_field="content")) == ["yes"]


def test_a_folder_of_several_kinds_of_files_asks_for_a_pattern(tmp_path):
    (tmp_path / "urls.txt").write_text("no text")
    (tmp_path / "a.parquet").write_bytes(parquet())
    with pytest.raises(ConfigError, match=r"several kinds .*urls.txt.*\*\*/\*\.parquet"):
        FilesCorpus(str(tmp_path))
    assert documents(FilesCorpus(f"{tmp_path}/**/*.parquet")) == TEXTS


def test_the_fingerprint_reads_samples_only_and_sees_names_sizes_and_samples(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"x" * 10**6)
    before = FilesCorpus(str(file)).fingerprint
    seen = {before, FilesCorpus(str(file), text_field="body").fingerprint}
    for at in (0, 500_000, 999_999):
        content = bytearray(b"x" * 10**6)
        content[at] = 121
        file.write_bytes(content)
        seen.add(FilesCorpus(str(file)).fingerprint)
    file.write_bytes(b"x" * (10**6 + 1))
    seen.add(FilesCorpus(str(file)).fingerprint)
    assert len(seen) == 6
    content = bytearray(b"x" * 10**6)
    content[200_000] = 121  # between the samples: the price of not reading terabytes
    file.write_bytes(content)
    assert FilesCorpus(str(file)).fingerprint == before
