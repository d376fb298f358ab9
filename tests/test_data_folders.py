"""What a folder holds: what is read, which split it is of, and that nothing is left out unsaid."""

import json
import os
import socket
from pathlib import Path

import pyarrow
import pytest

from moepp_jax.config import DataConfig, Named, SourceConfig
from moepp_jax.data import corpus, records, splits
from moepp_jax.data.files import FilesCorpus
from moepp_jax.errors import ConfigError


def write(folder: Path, *names: str, texts: int = 3) -> Path:
    """JSON lines, whatever the name; each text says its file."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"text": f"{name} {i}"}) for i in range(texts))
        file.write_text("\n".join(lines) + "\n")
    return folder


def read(path: Path | str) -> dict[str, set[str | None]]:
    """The splits of each file's documents."""
    found: dict[str, set[str | None]] = {}
    for part in FilesCorpus(str(path)).parts():
        for document in part.documents():
            name = document.id.rsplit(":")[0].split("/data-0")[0]
            found.setdefault(name, set()).add(document.split)
    return found


def notes(path: Path | str) -> str:
    return "\n".join(FilesCorpus(str(path)).notes)


def save_to_disk(folder: Path, texts: list[str], kind=None, **state) -> Path:
    """As Hugging Face's data sets do it."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"text": pyarrow.array(texts, kind or pyarrow.string())})
    with pyarrow.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    said = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": None} | state
    (folder / "state.json").write_text(json.dumps(said))
    about = {"citation": "", "features": {"text": {"dtype": "string", "_type": "Value"}}}
    (folder / "dataset_info.json").write_text(json.dumps(about))
    return folder


# --- splits ---------------------------------------------------------------------------------------

TR, VA, TE = splits.TRAIN, splits.VALIDATION, splits.TEST


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.jsonl", "test.jsonl"], [TR, TE]),
        (["Train.JSONL.gz", "VALID.txt"], [TR, VA]),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], [None, None]),
        (["train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"], [TR, VA]),
        (["train-00000-of-00001-0123456789abcdef.parquet", "test.parquet"], [TR, TE]),
        (["data/train/x.parquet", "data/dev/y.parquet", "data/test/a/b.parquet"], [TR, VA, TE]),
        (["c4-train.00000-of-01024.json.gz", "c4-validation.00003-of-00008.json.gz"], [TR, VA]),
        (["TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"], [TR, VA]),
        (["wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"], [TR, VA, TE]),
        (["train/chunk1/example_train_0.jsonl.zst", "val.jsonl.zst"], [TR, VA]),
        (["train01.txt", "train02.txt", "dev1.txt"], [TR, TR, VA]),
        (["a.jsonl", "b.jsonl", "val.jsonl", "test.jsonl"], [None, None, VA, TE]),
        # Alone among others.
        (["a.jsonl", "test_results.jsonl"], [None, None]),
        (["test.jsonl", "a.jsonl"], [None, None]),
        (["train.jsonl", "a.jsonl"], [None, None]),
        (["2023/test.jsonl", "2024/train.jsonl"], [None, None]),
        (["unit_test.txt", "night_train.txt"], [None, None]),
        (["latest.txt", "training.txt", "contest.txt", "device.txt"], [None] * 4),
        # Beside splits that are found.
        (["train.jsonl", "test.jsonl", "test_results.jsonl"], [TR, TE, TE]),
        (["train.jsonl", "test.jsonl", "more.jsonl", "dev.notes.txt"], [TR, TE, None, None]),
        (["en/train.jsonl", "en/test.jsonl", "fr/test.jsonl"], [TR, TE, None]),
        # The outermost name decides, where it says a split.
        (["train/test.jsonl", "train/train.jsonl", "test/a.jsonl"], [TR, TR, TE]),
        (["dev/train.jsonl", "dev/test.jsonl"], [TR, TE]),
    ],
)
def test_names_say_splits_where_it_cannot_be_an_accident(names, expected):
    found = splits.of_files(names)
    assert [found.get(name) for name in names] == expected


def test_the_test_split_is_not_read_and_training_is_held_out_of_by_hashes(tmp_path):
    write(tmp_path, "train.jsonl", "test.jsonl", "test/x.jsonl")
    assert read(tmp_path) == {"train.jsonl": {None}}
    assert "train, 1 (train.jsonl), trained on" in notes(tmp_path)
    assert "test, 2 (test.jsonl, test/x.jsonl), not read" in notes(tmp_path)


def test_the_validation_split_is_held_out_and_nothing_else_is(tmp_path):
    write(tmp_path, "train-0.jsonl", "train-1.jsonl", "dev.jsonl", "more.jsonl")
    assert read(tmp_path) == {
        "train-0.jsonl": {"train"},
        "train-1.jsonl": {"train"},
        "more.jsonl": {"train"},
        "dev.jsonl": {"validation"},
    }
    assert "validation, 1 (dev.jsonl), held out, in place of config.data.eval" in notes(tmp_path)
    assert "none, 1 (more.jsonl), trained on" in notes(tmp_path)


def test_a_pattern_has_splits_too_and_names_one_to_train_on_it(tmp_path):
    write(tmp_path, "train.jsonl", "test.jsonl")
    assert read(f"{tmp_path}/*.jsonl") == {"train.jsonl": {None}}
    assert read(f"{tmp_path}/te*.jsonl") == {"test.jsonl": {None}}
    assert read(tmp_path / "test.jsonl") == {"test.jsonl": {None}}
    assert "though named as a split" in notes(f"{tmp_path}/te*.jsonl")


def test_an_accidental_name_is_trained_on_and_told(tmp_path):
    write(tmp_path, "a.jsonl", "test_results.jsonl")
    assert set(read(tmp_path)) == {"a.jsonl", "test_results.jsonl"}
    told = "trained on though named as a split, for no name beside it says another one: 1 (test_res"
    assert told in notes(tmp_path)


def test_splits_without_one_to_train_on_are_an_error(tmp_path):
    write(tmp_path, "valid.jsonl", "test.jsonl")
    with pytest.raises(ConfigError, match="nothing to train on, only files of the splits test, v"):
        FilesCorpus(str(tmp_path))


def test_a_text_file_that_is_a_whole_split_is_cut(tmp_path):
    for name in ("train.txt", "val.txt", "test.txt"):
        (tmp_path / name).write_text("\n\n".join(f"{i}" * 1500 for i in range(9)))
    [part] = FilesCorpus(str(tmp_path)).parts()
    assert [d.split for d in part.documents()] == ["train"] * 5 + ["validation"] * 5
    (tmp_path / "train2.txt").write_text("x")
    [part] = FilesCorpus(str(tmp_path)).parts()
    assert [d.split for d in part.documents()] == ["train"] * 2 + ["validation"] * 5


def test_a_folder_without_split_names_has_the_fingerprint_it_always_had(tmp_path):
    write(tmp_path, "a.jsonl", "sub/b.json", "Train.jsonl", "sub/train.jsonl")
    (tmp_path / "README.md").write_text("no text")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("Text.")
    assert FilesCorpus(str(tmp_path / "texts")).fingerprint == "e79483017b93"
    (tmp_path / "texts" / "a.txt").unlink()
    assert FilesCorpus(str(tmp_path)).fingerprint == "24a7656045a3"
    assert FilesCorpus(str(tmp_path / "a.jsonl")).fingerprint == "00a5920e10e6"
    assert FilesCorpus(f"{tmp_path}/**/*.json*").fingerprint == "24a7656045a3"


def test_what_is_read_in_another_way_than_before_has_another_fingerprint(tmp_path):
    write(tmp_path, "a.jsonl", "test.jsonl", "train.jsonl")
    together = FilesCorpus(str(tmp_path))
    (tmp_path / "test.jsonl").unlink()
    alone = FilesCorpus(str(tmp_path))
    assert list(together._files) == list(alone._files) and not alone._splits
    assert together.fingerprint != alone.fingerprint
    assert not alone._not_of_first_version()
    for name, content in (("a.JSONL", b'{"text": "x"}'), ("a.txt", b"\xef\xbb\xbfx")):
        (tmp_path / name).write_bytes(content)
        assert FilesCorpus(str(tmp_path / name))._not_of_first_version() == [[name]]


def data_config(folder: Path, path: Path) -> DataConfig:
    return DataConfig(
        sources=Named(text=SourceConfig(str(path), 1.0, "text")),
        dir=str(folder),
        tfds_dir="",
        tokenizer="",
        seq_len=32,
        eval_fraction=0.2,
        worker_processes=0,
    )


def test_the_text_data_set_has_these_splits_and_the_report_says_so(tmp_path):
    text = write(tmp_path / "text", "train.jsonl", "validation.jsonl", "test.jsonl", "a.md")
    config, lines = data_config(tmp_path / "data", text), []
    folder = corpus.prepare_text(config, corpus.open_corpus(config, "text"), lines.append)
    stored = {
        split: {e["source"].decode() for e in records.Split(folder, split)}
        for split in records.SPLITS
    }
    assert stored == {"train": {"train"}, "validation": {"validation"}}
    assert [line.split(": ")[2] for line in lines[1:3]] == [
        "splits by the files' names",
        "not read",
    ]


def test_a_validation_split_without_text_is_an_error(tmp_path):
    text = write(tmp_path / "text", "train.jsonl")
    (text / "validation.jsonl").write_text('{"text": ""}\n')
    config = data_config(tmp_path / "data", text)
    with pytest.raises(ConfigError, match="none of the documents of its validation split has"):
        corpus.prepare_text(config, corpus.open_corpus(config, "text"), lambda line: None)
    assert not list((tmp_path / "data").glob("*"))


# --- saved data sets ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_a_saved_data_set_is_read_as_its_state_says(tmp_path, kind):
    save_to_disk(tmp_path, ["a", "b"], kind)
    (tmp_path / "cache-0123.arrow").write_bytes(b"no part of it")
    config = data_config(tmp_path / "data", tmp_path)
    opened = corpus.open_corpus(config, "text")
    assert [d.text for part in opened.parts() for d in part.documents()] == ["a", "b"]
    assert "descriptions of a saved data set, 2 (dataset_info.json, state.json)" in notes(tmp_path)
    assert ".arrow that no saved data set names, 1 (cache-0123.arrow)" in notes(tmp_path)


def test_the_folders_of_a_saved_dictionary_are_its_splits(tmp_path):
    for name in ("train", "test"):
        save_to_disk(tmp_path / name, ["a", "b"])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert read(tmp_path) == {"train": {None}}
    assert "test, 1 (test/data-00000-of-00001.arrow), not read" in notes(tmp_path)


def test_names_in_a_saved_dictionary_need_no_twin(tmp_path):
    for name in ("sft_train", "test_gen", "unsupervised"):
        save_to_disk(tmp_path / name, ["a", "b"])
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": []}))
    assert set(read(tmp_path)) == {"sft_train", "unsupervised"}


def test_a_saved_data_set_that_lacks_a_file_or_selects_rows_is_an_error(tmp_path):
    save_to_disk(tmp_path, ["a"], _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(ConfigError, match=r"state.json says that only some rows .* flatten_indic"):
        FilesCorpus(str(tmp_path))
    save_to_disk(tmp_path, ["a"], _data_files=[{"filename": "b.arrow"}])
    with pytest.raises(ConfigError, match=r"b\.arrow, which .*state\.json names, is missing"):
        FilesCorpus(str(tmp_path))


def test_arrow_files_that_no_state_names_are_read_where_there_is_nothing_else(tmp_path):
    save_to_disk(tmp_path, ["a"])
    (tmp_path / "state.json").unlink()
    (tmp_path / "data-00000-of-00001.arrow").rename(tmp_path / "x.arrow")
    assert read(tmp_path) == {"x.arrow": {None}}
    (tmp_path / "dataset_info.json").unlink()
    write(tmp_path, "a.jsonl")
    assert set(read(tmp_path)) == {"a.jsonl"}
    assert notes(tmp_path) == "not read: .arrow that no saved data set names, 1 (x.arrow)"


def test_a_table_that_is_named_is_read_as_text_and_said(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n1,the bees\n")
    (tmp_path / "a.txt").write_text("the bees")
    said = "read as plain text, not row by row: 1 (a.csv); for a document a row make it JSON lines"
    assert said in notes(tmp_path / "a.csv") and said in notes(f"{tmp_path}/a.*")
    assert notes(tmp_path / "a.txt") == ""


# --- what is not read -----------------------------------------------------------------------------


def test_what_is_not_read_is_counted_and_named_by_kind(tmp_path):
    write(tmp_path / "there", "x.jsonl")
    names = ["a.md", "sub/b.MD", "c.tar.gz", "LICENSE", ".git/config", "d.csv"]
    write(tmp_path, "text.jsonl", *names)
    (tmp_path / "linked").symlink_to(tmp_path / "there")
    found = notes(tmp_path)
    for said in (
        "not read: .md, 2 (a.md, sub/b.MD); .csv, 1 (d.csv); ",
        "; .tar.gz, 1 (c.tar.gz); ",
        "; without an ending, 1 (LICENSE)",
        "; hidden folders, 1 (.git); ",
        "; links to folders, 1 (linked)",
    ):
        assert said in found
    assert set(read(tmp_path)) == {"text.jsonl", "there/x.jsonl"}
    write(tmp_path, *[f"e{i}.x{i}" for i in range(9)])
    assert notes(tmp_path).endswith("; other kinds, 7")


def test_a_folder_without_text_says_what_there_is(tmp_path):
    write(tmp_path, "a.md", "b.csv")
    with pytest.raises(ConfigError, match=r"without text: .*\.zst.*\(not read: \.csv, 1 \(b\.csv"):
        FilesCorpus(str(tmp_path))


@pytest.fixture
def irregular(tmp_path):
    write(tmp_path, "a.jsonl")
    os.mkfifo(tmp_path / "b.jsonl")
    return tmp_path / "b.jsonl"


@pytest.mark.parametrize("path", ["{file}", "{file.parent}", "{file.parent}/*"])
def test_a_fifo_is_refused_by_name_and_never_opened(irregular, path):
    with pytest.raises(ConfigError, match=r"b\.jsonl is a FIFO, and only regular files are read"):
        FilesCorpus(path.format(file=irregular))


def test_devices_sockets_and_dead_links_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="/dev/zero is a device, and only"):
        FilesCorpus("/dev/zero")
    write(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=r"b\.jsonl is a device, and only"):
        FilesCorpus(str(tmp_path))
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "b.jsonl").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"b\.jsonl is a link to nothing \(No such file"):
        FilesCorpus(str(tmp_path))
    (tmp_path / "b.jsonl").unlink()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(tmp_path / "s"))
    assert notes(tmp_path) == "not read: a socket, 1 (s)"


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    write(tmp_path, "a.jsonl", "sub/b.jsonl")
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigError, match=r"the folder .*sub cannot be read: Permission denied"):
        FilesCorpus(str(tmp_path))
