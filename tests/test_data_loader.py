"""From a configuration to batches: the same ones every time, without TensorFlow or a network."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs import tiny
from moepp_jax.config import Config, ConfigError
from moepp_jax.data import Tokenizer, open_dataset, packages, prepare
from moepp_jax.data.sources import LocalCorpus

TEXT = Path(__file__).parent / "data" / "text"


def config(folder: Path, **changes) -> Config:
    fields = tiny.get_config()
    fields.data.update(dir=str(folder), corpus=str(TEXT), eval_fraction=0.2, seq_len=32)
    fields.moe.group_size = 32
    fields.model.vocab_size = 400
    fields.train.batch_size = 4
    fields.update_from_flattened_dict(changes)
    return Config.parse(fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(config(folder), report=lambda line: None)
    return folder


@pytest.fixture
def dataset(folder):
    return open_dataset(config(folder))


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_the_documents_come_back_from_their_tokens(dataset):
    texts = {file.read_text().strip() for file in TEXT.glob("*.txt")}
    train, held_out = (
        {dataset.tokenizer.decode(ids) for ids in documents}
        for documents in (dataset.train_documents, dataset.eval_documents)
    )
    assert train | held_out == texts and not train & held_out
    for documents in (dataset.train_documents, dataset.eval_documents):
        for ids, length, num_bytes in zip(
            documents, documents.lengths, documents.num_bytes, strict=True
        ):
            assert ids.dtype == np.uint16 and len(ids) == length
            assert (ids[0], ids[-1]) == (1, 2)
            assert len(dataset.tokenizer.decode(ids).encode()) == num_bytes
    assert dataset.num_train_tokens == sum(map(len, dataset.train_documents))


def test_the_tokenizer_has_learnt_from_the_training_split_only(dataset):
    texts = [dataset.tokenizer.decode(ids) for ids in dataset.train_documents]
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


def test_every_epoch_has_every_row_once_in_its_own_order(dataset):
    n = len(dataset._train)
    steps = -(-2 * n // 4)
    rows = np.concatenate([dataset.train_batch(step)["tokens"] for step in range(steps)])
    first, second = ([row.tobytes() for row in rows[k * n : (k + 1) * n]] for k in range(2))
    assert (
        sorted(first)
        == sorted(second)
        == sorted(dataset._train[r]["tokens"].tobytes() for r in range(n))
    )
    assert first != second


def test_read_ahead_batches_are_those_of_their_steps(dataset):
    for step, batch in zip(range(5, 30), dataset.train_batches(5), strict=False):
        assert_equal(batch, dataset.train_batch(step))


def test_processes_that_read_their_rows_read_the_batch_together(dataset):
    halves = [dataset.train_batch(2, rows) for rows in (slice(0, 2), slice(2, 4))]
    whole = dataset.train_batch(2)
    assert_equal({name: np.concatenate([h[name] for h in halves]) for name in whole}, whole)
    assert_equal(next(dataset.train_batches(2, slice(2, 4))), halves[1])
    ours = [batch["tokens"] for batch in dataset.eval_batches(rows=slice(1, 3))]
    np.testing.assert_array_equal(ours, [b["tokens"][1:3] for b in dataset.eval_batches()])


def test_an_error_on_the_thread_reaches_the_reader(dataset, monkeypatch):
    def fail(step, rows):
        raise OSError("the disk is gone")

    monkeypatch.setattr(dataset, "train_batch", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        next(dataset.train_batches())


def test_evaluation_covers_the_held_out_text_and_pads_the_last_batch(dataset):
    batches = list(dataset.eval_batches())
    documents = dataset.eval_documents
    targets = sum(batch["loss_mask"].sum() for batch in batches)
    assert targets == sum(documents.lengths) - len(documents)
    assert all(value.shape == (4, 32) for batch in batches for value in batch.values())
    assert (batches[-1]["segments"][-1] == 0).all()
    assert dataset.eval_bytes() == sum(documents.num_bytes)
    for a, b in zip(dataset.eval_batches(2), batches[:2], strict=True):
        assert_equal(a, b)


def test_bytes_of_a_part_are_its_share_of_the_targets(dataset):
    masks = [batch["loss_mask"].sum() for batch in dataset.eval_batches()]
    expected = dataset.eval_bytes() * sum(masks[:2]) / sum(masks)
    np.testing.assert_allclose(dataset.eval_bytes(2), expected)
    assert dataset.eval_bytes(10**9) == dataset.eval_bytes()
    assert len(list(dataset.eval_batches(10**9))) == len(masks)


def test_fewer_rows_than_a_batch_is_an_error_in_training_only(folder):
    few = open_dataset(config(folder, **{"train.batch_size": 100_000}))
    for read in (few.train_batch, few.train_batches):
        with pytest.raises(ConfigError, match=r"config.train.batch_size = 100000 is more than the"):
            read(0)
    (batch,) = few.eval_batches()
    assert batch["tokens"].shape == (100_000, 32)


def test_the_description_counts_what_there_is(dataset):
    train, held_out = dataset.describe().splitlines()
    assert train.startswith(f"train: {len(dataset.train_documents)} documents, ")
    assert f"{dataset.num_train_tokens:,} tokens" in train
    assert held_out.startswith(f"validation: {len(dataset.eval_documents)} documents, ")


def test_a_tokenizer_from_elsewhere_is_used_as_it_is(dataset, tmp_path):
    file = tmp_path / "mine.model"
    dataset.tokenizer.save(file)
    lines = []
    mine = prepare(config(tmp_path / "data", **{"data.tokenizer": str(file)}), lines.append)
    assert_equal(mine.train_batch(0), dataset.train_batch(0))
    assert not any(line.startswith("tokenizer") for line in lines)


@pytest.mark.parametrize("vocab_size", [300, 500])
def test_a_vocabulary_that_is_not_the_tokenizers_is_an_error_before_any_work(
    dataset, tmp_path, vocab_size
):
    file = tmp_path / "mine.model"
    dataset.tokenizer.save(file)
    wrong = config(
        tmp_path / "data", **{"data.tokenizer": str(file), "model.vocab_size": vocab_size}
    )
    with pytest.raises(
        ConfigError, match=rf"vocab_size = {vocab_size} is not the 400 .*mine\.model"
    ):
        prepare(wrong, report=lambda line: None)
    assert not list((tmp_path / "data").iterdir())


def test_opening_what_is_not_prepared_names_the_folder_and_the_remedy(tmp_path):
    absent = rf"there is no {tmp_path}/text-\w+; make it with .*main prepare"
    with pytest.raises(ConfigError, match=absent):
        open_dataset(config(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_data_folder_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"config\.data\.dir = .*file"):
        prepare(config(tmp_path / "file"), report=lambda line: None)


def test_the_default_corpus_once_prepared_needs_no_package(tmp_path, monkeypatch):
    text = LocalCorpus(TEXT)
    default = config(tmp_path, **{"data.corpus": "default"})
    with monkeypatch.context() as patch:
        patch.setattr(packages.DefaultCorpus, "fetch", lambda self, report: None)
        patch.setattr(packages.DefaultCorpus, "documents", lambda self: text.documents())
        prepare(default, report=lambda line: None)
    monkeypatch.setattr(packages.subprocess, "run", lambda *a, **k: pytest.fail("a download"))
    assert prepare(default).train_batch(0)["tokens"].shape == (4, 32)


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
