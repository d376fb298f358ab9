"""experiments NAME...: trains the missing runs of the paper's experiments, and reports.

    experiments --list                       # experiments, their runs, the time still needed
    experiments tau gating_residual          # trains what has no row yet, and reports
    experiments all --scale=small --seeds=1  # every experiment, one seed each
    experiments tau --list                   # its runs, each with its number
    experiments tau --only=3                 # only the run with that number
    experiments tau --report                 # from the existing rows
    experiments tau --only=3 --again         # trains it again and compares with its row
    experiments tau --scale=paper --topology=v5p:4x4x4  # compiles it for a pod

Rows are in RESULTS/SCALE/runs.csv, identified by what a run computes: each run is trained once,
whichever experiment asks. Runs are in --workdir and continue where they were stopped. Any number of
processes may share both folders; each takes runs that no other is working on.
"""

from pathlib import Path

from absl import flags
from rich.console import Console

from moepp_jax import cli
from moepp_jax.commands import options
from moepp_jax.errors import ConfigError
from moepp_jax.experiments import results, study
from moepp_jax.experiments import run as runner
from moepp_jax.experiments.scale import SCALES
from moepp_jax.experiments.scale import find as find_scale

for _name in ("workdir", "topology"):
    flags.declare_key_flag(_name)
_SCALE = flags.DEFINE_string("scale", "tiny", f"size of the runs: {', '.join(SCALES)}")
_SEEDS = flags.DEFINE_integer("seeds", None, "seeds per variant; default: the experiment's")
_ONLY = flags.DEFINE_string("only", None, "numbers of runs to train: 3, or 0,4, or 0-7")
_LIST = flags.DEFINE_bool("list", False, "list what there is to train, and train nothing")
_REPORT = flags.DEFINE_bool("report", False, "write reports from existing rows, and train nothing")
_AGAIN = flags.DEFINE_bool("again", False, "train runs that have a row again, and compare")
_RESULTS = cli.define_path("results", str(results.RESULTS), "folder of rows and reports")


def run(arguments: list[str]) -> None:
    scale, folder = find_scale(_SCALE.value), Path(_RESULTS.value)
    file = results.file_of(scale.name, folder)
    if _SEEDS.value is not None and _SEEDS.value < 1:
        raise ConfigError(f"--seeds={_SEEDS.value} must be at least 1")
    if _LIST.value:
        of, rows = runner.experiments(arguments or [runner.ALL], scale), results.read(file)
        if len(of) == 1:
            table = runner.listed_runs(of[0], scale, rows, _SEEDS.value)
        else:
            table = runner.listed(of, scale, rows, _SEEDS.value)
        Console(width=140).print(table)
        return
    if not arguments:
        there = ", ".join(study.names())
        raise ConfigError(f"which experiment? There are {there}, and {runner.ALL}")
    of = runner.experiments(arguments, scale)
    if not _REPORT.value:
        planned = runner.chosen(runner.plan(of, scale, _SEEDS.value), _ONLY.value)
        workdir = Path(options.WORKDIR.value or "runs/experiments") / scale.name
        if _AGAIN.value:
            runner.again(planned, scale, file, workdir)
            return
        if options.TOPOLOGY.value:
            runner.compile_missing(planned, scale, options.TOPOLOGY.value, folder, workdir)
        else:
            whole = _ONLY.value is None
            runner.train_missing(of if whole else [], planned, scale, folder, workdir)
    for written in runner.write_reports(of, scale, folder, _SEEDS.value):
        print(f"written {written}")
