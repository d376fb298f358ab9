"""Flags that several commands share, and what they say."""

import sys

from absl import flags

from moepp_jax import cli, parent, recipes, wandb_log, workdir
from moepp_jax.compile import topology
from moepp_jax.config import Config
from moepp_jax.errors import ConfigError
from moepp_jax.harness import suite

CONFIG = cli.define_config()
WORKDIR = cli.define_path("workdir", None, "folder of the run")
STEP = flags.DEFINE_integer(
    "step", None, "checkpoint to use; default: the best on held-out text, else the newest"
)
STRICT = flags.DEFINE_bool(
    "strict", False, "refuse checkpoints without checksums, which cannot be verified"
)
ZERO_OFFSET = flags.DEFINE_float(
    "zero_offset",
    None,
    "added to the logits of zero-computation experts: above 0, fewer FFN experts run; below, more",
)
SUITE = flags.DEFINE_enum("suite", None, ["paper"], "benchmark tasks and their shots")
TASKS = flags.DEFINE_list("tasks", [], "tasks of the suite, comma-separated; default: all")
BENCHMARKS = cli.define_path(
    "benchmarks",
    "data/benchmarks",
    f"folder made by `data benchmarks`; for lm_eval also {suite.HUB}",
)
TOPOLOGY = flags.DEFINE_string("topology", None, f"devices to compile for: {topology.EXAMPLES}")
JSON = cli.define_path("json", None, "write the result to this file")
PROFILE = cli.define_with_optional_value(
    "profile",
    "train: START:STOP, steps to trace, counted from where this command starts; compile: predict "
    "the time of a step by part, from its schedule, or with =full from what is compiled to the end",
)
GENERATION = flags.DEFINE_bool(
    "generation", False, "compile generation too: on one device, and on all of a host"
)
CHOOSE_REMAT = flags.DEFINE_bool(
    "choose_remat", False, "compile --profile: with every model.remat, and which one to take"
)
FIGURE = cli.define_path(
    "figure",
    None,
    "PNG to write; curves: by default curves.png; compile: what --profile predicts, beside the "
    "vanilla twin",
)
WANDB = flags.DEFINE_string(
    "wandb", None, "project of Weights & Biases to which numbers and figures of the run are sent"
)
WANDB_MODE = flags.DEFINE_enum(
    "wandb_mode",
    None,
    wandb_log.MODES,
    "offline: to the run's folder, for `wandb sync`; by default what WANDB_MODE says, else online",
)


def given_wandb() -> wandb_log.Wandb | None:
    return wandb_log.given(WANDB.value, WANDB_MODE.value)


def given_config() -> Config:
    if CONFIG.value is None:
        raise ConfigError("no --config was given: write --config=tiny")
    return Config.parse(CONFIG.value)


def given_workdir() -> str:
    if not WORKDIR.value:
        raise ConfigError("no --workdir was given: write --workdir=runs/NAME")
    return WORKDIR.value


def config_of_run(may_grow: bool = False) -> Config:
    """That of the work directory, or the given one if it is of the same run.

    Args:
      may_grow: the given one may have more steps.
    """
    folder = given_workdir()
    there = workdir.read_config(folder, lambda line: print(line, file=sys.stderr))
    if CONFIG.value is None:
        return there
    given = parent.with_tokenizer(given_config(), folder, parent.of_run(folder, None))
    workdir.require_same(folder, given, may_grow)
    return given


def no_more(arguments: list[str]) -> None:
    """Refuses words after the command, which it does not take."""
    if arguments:
        first = arguments[0]
        hint = f"; did you mean --config={first}?" if recipes.exists(first) else ""
        raise ConfigError(
            f"{' '.join(arguments)!r} is too much: this command takes flags only{hint}"
        )
