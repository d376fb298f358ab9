"""The command line: flags -> configuration -> train, evaluate, generate or prepare.

    python -m moepp_jax.main train    --config=configs/tiny.py --workdir=runs/x
    python -m moepp_jax.main evaluate --workdir=runs/x
    python -m moepp_jax.main generate --workdir=runs/x --prompt="In the beginning"
    python -m moepp_jax.main prepare  --config=configs/tiny.py

Every field of the configuration is a flag: --config.moe.tau=0.5. evaluate and generate take the
work directory's configuration; with --config they check that it is the same.
"""

import os

# Before JAX starts: its CPU collectives block threads, and too few of them can deadlock.
os.environ.setdefault("PJRT_NPROC", "32")

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from moepp_jax import api, data, evaluate, mesh, train, workdir
from moepp_jax.checkpoint import CheckpointError
from moepp_jax.config import Config, ConfigError

_CONFIG = config_flags.DEFINE_config_file("config", None, "recipe: a file of configs/")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
_STEP = flags.DEFINE_integer("step", None, "checkpoint to use; by default the best")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue; may be given several times")
_JSON = flags.DEFINE_string("json", None, "evaluate: write the result to this file")
_SETTINGS = {
    "max_new_tokens": flags.DEFINE_integer("max_new_tokens", None, "generate: tokens at most"),
    "temperature": flags.DEFINE_float("temperature", None, "generate: 0 is greedy"),
    "top_k": flags.DEFINE_integer("top_k", None, "generate: 0 is off"),
    "top_p": flags.DEFINE_float("top_p", None, "generate: 1 is off"),
    "seed": flags.DEFINE_integer("seed", None, "generate: of the sampling"),
}


def _prepare() -> None:
    data.prepare(_given_config())


def _train() -> None:
    config, folder = _given_config(), _given_workdir()
    _make_virtual_devices(config)
    train.train(config, folder)


def _evaluate() -> None:
    config, folder = _config_of_run(), _given_workdir()
    _make_virtual_devices(config)
    result = evaluate.evaluate_run(config, folder, _STEP.value)
    text = json.dumps(result, indent=2)
    print(text)
    if _JSON.value:
        workdir.write_atomic(Path(_JSON.value), text + "\n")


def _generate() -> None:
    _config_of_run()
    if not _PROMPT.value:
        raise ConfigError("no --prompt was given: write --prompt='some text'")
    model = api.load(_given_workdir(), _STEP.value)
    settings = {name: f.value for name, f in _SETTINGS.items() if f.value is not None}
    for prompt, text in zip(_PROMPT.value, model.generate(_PROMPT.value, **settings), strict=True):
        print(f"{prompt}{text}\n")


_COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "generate": _generate,
    "prepare": _prepare,
}


def _given_config() -> Config:
    if _CONFIG.value is None:
        raise ConfigError("no --config was given: write --config=configs/tiny.py")
    return Config.parse(_CONFIG.value)


def _given_workdir() -> str:
    if not _WORKDIR.value:
        raise ConfigError("no --workdir was given: write --workdir=runs/NAME")
    return _WORKDIR.value


def _config_of_run() -> Config:
    """That of the work directory, or the given one if it is of the same run."""
    there = workdir.read_config(_given_workdir())
    if _CONFIG.value is None:
        return there
    given = _given_config()
    workdir.require_same(_given_workdir(), given)
    return given


def _make_virtual_devices(config: Config) -> None:
    """CPUs are as many devices as one says; a mesh that leaves the number open gets its fill."""
    said = "JAX_NUM_CPU_DEVICES" in os.environ or (
        "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    )
    if not said:
        jax.config.update("jax_num_cpu_devices", mesh.virtual_cpu_devices(config))


def main(argv: Sequence[str]) -> None:
    if len(argv) != 2 or argv[1] not in _COMMANDS:
        raise ConfigError(
            f"commands {argv[1:]!r}: give one of {', '.join(_COMMANDS)}, and no other bare words"
        )
    logging.set_verbosity(logging.WARNING)
    _COMMANDS[argv[1]]()


def run() -> None:
    """As `app.run(main)`, with errors of the user's told in one line instead of a traceback."""
    try:
        app.run(main, flags_parser=_parse)
    except (ConfigError, CheckpointError, flags.Error) as error:
        sys.exit(f"error: {error}")


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ConfigError(f"the command line cannot be read: {error}") from error


if __name__ == "__main__":
    run()
