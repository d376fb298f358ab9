"""Preparing on several processes: killed, out of space or short of sources, it loses nothing."""

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import flags
from absl.testing import flagsaver

from moepp_jax.commands import data as command
from moepp_jax.config import Config
from moepp_jax.configs import tiny
from moepp_jax.configs.base import source
from moepp_jax.data import corpus, estimate, files, records, shards, storage, tokens, work
from moepp_jax.data.prepare import prepare_sources, prepared_sources
from moepp_jax.data.verify import verify
from moepp_jax.errors import ConfigError

TEXT = Path(__file__).parent / "data" / "text"
WORDS = ["the", "sea", "is", "wide", "and", "a", "ship", "small", "but", "wind", "blows", "fair"]


def text_of(i: int) -> str:
    rng = np.random.default_rng(i)
    return f"Text {i}: " + " ".join(rng.choice(WORDS, rng.integers(5, 60)))


def write_texts(folder: Path, count: int) -> Path:
    """JSON lines of so many texts in files of 50."""
    folder.mkdir(parents=True)
    for start in range(0, count, 50):
        lines = [json.dumps({"text": text_of(i)}) for i in range(start, start + 50)]
        (folder / f"{start:05}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def config(folder: Path, *paths: Path | str, **changes) -> Config:
    fields = tiny.get_config()
    fields.data.update(dir=str(folder), eval_fraction=0.2, seq_len=32)
    fields.data.sources = {f"source{i}": source(str(path)) for i, path in enumerate(paths)}
    fields.moe.group_size = 32
    fields.model.vocab_size = 320
    fields.update_from_flattened_dict(changes)
    return Config.parse(fields)


def prepare(c: Config, lines: list[str] | None = None, workers: int = 1):
    return prepare_sources(c, (lines if lines is not None else []).append, workers)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*.*") if f.is_file()
    }


@pytest.fixture(scope="module")
def small_parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_PART_BYTES", 10_000)
        patch.setattr(work, "_WORTH_A_WORKER", 1)
        yield


@pytest.fixture(scope="module")
def whole(small_parts, tmp_path_factory) -> Path:
    """What one process makes of 400 texts in 8 files and 7 parts."""
    folder = tmp_path_factory.mktemp("whole")
    write_texts(folder / "text", 400)
    prepare(config(folder / "data", folder / "text"))
    return folder


def test_several_processes_make_the_same_bytes(whole, tmp_path):
    prepare(config(tmp_path, whole / "text"), workers=2)
    assert contents(tmp_path) == contents(whole / "data")
    [text] = tmp_path.glob("text-*")
    assert len(list(text.glob("moepp_text-train*"))) == 7
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("done"))


def test_every_document_is_there_once_and_neighbours_are_not(whole):
    prepared = prepared_sources(config(whole / "data", whole / "text"))
    found = []
    for split in records.SPLITS:
        documents = tokens.TokenDocuments(prepared.tokens["source0"], split)
        assert documents.starts[-1] == sum(map(len, documents))
        found += [prepared.tokenizer.decode(ids) for ids in documents]
    assert sorted(found) == sorted(map(text_of, range(400)))
    numbers = np.array([int(text.split(":")[0].split()[1]) for text in found])
    assert np.mean(np.diff(numbers) == 1) < 0.05


def test_tfds_reads_both_data_sets_by_itself(whole):
    prepared = prepared_sources(config(whole / "data", whole / "text"))
    [text] = (whole / "data").glob("text-*")
    read = [
        example["text"].decode()
        for split in records.SPLITS
        for example in tfds.builder_from_directory(text).as_data_source(split)
    ]
    assert sorted(read) == sorted(map(text_of, range(400)))
    builder = tfds.builder_from_directory(prepared.tokens["source0"])
    ids = [e["tokens"] for split in records.SPLITS for e in builder.as_data_source(split)]
    stream = np.concatenate(ids)
    assert stream.dtype == np.uint16 and (stream[0], stream[-1]) == (1, 2)
    found = np.split(stream, 1 + np.flatnonzero(stream[:-1] == 2))
    assert sorted(map(prepared.tokenizer.decode, found)) == sorted(read)


@pytest.mark.slow
def test_a_killed_prepare_goes_on_and_ends_with_the_same_bytes(whole, tmp_path):
    program = (
        "import sys, time\n"
        "from tests import test_data_prepare as t\n"
        "from moepp_jax.data import files, work\n"
        "if __name__ == '__main__':\n"
        "    files._PART_BYTES = 10_000\n"
        "    do = work._do\n"
        "    work._do = lambda *given: (do(*given), time.sleep(0.2))\n"
        "    t.prepare(t.config(t.Path(sys.argv[1]), sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", program, tmp_path, whole / "text"]
    env = os.environ | {"PYTHONPATH": str(TEXT.parents[2])}
    for stage in ("text-*.partial", "tokens-*.partial"):
        process = subprocess.Popen(command, env=env, start_new_session=True)
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob(f"{stage}/done/*.json"))) < 3:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not [path for path in tmp_path.glob(stage) if (path / "dataset_info.json").exists()]
        [partial] = tmp_path.glob(stage)
        (partial / ".half.tmp").write_text("half a shard")
    with pytest.raises(ConfigError, match="is not prepared: there is no"):
        prepared_sources(config(tmp_path, whole / "text"))
    done = list(tmp_path.glob("tokens-*.partial/done/*.json"))
    before = {path.name: path.stat().st_mtime_ns for path in done}
    made = []
    with pytest.MonkeyPatch.context() as patch:
        do = work._do
        patch.setattr(work, "_do", lambda f, job, a: (made.append(job.name), do(f, job, a)))
        prepare(config(tmp_path, whole / "text"))
    assert len(made) == 7 - len(before)
    assert contents(tmp_path) == contents(whole / "data")


@pytest.mark.slow
def test_workers_end_with_a_parent_that_was_killed(whole, tmp_path):
    program = (
        "import multiprocessing, sys, time\n"
        "from tests import test_data_prepare as t\n"
        "from moepp_jax.data import files, work\n"
        "files._PART_BYTES, work._WORTH_A_WORKER = 10_000, 1\n"
        "def stay(meter, num_bytes):\n"
        "    print(*(p.pid for p in multiprocessing.active_children()), flush=True)\n"
        "    time.sleep(60)\n"
        "work.Meter.set = stay\n"
        "t.prepare(t.config(t.Path(sys.argv[1]), sys.argv[2]), workers=2)\n"
    )
    command = [sys.executable, "-c", program, tmp_path, whole / "text"]
    env = os.environ | {"PYTHONPATH": str(TEXT.parents[2])}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        workers = process.stdout.readline().split()
        assert len(workers) == 2 and all(map(_is_alive, workers))
        process.kill()
    deadline = time.monotonic() + 20
    while any(map(_is_alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "raised",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("write() failed: No space left on device; x"),
    ],
)
def test_a_full_disk_is_one_error_and_the_rest_is_made_when_there_is_space(
    whole, tmp_path, monkeypatch, raised
):
    c = config(tmp_path, whole / "text")
    left = 5

    def close(writer):
        nonlocal left
        left -= 1
        if left < 0:
            raise raised
        return closed(writer)

    closed = shards.ShardWriter.close
    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "close", close)
        with pytest.raises(
            ConfigError, match=r"is full: No space left on device\. What is done is"
        ):
            prepare(c)
    assert not [p for p in tmp_path.iterdir() if not p.name.endswith(".partial")]
    assert not list(tmp_path.rglob("*.tmp"))
    prepare(c)
    assert contents(tmp_path) == contents(whole / "data")


@pytest.mark.slow
def test_an_error_in_one_of_several_processes_is_told_and_ends_the_others(tmp_path, small_parts):
    text = write_texts(tmp_path / "text", 400)
    good = (text / "00200.jsonl").read_text()
    (text / "00200.jsonl").write_text(good + "{broken\n")
    c = config(tmp_path / "data", text)
    with pytest.raises(ConfigError, match=r"00200\.jsonl, line 51: not JSON"):
        prepare(c, workers=2)
    assert not list((tmp_path / "data").glob("text-*/dataset_info.json"))


def test_a_shard_that_is_damaged_or_missing_is_found(whole, tmp_path):
    c = config(tmp_path, whole / "text")
    made = contents(whole / "data")
    for name, content in made.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    lines = []
    verify(c, lines.append)
    assert len(lines) == 2 and all("as written" in line for line in lines)
    folder = prepared_sources(c).tokens["source0"]
    for name in (n for n in made if n.startswith("tokens-")):
        file = tmp_path / name
        if file.name == "manifest.json":
            continue
        content = bytearray(made[name])
        content[len(content) // 50] ^= 1
        file.write_bytes(content)
        with pytest.raises(storage.DataError, match=f"{file.name} is not as it was written"):
            verify(c, lines.append)
        file.write_bytes(content[:-1])
        split = "validation" if "validation" in file.name else "train"
        with pytest.raises(storage.DataError, match=f"{file.name} has .* bytes, not its"):
            tokens.TokenDocuments(folder, split)
        file.unlink()
        with pytest.raises(storage.DataError, match=f"{file.name} is missing"):
            tokens.TokenDocuments(folder, split)
        file.write_bytes(made[name])
    endless = re.sub(r'"size": \d+', '"size": 1e999', (folder / "manifest.json").read_text())
    for text in ("{", "[]", endless):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(storage.DataError, match=r"manifest\.json cannot be read"):
            tokens.TokenDocuments(folder, "train")


def test_no_flipped_byte_is_ever_read(whole, tmp_path):
    prepared = prepared_sources(config(whole / "data", whole / "text"))
    source_folder = prepared.tokens["source0"]
    expected = [ids.tobytes() for ids in tokens.TokenDocuments(source_folder, "validation")]
    for name, content in contents(source_folder).items():
        (tmp_path / name).write_bytes(content)
    [shard, *_] = [s for s in records.shards(tmp_path, "validation") if s.records]
    file = tmp_path / shard.file
    content = file.read_bytes()
    used = np.flatnonzero(np.frombuffer(content, np.uint8))
    noticed = 0
    for at in used[:: max(1, len(used) // 100)]:
        flipped = bytearray(content)
        flipped[at] ^= 1 << (at % 8)
        file.write_bytes(flipped)
        try:
            read = [ids.tobytes() for ids in tokens.TokenDocuments(tmp_path, "validation")]
        except storage.DataError as error:
            assert shard.file in str(error)
            noticed += 1
        else:
            assert read == expected, at
    assert noticed > 80


def test_a_run_needs_neither_the_sources_nor_the_text(whole, tmp_path):
    text = write_texts(tmp_path / "text", 100)
    c = config(tmp_path / "data", text)
    made = prepare(c)
    for path in [*text.iterdir(), *(tmp_path / "data").glob("text-*/*")]:
        path.unlink()
    text.rmdir()
    [folder] = (tmp_path / "data").glob("text-*")
    folder.rmdir()
    lines = []
    assert prepared_sources(c).tokens == made.tokens == prepare(c, lines).tokens
    assert len(lines) == 1 and "using text-" in lines[0]
    with pytest.raises(ConfigError, match=r"there is no .*/text-\w+, the text of .*source0"):
        prepare(dataclasses.replace(c, model=dataclasses.replace(c.model, vocab_size=310)))


def test_a_source_that_has_changed_is_prepared_again_and_that_is_said(tmp_path):
    text = write_texts(tmp_path / "text", 100)
    c = config(tmp_path / "data", text)
    before = prepare(c)
    with (text / "00000.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    assert prepared_sources(c).tokens == before.tokens
    lines = []
    after = prepare(c, lines)
    assert "has changed since text-" in lines[0]
    assert after.tokens != before.tokens
    assert prepared_sources(c).tokens == after.tokens


def test_sources_share_a_tokenizer_that_neither_names_order_nor_weights_change(tmp_path):
    a, b = write_texts(tmp_path / "a", 50), TEXT
    of = {"model.vocab_size": 400}
    made = prepare(config(tmp_path / "data", a, b, **of))
    assert len(set(made.tokens.values())) == 2
    lines = []
    other = prepare(
        config(tmp_path / "data", b, a, **of, **{"data.sources.source0.weight": 3.0}), lines
    )
    assert not lines and other.tokenizer.files == made.tokenizer.files
    assert other.tokens["source0"] == made.tokens["source1"]
    alone = prepare(config(tmp_path / "data", a, **of), lines)
    assert alone.tokenizer.files != made.tokenizer.files
    assert {line.split(":")[0] for line in lines} == {"tokenizer", "tokens"}


def test_a_source_of_weight_zero_is_left_out_and_that_is_said(tmp_path):
    a = write_texts(tmp_path / "a", 50)
    alone = prepare(config(tmp_path / "data", a))
    lines = []
    c = config(tmp_path / "data", a, tmp_path / "absent", **{"data.sources.source1.weight": 0.0})
    made = prepare(c, lines)
    [line] = lines
    assert line.startswith("sources: source1 left out") and "weight is 0" in line
    assert made.tokens == alone.tokens == prepared_sources(c).tokens
    assert made.tokenizer.files == alone.tokenizer.files
    assert estimate.estimate(c, lines.append).keys() == {"source0"}


def test_empty_documents_are_left_out_and_counted(tmp_path):
    text = write_texts(tmp_path / "text", 50)
    with (text / "00000.jsonl").open("a") as file:
        file.write('{"text": ""}\n{"text": " \\n "}\n')
    lines = []
    prepare(config(tmp_path / "data", text), lines)
    assert any("2 empty ones left out" in line for line in lines)


def test_a_document_of_50_mb_among_others_keeps_its_text(tmp_path, monkeypatch):
    """Here 300 kB, where pieces are 50 kB."""
    monkeypatch.setattr("moepp_jax.data.sentencepiece_file._PIECE", 50_000)
    long = " ".join(text_of(i) for i in range(1500))
    text = write_texts(tmp_path / "text", 50)
    (text / "long.jsonl").write_text(json.dumps({"text": long}) + "\n")
    made = prepare(config(tmp_path / "data", text))
    found = [
        made.tokenizer.decode(ids)
        for split in records.SPLITS
        for ids in tokens.TokenDocuments(made.tokens["source0"], split)
    ]
    assert long in found and len(found) == 51


def test_a_dry_run_says_what_there_is_and_writes_nothing(whole, tmp_path, monkeypatch):
    c = config(tmp_path, whole / "text")
    size = sum(len(text_of(i)) for i in range(400))
    lines = []
    [exact] = estimate.estimate(c, lines.append).values()
    assert (exact.documents, exact.text_bytes, exact.exact) == (400, size, True)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(estimate, "_PLACES", 3)
    monkeypatch.setattr(estimate, "_SAMPLE", 6000)
    [sampled] = estimate.estimate(config(whole / "data", whole / "text"), lines.append).values()
    assert not sampled.exact and "prepared already" in lines[-2]
    assert sampled.documents == pytest.approx(400, rel=0.1)
    assert sampled.text_bytes == pytest.approx(size, rel=0.1)
    real = prepared_sources(config(whole / "data", whole / "text"))
    counted = sum(
        tokens.TokenDocuments(real.tokens["source0"], s).starts[-1] for s in records.SPLITS
    )
    assert sampled.tokens == pytest.approx(counted, rel=0.1)
    assert any(line.startswith("disk: about ") for line in lines)


def test_the_commands_estimate_prepare_and_verify(whole, tmp_path, monkeypatch, capsys):
    c = config(tmp_path, whole / "text", **{"train.batch_size": 4})
    monkeypatch.setattr(command.options, "given_config", lambda: c)
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(dry_run=True):
        command.run(["prepare"])
    assert "source0: " in capsys.readouterr().out and not list(tmp_path.iterdir())
    with flagsaver.flagsaver(workers=1):
        command.run(["prepare"])
    assert contents(tmp_path) == contents(whole / "data")
    command.run(["verify"])
    assert capsys.readouterr().out.count("are as written") == 2


def test_progress_is_told_in_lines_where_there_is_no_terminal(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "_LINE_EVERY", 0.0)
    lines = []
    prepare(config(tmp_path, whole / "text"), lines)
    assert any("ETA 0:00:0" in line and line.startswith("tokens: ") for line in lines)


def test_text_longer_than_the_block_is_shuffled_block_by_block(monkeypatch):
    monkeypatch.setattr(corpus, "_BLOCK", 1000)
    documents = [corpus.Document(str(i), "s", f"{i:0100}") for i in range(95)]
    shuffled = list(corpus._shuffled(("train", d) for d in documents))
    ids = [int(document.id) for _, document in shuffled]
    assert sorted(ids) == list(range(95)) and ids != sorted(ids)
    assert all(sorted(ids[i : i + 10]) == list(range(i, i + 10)) for i in range(0, 90, 10))
