"""moepp: trains, evaluates, analyses and converts MoE++ language models.

    moepp train    --config=tiny --workdir=runs/x
    moepp evaluate --workdir=runs/x
    moepp generate --workdir=runs/x --prompt="In the beginning"
    moepp analyze  --workdir=runs/x --page
    moepp curves   runs/x runs/y --figure=curves.png
    moepp lm_eval  --workdir=runs/x --suite=paper
    moepp compile  --config=moepp_7b --topology=v5p:4x4x4

    moepp data prepare --config=tiny
    moepp data benchmarks

    moepp convert from-hf path/to/released runs/x
    moepp convert to-hf runs/x path/to/export
    moepp convert upcycle path/to/mixtral runs/y --n_const=2 --tau=0.5

    moepp experiments --list
    moepp experiments tau gating_residual

--config names a recipe of the package (`moepp recipes` lists them) or a file of your own. Every
field of the configuration is a flag: --config.moe.rule.tau=0.5. In a work directory that holds a
run, commands use its configuration; with --config they check that it is the same. convert from-hf
and upcycle take everything but the model from --config.

train, evaluate, analyze and lm_eval run on many hosts: start the same command on each. Under SLURM
and Open MPI, on Cloud TPU, and with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
set, the processes find each other; elsewhere give --coordinator, --num_processes and --process_id.
A work directory may be in a bucket: gs://bucket/run, s3://bucket/run. --profile=10:13 traces three
steps.

A training run that was killed continues when the same command is given again, and a finished one
when it is given more --config.train.steps. On SIGTERM or SIGINT it saves, then exits with status
143 or 130. train --init_from=runs/x@700 starts a new run from the parameters of another one, with
--init_optimizer from its optimizer's moments too.

An error is one message and exit status 1. compile needs none of the devices it compiles for, and
exits with status 2 if the training step does not fit them.

    moepp generate --help             # the flags of a command; --helpfull: of everything
    moepp --version
    eval "$(moepp completion bash)"   # completes commands, flags and recipes; zsh too

`python -m moepp_jax.main` is the same as `moepp`.
"""

from __future__ import annotations

from moepp_jax import beginning, ending

if __name__ == "__main__":
    beginning.begin()
elif __name__ == "__mp_main__":
    ending.leave_to_parent()

import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from moepp_jax import __version__
from moepp_jax.errors import did_you_mean

# A file of moepp_jax/commands each, imported when it is called for: JAX takes seconds to import.
COMMANDS = (
    "train",
    "evaluate",
    "analyze",
    "curves",
    "generate",
    "lm_eval",
    "compile",
    "data",
    "convert",
    "experiments",
    "recipes",
    "completion",
)
_HELP = {"--help", "-help", "-h", "-?"}


def main() -> None:
    """The command line, whole: what was asked for is in sys.argv."""
    beginning.begin()
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # rules of one's own (module:Class), as with `python -m`
    if sys.argv[1:2] == ["help"]:
        sys.argv[1:] = [*sys.argv[2:], "--help"]
    name = command_of(sys.argv[1:])
    if name is not None:
        run(name)
    elif "--version" in sys.argv:
        print(f"moepp_jax {__version__}")
    elif _HELP & set(sys.argv):
        print(__doc__)
    else:
        sys.exit(f"error: {_unknown(sys.argv[1:])}")


def command_of(arguments: Sequence[str]) -> str | None:
    """The first word, or after flags the first that is a command; None if there is none."""
    words = arguments[:1] if arguments and not arguments[0].startswith("-") else arguments
    return next((word for word in words if word in COMMANDS), None)


def load(name: str) -> ModuleType:
    """A command's module, which has defined its flags by then."""
    return importlib.import_module(f"moepp_jax.commands.{name}")


def run(name: str) -> None:
    """One command, with the flags of sys.argv."""
    from absl import flags

    from moepp_jax import cli, verified

    module = load(name)

    def command(argv: Sequence[str]) -> None:
        words = argv[1:]
        words.remove(name)
        strict = "strict" in flags.FLAGS and flags.FLAGS.strict
        with verified.only_verified("--strict" if strict else ""):
            module.run(words)

    with ending.EndsSoon(seconds=20.0):
        cli.run(command, lambda: cli.describe(module))


def _unknown(arguments: Sequence[str]) -> str:
    words = [word for word in arguments if not word.startswith("-")]
    said = f"not {' '.join(words)!r}" if words else "as in moepp train"
    hint = did_you_mean("".join(words[:1]), COMMANDS, "--help describes them")
    return f"give one command of {', '.join(COMMANDS)}, {said}{hint}"


if __name__ == "__main__":
    main()
