"""Files in whose place something else lies, and files that lie: one error, in little time."""

import json
import shutil

import pytest

from moepp_jax import checksums, interop, metrics, regular, special_tokens, workdir
from moepp_jax.data import records
from moepp_jax.data.pins import Pins
from moepp_jax.data.storage import DataError
from moepp_jax.data.tfds_sets import TfdsCorpus
from moepp_jax.data.tokenizer import Tokenizer
from moepp_jax.errors import ConfigError
from tests import reference, tiny
from tests.hostile import HEADERS, INSTEAD, header, put
from tests.released import SILENT, checkpoint


@pytest.mark.parametrize("what", INSTEAD)
def test_in_the_place_of_any_file(tmp_path, what):
    put(what, tmp_path / "file")
    with pytest.raises(regular.IrregularError, match=what) as error:
        regular.read_bytes(tmp_path / "file")
    assert error.value.filename == str(tmp_path / "file")


def test_files_of_the_system_that_say_they_are_empty():
    with pytest.raises(regular.IrregularError, match="larger than the 10 bytes"):
        regular.read_bytes(workdir.open_path("/proc/self/status"), 10)


@pytest.mark.parametrize("what", INSTEAD)
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.model"]
)
def test_of_a_checkpoint(tmp_path, what, name):
    if name == "model.safetensors" and what == "larger than the":
        what = "a FIFO"  # weights may be of any size
    source = checkpoint(tmp_path / "source")
    put(what, source / name)
    if name == "tokenizer.model":
        if what != "a folder":
            with pytest.raises(ConfigError, match=f"tokenizer.model cannot be read: .*{what}"):
                Tokenizer.load(source / name)
        return
    with pytest.raises(interop.ConversionError, match=f"{name} cannot be read.*{what}") as error:
        interop.from_hf(source, tmp_path / "run", **SILENT)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", INSTEAD)
def test_of_one_shard_of_weights(tmp_path, what):
    source = tmp_path / "source"
    shutil.copytree(reference.ROOT / "default", source)
    name = "model-00003-of-00012.safetensors"
    index = what == "larger than the"
    put(what, source / ("model.safetensors.index.json" if index else name))
    with pytest.raises(interop.ConversionError, match=what):
        interop.from_hf(source, tmp_path / "run", **SILENT)


@pytest.mark.parametrize("what", INSTEAD)
def test_of_a_run(tmp_path, what):
    put(what, tmp_path / "config.json")
    with pytest.raises(ConfigError, match=f"config.json cannot be read as JSON: .*{what}"):
        workdir.read_config(tmp_path)
    put(what, tmp_path / "metrics.jsonl")
    with pytest.raises(ConfigError, match=f"metrics.jsonl cannot be read: .*{what}"):
        metrics.read_metrics(tmp_path)
    put(what, tmp_path / "tokenizer_config.json")
    with pytest.raises(ConfigError, match=f"tokenizer_config.json cannot be read: .*{what}"):
        special_tokens.of_file(tmp_path / "tokenizer_config.json")


@pytest.mark.parametrize("what", ["a FIFO", "a device"])
def test_of_a_checkpoint_of_ours(tmp_path, what):
    (tmp_path / "params").mkdir()
    put(what, tmp_path / "params" / "array")
    said = checksums.verdict(tmp_path, ["params"], ["params"]).damage
    assert what in said and "params/array" in said
    (tmp_path / "params" / "array").unlink()
    (tmp_path / "params" / "array").write_text("numbers")
    put(what, tmp_path / "checksums.json")
    assert what in checksums.verdict(tmp_path, ["params"], ["params"]).damage


@pytest.mark.parametrize("name", ["params/../../secret", "/dev/zero", "params/a\0b"])
def test_sums_of_files_elsewhere(tmp_path, name):
    (tmp_path / "step" / "params").mkdir(parents=True)
    (tmp_path / "secret").write_text("of somebody")
    (tmp_path / "step" / "params" / "array").write_text("numbers")
    checksums.write(tmp_path / "step", ["params"])
    file = tmp_path / "step" / "checksums.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: "0"}))
    said = checksums.verdict(tmp_path / "step", ["params"], ["params"]).damage
    assert "is no file of its folder" in said


def test_a_manifest_of_files_elsewhere(tmp_path):
    shard = {"file": "../x", "records": 1, "size": 1, "num_bytes": 1, "sha256": ""}
    fields = {name: shard.get(name, 0) for name in records.Shard._fields}
    content = json.dumps({"files": {}, "shards": {"train": [fields]}})
    (tmp_path / records._MANIFEST).write_text(content)
    with pytest.raises(DataError, match=r"names '\.\./x', no file of its folder"):
        records.shards(tmp_path, "train")
    (tmp_path / records._MANIFEST).write_text("[" * 100_000)
    with pytest.raises(DataError, match="nested too deep"):
        records.shards(tmp_path, "train")


@pytest.mark.parametrize("name", ["../text", "/text", ""])
def test_pins_of_data_elsewhere(name):
    pin = {"text": "text-1", "tokens": name, "content": "0"}
    with pytest.raises(ValueError, match="is no name of a data set"):
        Pins.parse({"tokenizer": "0", "sources": {"a": pin}})


def test_code_in_the_folder_of_a_run(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('owned').touch()\n")
    fields = json.loads(tiny.config().to_json())
    fields["moe"]["rule"] = {"type": "evil:Rule"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="is code in the folder of the run, which is not exec"):
        workdir.read_config(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_features_of_a_data_set_that_are_code(tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"name": "x", "version": "1.0.0"}))
    features = {"featuresDict": {"features": {"text": {"pythonClassName": "evil.Feature"}}}}
    (tmp_path / "features.json").write_text(json.dumps(features))
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('owned').touch()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"'evil\.Feature' is no feature of TFDS"):
        TfdsCorpus(str(tmp_path))
    assert not (tmp_path / "owned").exists()
    put("a FIFO", tmp_path / "dataset_info.json")
    with pytest.raises(ConfigError, match=r"dataset_info\.json cannot be read: it is a FIFO"):
        TfdsCorpus(str(tmp_path))


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(tmp_path, name):
    source = checkpoint(tmp_path / "source")
    said = HEADERS[name]
    header(source / "model.safetensors", *(said if isinstance(said, tuple) else (said,)))
    with pytest.raises(interop.ConversionError) as error:
        interop.from_hf(source, tmp_path / "run", **SILENT)
    said = str(error.value)
    assert "model.safetensors" in said and "\n" not in said and len(said) < 2000


def test_names_twice_among_many(tmp_path):
    """A search of all for each would take hours."""
    names = [f"n{i}" for i in range(200_000)]
    content = ",".join(f'"{name}":0' for name in [*names, names[-1]])
    source = checkpoint(tmp_path / "source")
    (source / "config.json").write_text(f"{{{content}}}")
    with pytest.raises(interop.ConversionError, match="'n199999' is there twice"):
        interop.from_hf(source, tmp_path / "run", **SILENT)


def test_what_a_checkpoint_says_of_itself(tmp_path):
    """Sums of hostile files are right."""
    from moepp_jax.checkpoint import CheckpointError, Checkpoints

    folder = tiny.run_folder(tmp_path / "run", tiny.config(**{"data.dir": str(tmp_path / "data")}))
    step = folder / "checkpoints" / "3"
    for content in ({}, [], {"shapes": 3}, {"shapes": None, "metrics": 0}):
        (step / "meta" / "metadata").write_text(json.dumps(content))
        (step / "checksums.json").unlink()
        checksums.write(step, ["meta", "params", "rest"])
        with Checkpoints(folder, 1) as there, pytest.raises(CheckpointError, match="meta/metadata"):
            there.has_only_params(3)
