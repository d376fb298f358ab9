"""A run's folder in an object store, here one in memory: the same files, and no half ones."""

import json

import fsspec
import pytest
import xxhash
from fsspec.implementations.memory import MemoryFileSystem

from moepp_jax import checksums, lease, parts, run_data, storage
from moepp_jax import parent as parents
from moepp_jax.data import Tokenizer, prepare
from moepp_jax.errors import ConfigError
from moepp_jax.metrics import MetricsWriter, read_metrics
from moepp_jax.storage import Staging, open_path, write_atomic
from moepp_jax.workdir import alone, keep_tokenizer, open_workdir, read_config, tokenizer_file
from tests import tiny


class InMemory(MemoryFileSystem):
    """Stands for S3: as there, nothing can be appended to."""

    protocol = "s3"
    store = {}  # noqa: RUF012 (as in its base class)
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("s3://"))

    def _open(self, path, mode="rb", **options):
        assert "a" not in mode and "+" not in mode
        return super()._open(path, mode, **options)


@pytest.fixture
def bucket():
    fsspec.register_implementation("s3", InMemory, clobber=True)
    InMemory.store.clear()
    InMemory.pseudo_dirs[:] = [""]  # folders of tests that ran before
    return "s3://bucket/runs/a"


def objects():
    return {
        name.removeprefix("/bucket/runs/a/"): f.getvalue() for name, f in InMemory.store.items()
    }


def test_a_run_in_a_bucket_is_made_once_and_refused_to_others(bucket):
    folder = open_workdir(bucket, tiny.config())
    assert str(folder) == bucket and objects().keys() == {"config.json"}
    assert read_config(bucket) == tiny.config() == read_config(open_workdir(bucket, tiny.config()))
    with pytest.raises(ConfigError, match=r"s3://bucket/runs/a holds a run of another"):
        open_workdir(bucket, tiny.config(**{"moe.rule.tau": 0.5}))
    with pytest.raises(ConfigError, match=r"s3://bucket/runs/b is no folder"):
        read_config("s3://bucket/runs/b")


def test_one_process_trains_in_a_bucket(bucket, monkeypatch):
    monkeypatch.setattr(lease, "SETTLED", 0.0)
    monkeypatch.setattr(lease, "RENEWED", 0.05)
    with alone(bucket):
        assert objects().keys() == {".train.lease"}
        monkeypatch.setattr(lease, "_is_dead_here", lambda found: False)  # it is of this process
        with pytest.raises(ConfigError, match=rf"workdir {bucket}: process \d+ of .* trains there"):
            alone(bucket, lambda line: None).__enter__()
    assert not objects()


def test_a_bucket_keeps_the_tokenizer(bucket):
    folder = open_workdir(bucket, tiny.config())
    kept = Tokenizer.train(["one text about cats and dogs", "and one about the sea"], 300)
    keep_tokenizer(folder, kept)
    keep_tokenizer(folder, kept)
    assert Tokenizer.load(tokenizer_file(bucket)).fingerprint == kept.fingerprint
    assert objects()["tokenizer.model"] == kept.files["tokenizer.model"]


def test_a_run_in_a_bucket_has_a_parent_and_its_tokenizer(bucket, tmp_path):
    parent = parents.Parent("s3://bucket/runs/old", 3, optimizer=True, checksum="abc")
    c = parents.with_tokenizer(tiny.config(), bucket, parent)
    assert c.data.tokenizer == f"{bucket}/tokenizer.model"
    there = parents.to_prepare(c, bucket, parent)
    assert there.data.tokenizer == "s3://bucket/runs/old/tokenizer.model"
    kept = Tokenizer.train([(tiny.TEXT / "bees.txt").read_text()], 384)
    keep_tokenizer(open_path(parent.workdir), kept)
    dataset = prepare(there.replace("data", dir=str(tmp_path)), report=lambda line: None)
    assert dataset.tokenizer.fingerprint == kept.fingerprint
    open_workdir(bucket, c, parents.files(parent) | run_data.files(dataset))
    assert objects().keys() >= {"config.json", "parent.json", "tokenizer.model"}
    assert parents.of_run(f"{bucket}/", parents.given("s3://bucket/runs/old/@3", True)) == parent
    assert parents.to_prepare(c, bucket, parent) == c  # now it has a copy


def test_metrics_are_in_the_bucket_when_they_must_be_and_go_on_there(bucket, monkeypatch):
    with MetricsWriter(bucket) as metrics:
        metrics.write(1, loss=1.0, seconds=5.0)
        assert [row["step"] for row in read_metrics(bucket)] == [1]
        metrics.write(2, loss=2.0)  # not worth a copy of the file yet
        assert [row["step"] for row in read_metrics(bucket)] == [1]
        metrics.flush()
        assert [row["step"] for row in read_metrics(bucket)] == [1, 2]
        metrics.write(3, loss=3.0)
        local = metrics.staging.folder
    assert [row["step"] for row in read_metrics(bucket)] == [1, 2, 3]
    assert not local.exists()
    with MetricsWriter(bucket, resume_step=2) as metrics:
        assert metrics.seconds_so_far == 5.0
        monkeypatch.setattr(storage, "_COPY_EVERY", 0.0)
        metrics.write(9, loss=4.0)
        assert [row["step"] for row in read_metrics(bucket)] == [1, 2, 9]
    events = [name for name in objects() if name.startswith("tensorboard/")]
    assert events and all(b"loss" in objects()[name] for name in events)


def steps(workdir):
    return [row["step"] for row in read_metrics(workdir)]


class TooManyRequestsError(Exception):
    """As packages of stores raise them: no OSError."""


def test_a_store_that_fails_for_a_while_ends_nothing_between_checkpoints(bucket, monkeypatch):
    def fail(*_, **__):
        raise TooManyRequestsError("429, try again\nlater")

    said, clock = [], iter(range(0, 9000, 40))
    monkeypatch.setattr(storage.time, "monotonic", lambda: next(clock))
    with MetricsWriter(bucket, -1, said.append) as metrics:
        metrics.write(1, loss=1.0)
        with monkeypatch.context() as patch:
            patch.setattr(InMemory, "pipe_file", fail)
            patch.setattr(InMemory, "_open", fail)
            metrics.write(2, loss=1.0)
            metrics.write(3, loss=1.0)
            with pytest.raises(ConfigError, match=r"metrics.jsonl cannot be written: TooManyReq"):
                metrics.flush()
        assert steps(bucket) == [1]
        metrics.write(4, loss=1.0)
        assert steps(bucket) == [1, 2, 3, 4]
    (line,) = said
    assert line.startswith(
        f"warning: {bucket}/metrics.jsonl cannot be written: TooManyRequestsError: 4"
    )
    assert "\n" not in line and line.endswith("its rows wait, and it is tried again")


def test_a_resume_in_a_bucket_writes_what_is_new_alone(bucket):
    with MetricsWriter(bucket) as metrics:
        for step in range(1, 8):
            metrics.write(step, loss=float(step))
    first = objects()["metrics.jsonl"]
    with MetricsWriter(bucket, resume_step=5) as metrics:  # killed after step 7, saved at step 5
        metrics.write(6, loss=0.0, seconds=3.0)
    with MetricsWriter(bucket, resume_step=6) as metrics:
        assert metrics.seconds_so_far == 3.0 and steps(bucket) == [1, 2, 3, 4, 5, 6]
    with MetricsWriter(bucket, resume_step=6) as metrics:  # nothing was written in between
        metrics.write(7, loss=0.5)
        metrics.write(7, eval_loss=0.25)
    there = {name: content for name, content in objects().items() if name.startswith("metrics")}
    assert there.keys() == {
        "metrics.jsonl",
        "metrics-00002-from-5.jsonl",
        "metrics-00003-from-6.jsonl",
    }
    assert there["metrics.jsonl"] == first
    assert [content.count(b"\n") for _, content in sorted(there.items())] == [1, 2, 7]
    assert steps(bucket) == [1, 2, 3, 4, 5, 6, 7, 7]
    assert [row["loss"] for row in read_metrics(bucket)[-3:-1]] == [0.0, 0.5]


def test_a_long_run_in_a_bucket_begins_another_part_now_and_then(bucket, monkeypatch):
    monkeypatch.setattr(parts, "_LARGE", 100)
    monkeypatch.setattr(storage, "_COPY_EVERY", 0.0)
    with MetricsWriter(bucket) as metrics:
        for step in range(1, 31):
            metrics.write(step, loss=1.0)
    there = [content for name, content in objects().items() if name.startswith("metrics")]
    assert len(there) > 5 and max(map(len, there)) < 150
    assert steps(bucket) == list(range(1, 31))
    with MetricsWriter(bucket, resume_step=12) as metrics:
        metrics.write(13, loss=2.0)
    assert steps(bucket) == list(range(1, 14))


def test_a_damaged_part_costs_its_line_alone(bucket):
    with MetricsWriter(bucket) as metrics:
        metrics.write(1, loss=1.0)
        metrics.write(2, loss=1.0)
    with MetricsWriter(bucket, resume_step=2) as metrics:
        metrics.write(3, loss=1.0)
        metrics.write(4, loss=1.0)
    name = "metrics-00002-from-2.jsonl"
    (open_path(bucket) / name).write_bytes(objects()[name].replace(b'{"step": 3', b"{step:"))
    with pytest.raises(ConfigError, match=rf"{name}, line 1 is no JSON object with a step"):
        read_metrics(bucket)
    said = []
    with MetricsWriter(bucket, 4, said.append) as metrics:
        metrics.write(5, loss=1.0)
    assert len(said) == 1 and "from step 2 on up to step 4 is lost" in said[0]
    assert steps(bucket) == [1, 2, 4, 5] and name not in objects()
    assert b"{step:" in objects()["metrics.jsonl.damaged"]


def test_a_folder_copied_from_a_bucket_goes_on_in_one_file(bucket, tmp_path):
    for start in (-1, 2, 4):
        with MetricsWriter(bucket, resume_step=start) as metrics:
            for step in range(start + 1 or 1, start + 5):
                metrics.write(step, loss=float(start))
    for name, content in objects().items():
        if name.startswith("metrics"):
            (tmp_path / name).write_bytes(content)
    assert steps(tmp_path) == steps(bucket)
    with MetricsWriter(tmp_path, resume_step=5) as metrics:
        metrics.write(6, loss=9.0)
    assert {entry.name for entry in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)][-4:] == [
        (3, 2.0),
        (4, 2.0),
        (5, 4.0),
        (6, 9.0),
    ]


def test_checksums_are_taken_and_checked_in_a_bucket(bucket):
    folder = open_path(bucket) / "checkpoints" / "3"
    content = {"params/d/a": b"1", "params/b": b"2", "rest/c": b"3"}
    for name, data in content.items():
        write_atomic(folder / name, data)
    checksums.write(folder, ["params", "rest", "meta"])
    expected = {name: [xxhash.xxh3_128(data).hexdigest()] for name, data in content.items()}
    assert json.loads((folder / "checksums.json").read_text()) == expected
    assert not any(checksums.verdict(folder, ["params", "rest"], ["params"]))
    write_atomic(folder / "rest/c", b"4")
    assert not any(checksums.verdict(folder, ["params"], ["params"]))
    assert checksums.verdict(folder, ["rest"], []).damage == "rest/c is not as it was saved"


def test_a_local_folder_is_written_in_place(tmp_path):
    staging = Staging(tmp_path)
    assert staging.folder == tmp_path == open_path(str(tmp_path))
    (staging.fetch("a")).write_text("x")
    staging.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_what_another_process_is_renaming_is_not_copied(bucket, monkeypatch):
    staging = Staging(bucket)
    for name in ("a", "gone", ".a.0123.tmp"):
        (staging.folder / name).write_text("x")

    real = type(staging.folder).stat

    def stat(path, **options):
        if path.name == "gone":
            raise FileNotFoundError(2, "No such file or directory")
        return real(path, **options)

    monkeypatch.setattr(type(staging.folder), "stat", stat)
    staging.copy(now=True)
    assert objects().keys() == {"a"}


def test_no_listing_of_a_bucket_is_remembered(bucket):
    fsspec.config.conf.pop("s3", None)
    InMemory.clear_instance_cache()
    open_path(bucket)
    assert fsspec.filesystem("s3").dircache.use_listings_cache is False


def test_storage_that_cannot_be_used_says_what_would_help(monkeypatch):
    with pytest.raises(ConfigError, match=r"ftp://x/y: ftp:// is no known storage; there are gs"):
        open_path("ftp://x/y")

    def missing(*_, **__):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(ConfigError, match=r"gs://x/y: gs:// needs a package .* pip install gcsfs"):
        open_path("gs://x/y")
