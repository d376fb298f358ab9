"""evaluate --workdir=RUN: a checkpoint on all of the held-out text."""

import json

import jax

from moepp_jax import evaluate, processes, storage
from moepp_jax.commands import devices, options
from moepp_jax.config import ConfigError


def run(arguments: list[str]) -> None:
    options.no_more(arguments)
    config, folder = options.config_of_run(), options.given_workdir()
    file = storage.open_path(options.JSON.value) if options.JSON.value else None
    if file and not file.parent.is_dir():
        raise ConfigError(f"--json={file}: there is no such folder")
    # A signal to one process of an evaluation ends it, and so the others: nothing is to be saved.
    jax.config.update("jax_enable_preemption_service", False)
    devices.start(config)
    result = evaluate.evaluate_run(config, folder, options.STEP.value)
    if not processes.is_first():
        return
    text = json.dumps(result, indent=2)
    print(text)
    if file:
        storage.write_atomic(file, text + "\n")
