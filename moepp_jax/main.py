"""The command line: flags -> configuration -> train, evaluate, generate or prepare.

    python -m moepp_jax.main train    --config=configs/tiny.py --workdir=runs/x
    python -m moepp_jax.main evaluate --workdir=runs/x
    python -m moepp_jax.main generate --workdir=runs/x --prompt="In the beginning"
    python -m moepp_jax.main prepare  --config=configs/tiny.py

Every field of the configuration is a flag: --config.moe.tau=0.5. evaluate and generate take the
work directory's configuration; with --config they check that it is the same.

A training run that is killed goes on when the same command is given again. SIGTERM or SIGINT lets
it save first; it then ends with exit status 143 or 130. Errors end with status 1 and one message.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from moepp_jax import api, cli, data, evaluate, mesh, train, workdir
from moepp_jax.config import Config, ConfigError

_CONFIG = cli.define_config()
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
    if _JSON.value and not Path(_JSON.value).parent.is_dir():
        raise ConfigError(f"--json={_JSON.value}: there is no such folder")
    _make_virtual_devices(config)
    result = evaluate.evaluate_run(config, folder, _STEP.value)
    text = json.dumps(result, indent=2)
    print(text)
    if _JSON.value:
        workdir.write_atomic(Path(_JSON.value), text + "\n")


def _generate() -> None:
    given = {name: flag.value for name, flag in _SETTINGS.items() if flag.value is not None}
    settings = _config_of_run().replace("generate", **given).generate
    prompts = _PROMPT.value
    if not prompts:
        raise ConfigError("no --prompt was given: write --prompt='some text'")
    model = api.load(_given_workdir(), _STEP.value)
    texts = model.generate(prompts, **dataclasses.asdict(settings))
    for prompt, text in zip(prompts, texts, strict=True):
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
    devices = mesh.virtual_cpu_devices(config)
    if not said:
        jax.config.update("jax_num_cpu_devices", devices)
    # Collectives block a thread of JAX's pools each. The pools are sized by the cores, and with
    # fewer than two threads a device they can deadlock; more than it takes is slower.
    if said or devices > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(32, 4 * devices)))


def main(argv: Sequence[str]) -> None:
    if len(argv) != 2 or argv[1] not in _COMMANDS:
        said = f"not {' '.join(argv[1:])!r}" if argv[1:] else "as in moepp_jax.main train"
        raise ConfigError(f"give one command of {', '.join(_COMMANDS)}, {said}; --help lists flags")
    _COMMANDS[argv[1]]()


if __name__ == "__main__":
    cli.run(main)
