"""The command line: flags -> configuration -> one of the commands.

    python -m moepp_jax.main train    --config=configs/tiny.py --workdir=runs/x
    python -m moepp_jax.main evaluate --workdir=runs/x
    python -m moepp_jax.main generate --workdir=runs/x --prompt="In the beginning"
    python -m moepp_jax.main analyze  --workdir=runs/x --page
    python -m moepp_jax.main compile  --config=configs/moepp_7b.py --topology=v5p:4x4x4
    python -m moepp_jax.main lm_eval  --workdir=runs/x --suite=paper

    python -m moepp_jax.main data prepare --config=configs/tiny.py
    python -m moepp_jax.main data benchmarks

    python -m moepp_jax.main convert from-hf path/of/released runs/x
    python -m moepp_jax.main convert to-hf runs/x path/of/export
    python -m moepp_jax.main convert upcycle path/of/mixtral runs/y --n_const=2 --tau=0.5

Every field of the configuration is a flag: --config.moe.rule.tau=0.5. evaluate and generate take
the work directory's configuration; with --config they check that it is the same. So does train
where there is one already. With --config, convert from-hf and upcycle take all but the model from
it.

train, evaluate, analyze and lm_eval run on many hosts: start the same command on each. Under SLURM,
Open MPI, on Cloud TPU and with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID set
the processes find each other; else tell them with --coordinator, --num_processes and --process_id.
A work directory may be in a bucket: gs://bucket/run, s3://bucket/run. --profile=10:13 traces three
steps.

A training run that is killed goes on when the same command is given again, and one that has ended
when it is given more --config.train.steps. SIGTERM or SIGINT lets it save first; it then ends with
exit status 143 or 130. train --init_from=runs/x@700 starts a new run from the parameters of another
one, with --init_optimizer from its optimizer's moments too.

Errors end with status 1 and one message. compile needs no such devices, and ends with status 2
where the training step does not fit them.

    python -m moepp_jax.main generate --help     # a command with its flags; --helpfull: all flags
"""

import difflib
import inspect
from collections.abc import Sequence

from absl import flags

from moepp_jax import cli
from moepp_jax.commands import analyze, compile, convert, data, evaluate, generate, lm_eval, train
from moepp_jax.errors import ConfigError

COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "analyze": analyze,
    "generate": generate,
    "lm_eval": lm_eval,
    "compile": compile,
    "data": data,
    "convert": convert,
}


def main(argv: Sequence[str]) -> None:
    _, *words = argv
    if not words or words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1) if words else []
        said = f"not {' '.join(words)!r}" if words else "as in moepp_jax.main train"
        hint = f"did you mean {near[0]}?" if near else "--help describes them"
        raise ConfigError(f"give one command of {', '.join(COMMANDS)}, {said}; {hint}")
    COMMANDS[words[0]].run(words[1:])


def describe(words: Sequence[str]) -> str:
    """The text of --help: of a command with its flags, or of all in short."""
    if not words or words[0] not in COMMANDS:
        return __doc__
    module = COMMANDS[words[0]]
    _, _, shown = flags.FLAGS.module_help(module).lstrip().partition("\n")  # the module's name
    return f"{inspect.cleandoc(module.__doc__)}\n\n{shown}"


if __name__ == "__main__":
    cli.run(main, describe)
