"""evaluate --workdir=RUN: loss and routing of a checkpoint on held-out text, as JSON."""

import json
from typing import Any

import jax
from absl import flags

from moepp_jax import devices, evaluate, processes, progress, storage
from moepp_jax.commands import options
from moepp_jax.errors import ConfigError

_BATCHES = flags.DEFINE_integer(
    "batches", 0, "number of held-out batches, always the same ones; 0: all held-out text"
)
for _name in ("workdir", "step", "strict", "config", "json", "zero_offset"):
    flags.declare_key_flag(_name)
flags.adopt_module_key_flags(devices)


def run(arguments: list[str]) -> None:
    options.no_more(arguments)
    config, folder = options.config_of_run(), options.given_workdir()
    if options.ZERO_OFFSET.value is not None:
        config = config.replace("moe.rule", zero_offset=options.ZERO_OFFSET.value)
    file = storage.open_path(options.JSON.value) if options.JSON.value else None
    if file and not file.parent.is_dir():
        raise ConfigError(f"--json={file}: there is no such folder")
    # A signal to one process of an evaluation ends it, and so the others: nothing is to be saved.
    jax.config.update("jax_enable_preemption_service", False)
    devices.start(config)
    with progress.passing_bar("batches") as moved:
        result = evaluate.evaluate_run(config, folder, options.STEP.value, moved, _BATCHES.value)
    if not processes.is_first():
        return
    text = _json(result)
    print(text)
    if file:
        storage.write_atomic(file, text + "\n")


def _json(result: dict[str, Any]) -> str:
    """A line for each number; for arrays, which have one or two axes, a line for each row."""

    def value(v: Any) -> str:
        if isinstance(v, list) and isinstance(v[0], list):
            return "[\n    " + ",\n    ".join(map(json.dumps, v)) + "\n  ]"
        return json.dumps(v)

    return "{\n" + ",\n".join(f"  {json.dumps(k)}: {value(v)}" for k, v in result.items()) + "\n}"
