"""lm_eval --workdir=RUN: the paper's benchmarks, by EleutherAI's lm-evaluation-harness."""

import json

from absl import flags

from moepp_jax import devices, processes, storage
from moepp_jax.commands import options
from moepp_jax.errors import ConfigError
from moepp_jax.harness import needed, suite

for _name in ("workdir", "step", "strict", "config", "json", "suite", "tasks", "benchmarks"):
    flags.declare_key_flag(_name)
flags.adopt_module_key_flags(devices)
_LIMIT = flags.DEFINE_integer("limit", None, "items per task (per subject of MMLU)", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_string("batch_size", "auto", "full-length rows in a batch")


def run(arguments: list[str]) -> None:
    options.no_more(arguments)
    needed.require("lm_eval")
    config, folder = options.config_of_run(), options.given_workdir()
    benchmarks = options.BENCHMARKS.value
    tasks = suite.select(options.TASKS.value, benchmarks)
    file = storage.open_path(options.JSON.value) if options.JSON.value else None
    if file and not file.parent.is_dir():
        raise ConfigError(f"--json={file}: there is no such folder")
    devices.start(config)
    from moepp_jax.harness.model import MoEPPJax

    model = MoEPPJax(folder, options.STEP.value, config, _BATCH_SIZE.value, count_generated=True)
    result = suite.run(model, tasks, benchmarks, _LIMIT.value)
    if not processes.is_first():
        return
    print(f"{folder}, step {model.step}\n\n{suite.table(result['rows'])}")
    if file:
        text = json.dumps({"step": model.step, **result}, indent=2, default=str)
        storage.write_atomic(file, text + "\n")
