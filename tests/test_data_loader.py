"""From a configuration to batches: the same ones every time, without TensorFlow or a network."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moepp_jax.config import Config
from moepp_jax.configs import base, tiny
from moepp_jax.data import (
    DataError,
    Dataset,
    Tokenizer,
    describe,
    open_dataset,
    packages,
    prepare,
    reading,
    tokens,
)
from moepp_jax.data.files import FilesCorpus
from moepp_jax.data.prepare import prepared_sources
from moepp_jax.errors import ConfigError

TEXT = Path(__file__).parent / "data" / "text"


def config(folder: Path, **changes) -> Config:
    fields = tiny.get_config()
    fields.data.update(dir=str(folder), eval_fraction=0.2, seq_len=32)
    fields.data.sources.text.path = str(TEXT)
    fields.moe.group_size = 32
    fields.model.vocab_size = 400
    fields.train.batch_size = 4
    fields.update_from_flattened_dict(changes)
    return Config.parse(fields)


@pytest.fixture(scope="module", autouse=True)
def small_records():
    """Of less than many a document, and more than a few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_RECORD", 50)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(config(folder), report=lambda line: None)
    return folder


@pytest.fixture
def dataset(folder):
    return open_dataset(config(folder))


@pytest.fixture
def source(dataset):
    return dataset.sources["text"]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_the_documents_come_back_from_their_tokens(dataset, source):
    texts = {file.read_text().strip() for file in TEXT.glob("*.txt")}
    train, held_out = (
        {dataset.tokenizer.decode(ids) for ids in documents}
        for documents in (source.train_documents, source.eval_documents)
    )
    assert train | held_out == texts and not train & held_out
    for documents in (source.train_documents, source.eval_documents):
        for ids, length, num_bytes in zip(
            documents, documents.lengths, documents.num_bytes, strict=True
        ):
            assert ids.dtype == np.uint16 and len(ids) == length
            assert (ids[0], ids[-1]) == (1, 2)
            assert len(dataset.tokenizer.decode(ids).encode()) == num_bytes
        assert documents.total_bytes == sum(documents.num_bytes)
        assert documents.starts[-1] == sum(map(len, documents))


def test_the_tokenizer_has_learnt_from_the_training_split_only(dataset):
    texts = [dataset.tokenizer.decode(ids) for ids in dataset.train_documents()]
    assert Tokenizer.train(texts, 400).fingerprint == dataset.tokenizer.fingerprint


def test_a_second_prepare_makes_nothing(folder):
    def state():
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    before, lines = state(), []
    prepare(config(folder), lines.append)
    assert state() == before and not lines


def test_another_row_length_makes_nothing_and_another_vocabulary_only_what_it_must(folder):
    lines = []
    longer = prepare(config(folder, **{"data.seq_len": 64}), lines.append)
    assert longer.train_batch(0)["tokens"].shape == (4, 64) and not lines
    prepare(config(folder, **{"model.vocab_size": 350}), lines.append)
    assert {line.split(":")[0] for line in lines} == {"tokenizer", "tokens"}


def test_preparing_again_elsewhere_gives_the_same_batches(dataset, tmp_path):
    again = prepare(config(tmp_path), report=lambda line: None)
    assert_equal(again.train_batch(7), dataset.train_batch(7))
    for a, b in zip(again.eval_batches(), dataset.eval_batches(), strict=True):
        assert_equal(a, b)


def test_a_batch_is_a_function_of_seed_and_step(dataset, folder):
    assert_equal(open_dataset(config(folder)).train_batch(3), dataset.train_batch(3))
    other = open_dataset(config(folder, seed=1)).train_batch(3)
    assert (other["tokens"] != dataset.train_batch(3)["tokens"]).any()


def test_every_epoch_has_every_row_once_in_its_own_order(dataset, source):
    n = len(source.train)
    steps = -(-2 * n // 4)
    rows = np.concatenate([dataset.train_batch(step)["tokens"] for step in range(steps)])
    first, second = ([row.tobytes() for row in rows[k * n : (k + 1) * n]] for k in range(2))
    in_order = source.train.read(np.arange(n))["tokens"]
    assert sorted(first) == sorted(second) == sorted(row.tobytes() for row in in_order)
    assert first != second
    assert dataset.taken(steps)["text"] == (steps * 128, steps * 4 / n)


@pytest.mark.parametrize("piece", [1, 400, 2**16])
def test_read_ahead_batches_are_those_of_their_steps(dataset, monkeypatch, piece):
    """Read one by one, three together and all together."""
    monkeypatch.setattr(reading, "_PIECE", piece)
    for step, batch in zip(range(5, 30), dataset.train_batches(5), strict=False):
        assert_equal(batch, dataset.train_batch(step))


def test_processes_that_read_their_rows_read_the_batch_together(dataset):
    halves = [dataset.train_batch(2, rows) for rows in (slice(0, 2), slice(2, 4))]
    whole = dataset.train_batch(2)
    assert_equal({name: np.concatenate([h[name] for h in halves]) for name in whole}, whole)
    assert_equal(next(dataset.train_batches(2, slice(2, 4))), halves[1])
    ours = [batch["tokens"] for batch in dataset.eval_batches(slice(1, 3))]
    np.testing.assert_array_equal(ours, [b["tokens"][1:3] for b in dataset.eval_batches()])


def test_an_error_on_the_thread_reaches_the_reader(dataset, monkeypatch):
    def fail(training, steps, rows):
        raise OSError("the disk is gone")

    monkeypatch.setattr(reading.Training, "batches", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        next(dataset.train_batches())


def test_evaluation_covers_the_held_out_text_and_pads_the_last_batch(dataset, source):
    batches = list(source.eval_batches())
    documents = source.eval_documents
    targets = sum(batch["loss_mask"].sum() for batch in batches)
    assert targets == sum(documents.lengths) - len(documents)
    assert all(value.shape == (4, 32) for batch in batches for value in batch.values())
    assert (batches[-1]["segments"][-1] == 0).all()
    assert source.bytes_per_target == sum(documents.num_bytes) / targets
    for a, b in zip(source.eval_batches(2), batches[:2], strict=True):
        assert_equal(a, b)
    assert len(list(source.eval_batches(10**9))) == len(batches)


def test_fewer_rows_than_a_batch_is_an_error_in_training_only(folder):
    few = open_dataset(config(folder, **{"train.batch_size": 100_000}))
    wanted = (
        r"batch_size = 100000 takes 100,000 rows of config.data.sources.text at once, more than"
    )
    for read in (few.train_batch, few.train_batches):
        with pytest.raises(ConfigError, match=wanted):
            read(0)
    (batch,) = few.eval_batches()
    assert batch["tokens"].shape == (100_000, 32)


def test_the_table_says_what_there_is_and_what_a_run_makes_of_it(dataset, source):
    head, line = map(str.split, describe(dataset, steps=30).splitlines())
    trained_on = sum(map(len, source.train_documents))
    assert [head[i] for i in (0, 1, 3, -1)] == ["source", "share", "tokens", "epochs"]
    documents = str(len(source.train_documents))
    held_out = sum(map(len, source.eval_documents))
    epochs = f"{120 / len(source.train):.2f}"
    filled = "100.00%"  # of the places in training rows
    assert line == [
        *["text", "100.00%", documents, f"{trained_on:,}", filled, f"{held_out:,}", "3,840", epochs]
    ]


def test_a_tokenizer_from_elsewhere_is_used_as_it_is(dataset, tmp_path):
    file = tmp_path / "mine.model"
    dataset.tokenizer.save(file)
    lines = []
    mine = prepare(config(tmp_path / "data", **{"data.tokenizer": str(file)}), lines.append)
    assert_equal(mine.train_batch(0), dataset.train_batch(0))
    assert not any(line.startswith("tokenizer") for line in lines)


def test_a_vocabulary_below_the_tokenizers_is_an_error_before_any_work(dataset, tmp_path):
    file = tmp_path / "mine.model"
    dataset.tokenizer.save(file)
    wrong = config(tmp_path / "data", **{"data.tokenizer": str(file), "model.vocab_size": 300})
    with pytest.raises(
        ConfigError, match=r"vocab_size = 300 is less than the 400 .*mine\.model: set it to 400"
    ):
        prepare(wrong, report=lambda line: None)
    assert not list((tmp_path / "data").iterdir())


def test_a_vocabulary_above_the_tokenizers_is_as_published_models_have_it(dataset, tmp_path):
    file, lines = tmp_path / "mine.model", []
    dataset.tokenizer.save(file)
    more = config(tmp_path / "data", **{"data.tokenizer": str(file), "model.vocab_size": 500})
    assert_equal(prepare(more, lines.append).train_batch(0), dataset.train_batch(0))
    assert f"tokenizer: 100 of config.model.vocab_size are no piece of {file}" in lines


def test_opening_what_is_not_prepared_names_the_folder_and_the_remedy(tmp_path):
    absent = rf"there is no {tmp_path}/source-\w+\.json, of .*; make it with .*moepp data prepare"
    with pytest.raises(ConfigError, match=absent):
        open_dataset(config(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_note_of_a_source_that_is_no_file_is_damage(tmp_path):
    with pytest.raises(ConfigError) as absent:
        open_dataset(config(tmp_path))
    (tmp_path / re.search(r"source-\w+\.json", str(absent.value))[0]).mkdir()
    with pytest.raises(DataError, match=r"source-\w+\.json is damaged .*it is a folder"):
        open_dataset(config(tmp_path))


def test_a_data_folder_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"config\.data\.dir = .*file"):
        prepare(config(tmp_path / "file"), report=lambda line: None)


def test_the_default_corpus_once_prepared_needs_no_package(tmp_path, monkeypatch):
    text = FilesCorpus(str(TEXT))
    default = config(tmp_path, **{"data.sources.text.path": "default"})
    with monkeypatch.context() as patch:
        patch.setattr(packages.DefaultCorpus, "fetch", lambda self, report: None)
        patch.setattr(packages.DefaultCorpus, "parts", lambda self: text.parts())
        prepare(default, report=lambda line: None)
    monkeypatch.setattr(packages.subprocess, "run", lambda *a, **k: pytest.fail("a download"))
    assert prepare(default).train_batch(0)["tokens"].shape == (4, 32)


WEIGHTS = {"a": 5.0, "b": 2.0, "c": 1.0, "unused": 0.0}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Config:
    """Three folders of four texts each, and one that is not wanted."""
    folder = tmp_path_factory.mktemp("mixed")
    files = sorted(TEXT.glob("*.txt"))
    fields = config(folder / "data", **{"train.batch_size": 8}).to_dict()
    fields["data"]["sources"] = {}
    for i, (name, weight) in enumerate(WEIGHTS.items()):
        (folder / name).mkdir()
        for file in files[4 * (i % 3) :][:4]:
            shutil.copy(file, folder / name)
        fields["data"]["sources"][name] = base.source(str(folder / name), weight)
    mixed = Config.parse(fields)
    prepare(mixed, report=lambda line: None)
    return mixed


def test_rows_of_each_source_come_by_its_weight(mixed):
    dataset = open_dataset(mixed)
    assert dataset.shares == {"a": 5 / 8, "b": 2 / 8, "c": 1 / 8}
    of_row = {
        row.tobytes(): name
        for name, source in dataset.sources.items()
        for row in source.train.read(np.arange(len(source.train)))["tokens"]
    }
    for step in range(40):
        names = [of_row[row.tobytes()] for row in dataset.train_batch(step)["tokens"]]
        assert sorted(names) == ["a"] * 5 + ["b"] * 2 + ["c"]
    for name, taken in dataset.taken(40).items():
        assert taken.tokens == 32 * 40 * WEIGHTS[name]
        assert taken.epochs == 40 * WEIGHTS[name] / len(dataset.sources[name].train)


def test_the_order_of_a_source_does_not_depend_on_the_others(mixed):
    dataset = open_dataset(mixed)
    alone = mixed.to_dict()
    alone["data"]["sources"] = {"b": alone["data"]["sources"]["b"]}
    b = Dataset(Config.parse(alone), prepared_sources(mixed))
    all_rows = np.concatenate([dataset.train_batch(step)["tokens"] for step in range(4)])
    ours = [row.tobytes() for row in all_rows]
    places = [ours.index(row.tobytes()) for row in b.train_batch(0)["tokens"]]
    assert places == sorted(places)


def test_mixed_batches_are_functions_of_their_step_for_any_processes(mixed):
    dataset = open_dataset(mixed)
    for step in (3, 10**6):
        whole = dataset.train_batch(step)
        parts = [dataset.train_batch(step, np.arange(8)[i::4]) for i in range(4)]
        for name, values in whole.items():
            for i in range(4):
                np.testing.assert_array_equal(parts[i][name], values[i::4])
        assert_equal(next(open_dataset(mixed).train_batches(step)), whole)


def test_no_text_that_is_evaluated_is_trained_on(mixed):
    dataset = open_dataset(mixed)
    held_out = {ids.tobytes() for s in dataset.sources.values() for ids in s.eval_documents}
    assert held_out and not held_out & {ids.tobytes() for ids in dataset.train_documents()}
    batches = list(dataset.eval_batches())
    assert len(batches) >= 3  # one of each source, at least


def damage(mixed, tmp_path, change) -> tuple[Config, Path]:
    """A copy of the prepared data in which a file of source b is changed."""
    folder = tmp_path / "data"
    shutil.copytree(mixed.data.dir, folder)
    made = folder / prepared_sources(mixed).tokens["b"].name
    (file,) = made.rglob("*train.array_record*")
    change(file)
    return mixed.replace("data", dir=str(folder)), file


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_named_and_never_trained_on(mixed, tmp_path, workers):
    def flip(file):
        content = bytearray(file.read_bytes())
        used = np.flatnonzero(np.frombuffer(content, np.uint8))
        content[used[len(used) // 4]] ^= 4  # in one of the records: their index is at the end
        file.write_bytes(content)

    damaged, file = damage(mixed, tmp_path, flip)
    intact, dataset = open_dataset(mixed), open_dataset(damaged)
    good = next(step for step in range(50) if not fails(dataset, step))
    bad = next(step for step in range(good, 50) if fails(dataset, step))
    damaged = damaged.replace("data", worker_processes=workers)
    batches = open_dataset(damaged).train_batches(good)  # all of these steps are read together
    for step in range(good, bad):
        assert_equal(next(batches), intact.train_batch(step))
    with pytest.raises(DataError, match=rf"{file}, record \d+, cannot be read: .*prepare it anew"):
        next(batches)


def fails(dataset, step) -> bool:
    try:
        dataset.train_batch(step)
    except DataError:
        return True
    return False


WORKERS = """
import multiprocessing, os, signal, sys, time
from moepp_jax.errors import ConfigError
from moepp_jax.data import reading
from tests.test_data_loader import Path, assert_equal, config, open_dataset

if __name__ == "__main__":
    c = config(Path(sys.argv[1]), **{"data.worker_processes": 2})
    reading._PIECE = 200  # three steps
    dataset = open_dataset(c)
    there = dataset.train_batches(3, slice(1, 3))
    for step in range(3, 40):
        assert_equal(next(there), dataset.train_batch(step, slice(1, 3)))
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)  # which may be for the whole job
    time.sleep(1)
    assert all(worker.is_alive() for worker in workers)
    assert_equal(next(there), dataset.train_batch(40, slice(1, 3)))
    os.kill(workers[0].pid, signal.SIGKILL)
    try:
        for batch in there:
            pass
    except ConfigError as error:
        print("error:", error)
"""


@pytest.mark.slow
def test_worker_processes_read_the_same_batches_and_a_killed_one_is_an_error(folder, tmp_path):
    (tmp_path / "program.py").write_text(WORKERS)
    run = subprocess.run(
        [sys.executable, tmp_path / "program.py", folder],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("error: one of config.data.worker_processes = 2 was killed")


def test_a_record_of_another_length_is_named(mixed):
    documents = open_dataset(mixed).sources["b"].train_documents
    starts = documents._record_starts
    documents._record_starts = starts + (starts == starts[2])
    with pytest.raises(DataError, match=r"record 1, holds 50 tokens, not those written there"):
        list(documents)


@pytest.mark.parametrize("name", ["moepp_tokens-train.array_record-*", "train-index.npy"])
def test_a_missing_or_truncated_file_is_an_error_before_any_step(mixed, tmp_path, name):
    def truncate(file):
        (damaged,) = file.parent.glob(name)
        damaged.write_bytes(damaged.read_bytes()[:-9])

    damaged, shard = damage(mixed, tmp_path, truncate)
    with pytest.raises(DataError, match=rf"{name[:11]}.* has .* bytes, not its .*"):
        open_dataset(damaged)
    for file in shard.parent.glob(name):
        file.unlink()
    with pytest.raises(DataError, match=rf"{name[:11]}.* is missing"):
        open_dataset(damaged)


PROGRAM = """
import socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("a network look-up was started")

socket.socket.connect = socket.getaddrinfo = refuse

from moepp_jax.data import prepare
from tests.test_data_loader import Path, config

dataset = prepare(config(Path(sys.argv[1])))
next(dataset.train_batches())
next(dataset.eval_batches())
assert "tensorflow" not in sys.modules
"""


def test_neither_tensorflow_nor_a_network_is_touched(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "data"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert [line.split(":")[0] for line in run.stdout.splitlines()] == [
        *["text"] * 2,
        *["tokenizer"] * 2,
        *["tokens"] * 2,
    ]
