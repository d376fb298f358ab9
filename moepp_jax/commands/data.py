"""data: what training and evaluation read, prepared ahead of them.

data prepare --config=RECIPE   # text to token ids on disk
data verify --config=RECIPE    # reads all of it again: a line for each damaged file, status 1
data batch N --workdir=RUN     # the documents that step N of a run trains on
data benchmarks                # the items of the paper's benchmarks, for lm_eval
"""

from pathlib import Path

from absl import flags

from moepp_jax import cli, data, run_data
from moepp_jax.commands import options
from moepp_jax.data.estimate import estimate
from moepp_jax.data.prepare import prepare_sources
from moepp_jax.data.verify import verify
from moepp_jax.errors import ConfigError, did_you_mean
from moepp_jax.harness import local

for _name in ("config", "workdir"):
    flags.declare_key_flag(_name)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "prepare: only report what would be done")
_WORKERS = flags.DEFINE_integer(
    "workers",
    None,
    "prepare: number of processes, default: one per core; verify: files read at once",
    lower_bound=1,
)
_DIR = cli.define_path("dir", "data/benchmarks", "benchmarks: folder to write to")
_LOGIQA = cli.define_path("logiqa", None, "benchmarks: file with LogiQA's test split")


def run(arguments: list[str]) -> None:
    if arguments[:1] not in [[name] for name in _COMMANDS]:
        hint = did_you_mean("".join(arguments[:1]), _COMMANDS)
        said = f", not data {arguments[0]}{hint}" if arguments else ""
        raise ConfigError(f"write data followed by one of {', '.join(_COMMANDS)}{said}")
    _COMMANDS[arguments[0]](arguments[1:])


def _prepare(arguments: list[str]) -> None:
    options.no_more(arguments)
    config = options.given_config()
    if _DRY_RUN.value:
        estimate(config)
    else:
        prepare_sources(config, workers=_WORKERS.value)
        data.open_dataset(config).require_rows()  # says so now if there is too little text


def _verify(arguments: list[str]) -> None:
    options.no_more(arguments)
    verify(options.given_config(), workers=_WORKERS.value)


def _batch(arguments: list[str]) -> None:
    step = arguments[0] if arguments else ""
    if not step.isdecimal() or int(step) < 1:
        raise ConfigError(
            f"data batch {step}".rstrip() + ": write the step's number, as in metrics.jsonl: "
            "data batch 117 --workdir=RUN"
        )
    options.no_more(arguments[1:])
    dataset = run_data.open_data(options.config_of_run(may_grow=True), options.given_workdir())
    print(data.describe_batch(dataset, int(step)))


def _benchmarks(arguments: list[str]) -> None:
    options.no_more(arguments)
    local.build(Path(_DIR.value), _LOGIQA.value and Path(_LOGIQA.value))


_COMMANDS = {"prepare": _prepare, "verify": _verify, "batch": _batch, "benchmarks": _benchmarks}
