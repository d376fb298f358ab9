"""Prepared data are verified where they are read, and all of them by `data verify`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moepp_jax.commands import data as command
from moepp_jax.data import records, shards, tokens, work
from moepp_jax.data.prepare import prepare_sources, prepared_sources
from moepp_jax.data.storage import DataError
from moepp_jax.data.verify import verify
from tests import tiny


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "data"
    prepare_sources(tiny.config(**{"data.dir": str(folder)}), lambda line: None, workers=1)
    return folder


@pytest.fixture
def config(prepared, tmp_path):
    """Of a copy of that, to damage."""
    shutil.copytree(prepared, tmp_path / "data")
    return tiny.config(**{"data.dir": str(tmp_path / "data")})


def folder_of(config) -> Path:
    [folder] = prepared_sources(config).tokens.values()
    return folder


def flip(file: Path, at: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(len(content) * at)] ^= 1
    file.write_bytes(content)


def test_opening_sums_up_no_file_that_grows_with_the_corpus_but_of_blocks(config, monkeypatch):
    summed = []
    real = records.file_sha256
    monkeypatch.setattr(records, "file_sha256", lambda file: summed.append(file.name) or real(file))
    documents = tokens.TokenDocuments(folder_of(config), "train")
    blocks = {f"train-{name}-blocks.npy" for name in ("index", "records", "sums")}
    assert set(summed) == {"dataset_info.json", "features.json"} | blocks
    assert documents.starts[-1] == sum(map(len, documents))


@pytest.mark.parametrize("name", ["index", "records", "sums"])
def test_a_number_of_an_index_that_has_changed_is_found_when_it_is_read(config, name):
    file = folder_of(config) / f"train-{name}.npy"
    flip(file, 0.99)
    documents = tokens.TokenDocuments(folder_of(config), "train")
    with pytest.raises(DataError, match=f"{file} is not as it was written: numbers 0 and"):
        list(documents)


def another(folder: Path, shard: shards.Shard) -> bytes:
    """A shard of the same size with the same number of tokens a record, others in two places."""
    stored = list(records.read_shard(folder, shard))
    rng = np.random.default_rng(0)
    while True:
        writer = shards.ShardWriter(folder / "another")
        for number, record in enumerate(stored):
            ids = np.frombuffer(shards.decode_bytes(record, "tokens"), np.uint16).copy()
            if number == 0:
                a, b = rng.integers(len(ids), size=2)
                ids[[a, b]] = ids[[b, a]]
            writer.write({"tokens": ids.tobytes()}, ids.nbytes)
        size = writer.close().size
        content = (folder / "another").read_bytes()
        (folder / "another").unlink()
        if size == shard.size and content != (folder / shard.file).read_bytes():
            return content


def test_another_shard_of_the_same_size_is_no_text_of_this_one(config):
    folder = folder_of(config)
    [shard] = records.shards(folder, "train")
    (folder / shard.file).write_bytes(another(folder, shard))
    documents = tokens.TokenDocuments(folder, "train")
    with pytest.raises(DataError, match=rf"{shard.file}, record 0, holds other tokens than those"):
        documents.read(np.array([5]), np.array([3]))


def test_data_of_an_earlier_version_are_verified_as_they_were(config):
    """Without blocks and sums of records: its indices are summed up on opening."""
    folder, content = folder_of(config), records.content(folder_of(config))
    expected = [ids.tolist() for ids in tokens.TokenDocuments(folder, "train")]
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in [n for n in manifest["files"] if n.endswith(("-blocks.npy", "-sums.npy"))]:
        del manifest["files"][name]
        (folder / name).unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert records.content(folder) == content  # runs that began with either keep to it
    assert [ids.tolist() for ids in tokens.TokenDocuments(folder, "train")] == expected
    flip(folder / "train-index.npy")
    with pytest.raises(DataError, match=r"train-index\.npy is not as it was written: its SHA-256"):
        tokens.TokenDocuments(folder, "train")


@pytest.mark.parametrize(
    "take", [lambda shards: shards.pop(), lambda shards: shards[0].pop("records")]
)
def test_a_manifest_that_names_fewer_records_is_damaged(config, take):
    """It has no sum of its own; what it leaves out would not be missed."""
    folder = folder_of(config)
    manifest = json.loads((folder / "manifest.json").read_text())
    take(manifest["shards"]["train"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for read in (records.shards, tokens.TokenDocuments):
        with pytest.raises(DataError, match=r"the data file .*manifest\.json (has not|cannot be)"):
            read(folder, "train")


def test_every_damaged_file_has_its_line(config, monkeypatch):
    lines = []
    monkeypatch.setattr(work, "_LINE_EVERY", 0.0)
    verify(config, lines.append, workers=2)
    assert len([line for line in lines if " are as written" in line]) == 2
    assert any(line.startswith("verify: ") and "ETA" in line for line in lines)
    folder = folder_of(config)
    [train], [held_out] = (records.shards(folder, split) for split in records.SPLITS)
    flip(folder / train.file)
    (folder / held_out.file).write_bytes((folder / held_out.file).read_bytes()[:-1])
    (folder / "train-sums.npy").unlink()
    lines.clear()
    with pytest.raises(DataError, match=r"^3 of \d+ files are damaged; the data file .*copy it"):
        verify(config, lines.append)
    damaged = [line for line in lines if line.startswith("damaged: the data file ")]
    assert len(damaged) == 3
    for name, how in [
        (train.file, "is not as it was written: its SHA-256 is another"),
        (held_out.file, f"has {held_out.size - 1:,} bytes, not its {held_out.size:,}"),
        ("train-sums.npy", "is missing"),
    ]:
        assert any(line.endswith(f"{folder / name} {how}") for line in damaged)
    assert next(line for line in lines if " are as written" in line).count("text-") == 1


def test_the_command_ends_with_an_error_where_something_is_damaged(config, monkeypatch, capsys):
    monkeypatch.setattr(command.options, "given_config", lambda: config)
    monkeypatch.setattr(command, "_WORKERS", type("Flag", (), {"value": 1}))
    command.run(["verify"])
    assert capsys.readouterr().out.count("are as written") == 2
    flip(folder_of(config) / "features.json")
    with pytest.raises(DataError, match=r"1 of \d+ files are damaged; .*features\.json is not as"):
        command.run(["verify"])
    assert capsys.readouterr().out.count("damaged: ") == 1
