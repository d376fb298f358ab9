"""The command line: flags -> configuration -> train, evaluate, generate, prepare or convert.

    python -m moepp_jax.main train    --config=configs/tiny.py --workdir=runs/x
    python -m moepp_jax.main evaluate --workdir=runs/x
    python -m moepp_jax.main generate --workdir=runs/x --prompt="In the beginning"
    python -m moepp_jax.main prepare  --config=configs/tiny.py
    python -m moepp_jax.main compile  --config=configs/moepp_7b.py --topology=v5p:4x4x4

    python -m moepp_jax.main convert from-hf path/of/released runs/x
    python -m moepp_jax.main convert to-hf runs/x path/of/export

Every field of the configuration is a flag: --config.moe.tau=0.5. evaluate and generate take the
work directory's configuration; with --config they check that it is the same. So does train where
there is one already. With --config, convert from-hf takes all but the model from it.

train and evaluate run on many hosts: start the same command on each. Under SLURM, Open MPI, on
Cloud TPU and with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID set the processes
find each other; else tell them with --coordinator, --num_processes and --process_id. A work
directory may be in a bucket: gs://bucket/run, s3://bucket/run. --profile=10:13 traces three steps.

A training run that is killed goes on when the same command is given again. SIGTERM or SIGINT lets
it save first; it then ends with exit status 143 or 130. Errors end with status 1 and one message.
compile needs no such devices, and ends with status 2 where the training step does not fit them.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence

import jax
from absl import flags

from moepp_jax import (
    api,
    cli,
    compile,
    data,
    distributed,
    evaluate,
    interop,
    mesh,
    processes,
    profiling,
    storage,
    train,
    workdir,
)
from moepp_jax.compile import topology
from moepp_jax.config import Config, ConfigError

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
_STEP = flags.DEFINE_integer("step", None, "checkpoint to use; by default the best")
_PROFILE = flags.DEFINE_string(
    "profile", None, "train: START:STOP, steps to trace, counted from 0 where this command goes on"
)
_DISTRIBUTED = flags.DEFINE_string(
    "distributed", "auto", f"join other processes: {', '.join(distributed.MODES)}"
)
_PROCESSES = {
    "coordinator": flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0"),
    "num_processes": flags.DEFINE_integer("num_processes", None, "processes of the run"),
    "process_id": flags.DEFINE_integer("process_id", None, "number of this one, from 0"),
}
_PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue; may be given several times")
_JSON = flags.DEFINE_string("json", None, "evaluate, compile: write the result to this file")
_DTYPE = flags.DEFINE_string(
    "dtype", None, "convert: from-hf, of the arithmetic; to-hf, of the tensors; by default as came"
)
_TOPOLOGY = flags.DEFINE_string("topology", None, f"compile: devices, {topology.EXAMPLES}")
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
    config, folder = _config_to_train(), _given_workdir()
    steps = profiling.parse(_PROFILE.value) if _PROFILE.value else None
    _start_devices(config)
    train.train(config, folder, profile=steps)


def _evaluate() -> None:
    config, folder = _config_of_run(), _given_workdir()
    file = storage.open_path(_JSON.value) if _JSON.value else None
    if file and not file.parent.is_dir():
        raise ConfigError(f"--json={file}: there is no such folder")
    # A signal to one process of an evaluation ends it, and so the others: nothing is to be saved.
    jax.config.update("jax_enable_preemption_service", False)
    _start_devices(config)
    result = evaluate.evaluate_run(config, folder, _STEP.value)
    if not processes.is_first():
        return
    text = json.dumps(result, indent=2)
    print(text)
    if file:
        storage.write_atomic(file, text + "\n")


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


def _compile() -> None:
    if not _TOPOLOGY.value:
        raise ConfigError(f"no --topology was given: write --topology={topology.EXAMPLES}")
    if not compile.run(_given_config(), _TOPOLOGY.value, _JSON.value):
        sys.exit(2)


def _convert(arguments: Sequence[str]) -> None:
    if len(arguments) != 3 or arguments[0] not in ("from-hf", "to-hf"):
        raise ConfigError(
            "write convert from-hf PATH WORKDIR, or convert to-hf WORKDIR PATH, not convert "
            + " ".join(arguments)
        )
    way, source, target = arguments
    if way == "from-hf":
        config = None if _CONFIG.value is None else _given_config()
        interop.from_hf(source, target, config, _DTYPE.value)
    else:
        interop.to_hf(source, target, _STEP.value, _DTYPE.value)


_COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "generate": _generate,
    "prepare": _prepare,
    "compile": _compile,
}


def _given_config() -> Config:
    if _CONFIG.value is None:
        raise ConfigError("no --config was given: write --config=configs/tiny.py")
    return Config.parse(_CONFIG.value)


def _config_to_train() -> Config:
    """The given one; or that of the work directory, which a conversion may have made."""
    if _CONFIG.value is None and _WORKDIR.value and workdir.holds_run(_WORKDIR.value):
        return workdir.read_config(_WORKDIR.value)
    return _given_config()


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


def _start_devices(config: Config) -> None:
    """Joins the processes of the run, if there are several, and sees to their virtual devices.

    CPUs are as many devices as one says; a mesh that leaves the number open gets its fill of them,
    or one a process.
    """
    given = {name: flag.value for name, flag in _PROCESSES.items()}
    joined = distributed.initialize(_DISTRIBUTED.value, **given)
    said = "JAX_NUM_CPU_DEVICES" in os.environ or (
        "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    )
    devices = 1 if joined else mesh.virtual_cpu_devices(config)
    if not said:
        jax.config.update("jax_num_cpu_devices", devices)
    # Collectives block a thread of JAX's pools each. The pools are sized by the cores, and with
    # fewer than two threads a device they can deadlock; more than it takes is slower.
    if said or devices > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(32, 4 * devices)))


def main(argv: Sequence[str]) -> None:
    if argv[1:2] == ["convert"]:
        return _convert(argv[2:])
    if len(argv) != 2 or argv[1] not in _COMMANDS:
        said = f"not {' '.join(argv[1:])!r}" if argv[1:] else "as in moepp_jax.main train"
        raise ConfigError(
            f"give one command of {', '.join([*_COMMANDS, 'convert'])}, {said}; --help lists flags"
        )
    _COMMANDS[argv[1]]()


if __name__ == "__main__":
    cli.run(main)
