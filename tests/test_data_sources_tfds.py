"""Data sets that TFDS has prepared, from a folder, by name and from a bucket; never downloaded."""

import io
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moepp_jax.config import Config
from moepp_jax.configs import tiny
from moepp_jax.configs.base import source
from moepp_jax.data import corpus, records, storage, tfds_sets
from moepp_jax.data.tfds_sets import TfdsCorpus
from moepp_jax.errors import ConfigError
from tests.test_data_prepare import text_of


class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Sixty texts to train on, some others in `validation` and `test`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="en", version="1.0.0")]  # noqa: RUF012
    splits = {"train": range(60), "validation": range(60, 64), "test": range(64, 70)}  # noqa: RUF012

    def _info(self):
        features = {"text": tfds.features.Text(), "url": tfds.features.Text()}
        features["n"] = tfds.features.Scalar(np.int64)
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(numbers) for split, numbers in self.splits.items()}

    def _generate_examples(self, numbers):
        for i in numbers:
            yield i, {"text": text_of(i), "url": f"u{i}", "n": i}


class WithoutValidation(Small, skip_registration=True):
    splits = {"train": range(60), "test": range(64, 70)}  # noqa: RUF012


def build(kind: type[Small], folder: Path, file_format: str = "array_record") -> Path:
    builder = kind(data_dir=folder, file_format=file_format)
    tfds.disable_progress_bar()
    with redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
            download_dir=folder / "downloads",
            download_config=tfds.download.DownloadConfig(try_download_gcs=False, num_shards=3),
        )
    return Path(builder.data_path)


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    build(Small, folder)
    build(WithoutValidation, folder)
    return folder


def prepared(tmp_path: Path, path: str, tfds_dir: Path | str = "", **changes):
    fields = tiny.get_config()
    fields.data.update(dir=str(tmp_path), tfds_dir=str(tfds_dir), eval_fraction=0.2)
    fields.data.sources = {"a": source(path)}
    fields.update_from_flattened_dict(changes)
    data = Config.parse(fields).data
    text = corpus.open_corpus(data, "a")
    folder = corpus.prepare_text(data, text, lambda line: None)
    return {s: sorted(corpus.Texts(folder, s)) for s in records.SPLITS}, text


@pytest.mark.parametrize("path", ["tfds:small/en", "tfds:small/en:1.0.0", "FOLDER/small/en/1.0.0"])
def test_a_prepared_data_set_keeps_its_own_validation_split(tfds_dir, tmp_path, path):
    splits, text = prepared(tmp_path, path.replace("FOLDER", str(tfds_dir)), tfds_dir)
    assert splits["train"] == sorted(map(text_of, range(60)))
    assert splits["validation"] == sorted(map(text_of, range(60, 64)))
    assert len(text.parts()) == 6


def test_without_one_documents_of_train_are_held_out_and_test_is_never_read(tfds_dir, tmp_path):
    splits, _ = prepared(tmp_path, "tfds:without_validation/en", tfds_dir)
    assert 2 < len(splits["validation"]) < 30
    assert sorted(splits["train"] + splits["validation"]) == sorted(map(text_of, range(60)))


def test_another_feature_may_hold_the_text(tfds_dir, tmp_path):
    field = {"data.sources.a.text_field": "url"}
    splits, _ = prepared(tmp_path, "tfds:small/en", tfds_dir, **field)
    assert splits["validation"] == ["u60", "u61", "u62", "u63"]
    with pytest.raises(ConfigError, match=r"no text feature 'n'; there is 'text', 'url'"):
        prepared(tmp_path, "tfds:small/en", tfds_dir, **{"data.sources.a.text_field": "n"})


def test_a_data_set_in_a_bucket_is_read_from_copies(tfds_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_sets, "is_local", lambda path: False)
    copied = []

    def note(path):
        copied.append(path.name)
        return path

    monkeypatch.setattr(tfds_sets, "open_path", lambda path: note(tfds_sets.Path(path)))
    monkeypatch.setattr(Path, "copy", lambda self, to: to.write_bytes(self.read_bytes()), False)
    splits, _ = prepared(tmp_path, f"{tfds_dir}/small/en/1.0.0")
    assert splits["train"] == sorted(map(text_of, range(60)))
    assert sum("array_record" in name for name in copied) == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tfds:nowhere/en",
            r"no such data set in .*/nowhere/en; make it with .*builder\('nowhere/en', ",
        ),
        ("tfds:small", r"in .*/small \(there is en\); make it with"),
        ("tfds:small/en:2.0.0", r"/small/en \(there is 1.0.0\); make it"),
    ],
)
def test_what_is_not_there_is_never_downloaded_and_the_command_is_told(
    tfds_dir, tmp_path, monkeypatch, name, message
):
    def refuse(*args, **kwargs):
        raise AssertionError("a download was started")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", refuse)
    with pytest.raises(ConfigError, match=message):
        prepared(tmp_path, name, tfds_dir)


def test_another_file_format_is_refused_with_the_command_that_converts_it(tfds_dir, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in (tfds_dir / "small/en/1.0.0").iterdir():
        content = file.read_bytes()
        if file.name == "dataset_info.json":
            content = content.replace(b'"array_record"', b'"tfrecord"')
        (folder / file.name.replace("array_record", "tfrecord")).write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"stored as tfrecord.*`tfds convert_format --dataset_dir="
    ):
        prepared(tmp_path / "data", str(folder))


def test_a_damaged_or_missing_shard_is_named(tfds_dir, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in (tfds_dir / "small/en/1.0.0").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    [shard] = folder.glob("*train*00001*")
    content = bytearray(shard.read_bytes())
    content[len(content.rstrip(b"\0")) // 100] ^= 1
    content[200] ^= 1
    shard.write_bytes(content)
    with pytest.raises(storage.DataError, match=f"{shard.name} cannot be read"):
        documents_of(folder)
    shard.unlink()
    with pytest.raises(storage.DataError, match=f"{shard.name} cannot be read"):
        documents_of(folder)


def documents_of(folder: Path) -> list:
    return [d for part in TfdsCorpus(str(folder)).parts() for d in part.documents()]


def test_the_prepared_text_is_itself_a_source(tfds_dir, tmp_path):
    splits, _ = prepared(tmp_path / "first", "tfds:small/en", tfds_dir)
    [text] = (tmp_path / "first").glob("text-*")
    again, _ = prepared(tmp_path / "second", str(text))
    assert again == splits


def test_a_bucket_without_a_data_set_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_sets, "holds_data_set", lambda folder: False)
    with pytest.raises(ConfigError, match=r"gs://x/y' holds no TFDS data set"):
        prepared(tmp_path, "gs://x/y")
