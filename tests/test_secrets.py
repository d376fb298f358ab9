"""Keys in the environment or in a path reach no file that a run writes, and no line it says."""

import pytest

from moepp_jax import cli, storage
from moepp_jax.errors import ConfigError
from moepp_jax.train import train
from tests import tiny

KEYS = ("WANDB_API_KEY", "HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
KEYS += ("AWS_SESSION_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS")


def test_no_file_of_a_run_has_a_key(tmp_path, monkeypatch, capfd):
    secrets = {name: f"secret-{name.lower()}-4711" for name in KEYS}
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    data = {"data.dir": str(tmp_path / "data"), "train.steps": 2, "train.save_every": 1}
    lines = []
    train(tiny.config(**data), tmp_path / "run", lines.append)
    said = "\n".join([*lines, *capfd.readouterr()])
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"config.json", "metrics.jsonl", "checksums.json"} <= {file.name for file in files}
    for secret in secrets.values():
        assert secret not in said
        assert not any(secret.encode() in file.read_bytes() for file in files)


@pytest.mark.parametrize(
    "field", ["data.dir", "data.tfds_dir", "data.tokenizer", "data.sources.text.path"]
)
def test_a_path_with_a_key_is_refused(field):
    with pytest.raises(ConfigError, match=f"config.{field} holds credentials") as error:
        tiny.config(**{field: "s3://AKIA:secret-4711@bucket/text"})
    assert "4711" not in str(error.value) and "AKIA" not in str(error.value)


def test_a_work_directory_with_a_key_is_refused():
    with pytest.raises(ConfigError, match="holds credentials") as error:
        storage.open_path("gs://user:secret-4711@bucket/run")
    assert "4711" not in str(error.value) and "user" not in str(error.value)
    assert not storage.holds_credentials("s3://bucket/name@step") and storage.STORES


def test_a_name_tells_a_terminal_nothing():
    said = cli._visible(ConfigError("tensor \x1b]0;owned\x07 of\na \u202e file is é"))
    assert said == "tensor \\x1b]0;owned\\x07 of\na \\u202e file is é"
