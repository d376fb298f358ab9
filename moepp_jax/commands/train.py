"""train --config=RECIPE --workdir=RUN: trains a model, or continues to train it."""

from absl import flags

from moepp_jax import cli, devices, parent, profiling, train, workdir
from moepp_jax.commands import options
from moepp_jax.config import Config

for _name in ("config", "workdir", "strict", "profile", "wandb", "wandb_mode"):
    flags.declare_key_flag(_name)
flags.adopt_module_key_flags(devices)
_INIT_FROM = cli.define_path(
    "init_from",
    None,
    "WORKDIR or WORKDIR@STEP: start a new run from these parameters; default STEP: the best on "
    "held-out text, else the newest",
)
_INIT_OPTIMIZER = flags.DEFINE_boolean(
    "init_optimizer", False, "also take its optimizer's moments; the schedule starts anew"
)


_DEBUG = flags.DEFINE_boolean(
    "debug",
    False,
    "end at the first number that is not finite, and name the operation and the line that made it; "
    "takes the memory of a second state",
)


def run(arguments: list[str]) -> None:
    options.no_more(arguments)
    start = parent.given(_INIT_FROM.value, _INIT_OPTIMIZER.value)
    wandb = options.given_wandb()
    config, folder = _config(), options.given_workdir()
    profile = options.PROFILE.value
    steps = profiling.parse(profile) if profile else None
    devices.start(config)
    train.train(config, folder, profile=steps, parent=start, wandb=wandb, debug=_DEBUG.value)


def _config() -> Config:
    """The given one; or that of the work directory, which a conversion may have made."""
    folder = options.WORKDIR.value
    there = folder and workdir.holds_run(folder)
    return options.config_of_run(may_grow=True) if there else options.given_config()
