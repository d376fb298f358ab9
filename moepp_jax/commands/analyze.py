"""analyze --workdir=RUN: where the tokens of a text go: a file, tables, figures and a page.

    analyze --workdir=RUN                              # held-out text of all its sources
    analyze --workdir=RUN --suite=paper --source=NAME  # the paper's tasks, and one source
    analyze --workdir=RUN --text=FILE --page           # a file; and a page to read it on
    analyze --workdir=RUN --against=RUN2               # two runs side by side
    analyze --workdir=RUN --wandb=PROJECT              # and sent to Weights & Biases
    analyze --out=FOLDER --redraw                      # redraws tables and figures from the file

The routing is written to OUT/routing.parquet. OUT/REPORT.md, tables (CSV) and figures are drawn
from it alone; `python -m moepp_jax.analysis OUT` redraws them without JAX.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import jax
from absl import flags

from moepp_jax import cli, devices, processes, progress, wandb_log
from moepp_jax.analysis import draw
from moepp_jax.commands import options
from moepp_jax.errors import ConfigError
from moepp_jax.storage import is_local, open_path
from moepp_jax.workdir import alone

for _name in ("workdir", "step", "strict", "config", "zero_offset", "suite", "tasks", "benchmarks"):
    flags.declare_key_flag(_name)
for _name in ("wandb", "wandb_mode"):
    flags.declare_key_flag(_name)
flags.adopt_module_key_flags(devices)
_TEXT = cli.define_paths("text", "a text file; may be given several times")
_SOURCE = flags.DEFINE_multi_string(
    "source", [], "a source of the run, for its held-out text; may be given several times"
)
_TOKENS = flags.DEFINE_integer("tokens", 200_000, "tokens in all, divided equally among the parts")
_OUT = cli.define_path("out", None, "folder to write to; default: WORKDIR/analysis")
_AGAINST = cli.define_path("against", None, "folder of a run to compare with")
_PAGE = flags.DEFINE_bool("page", False, "also write page.html, which shows every token")
_PAGE_TOKENS = flags.DEFINE_integer(
    "page_tokens", 50_000, "tokens on the page, at most", lower_bound=1
)
_REDRAW = flags.DEFINE_bool(
    "redraw", False, "redraw from OUT/routing.parquet without running a model"
)

# What of the folder is sent to Weights & Biases: all but the records, which are large.
_SHOWN = {".md", ".csv", ".png", ".svg", ".html"}


def run(arguments: list[str]) -> None:
    options.no_more(arguments)
    wandb = options.given_wandb()
    if wandb:
        wandb_log.check(options.given_workdir(), wandb)
    if _REDRAW.value:
        folder = _folder()
        _draw(folder, wandb)
        return
    # What takes long to import is imported once the flags are known to be right.
    from moepp_jax import observe

    config, workdir = options.config_of_run(), options.given_workdir()
    if options.ZERO_OFFSET.value is not None:
        config = config.replace("moe.rule", zero_offset=options.ZERO_OFFSET.value)
    folder = _folder()
    text = observe.Text(
        files=_TEXT.value,
        sources=_SOURCE.value,
        suite=options.SUITE.value is not None or bool(options.TASKS.value),
        tasks=options.TASKS.value,
        benchmarks=options.BENCHMARKS.value,
        tokens=_TOKENS.value,
    )
    jax.config.update("jax_enable_preemption_service", False)
    devices.start(config)
    against = [_AGAINST.value] if _AGAINST.value else []
    files = [folder / draw.RECORD, *(folder / draw.AGAINST for _ in against)]
    with progress.passing_bar("batches") as moved:
        observe.analyze(
            config, workdir, options.STEP.value, text, files, against, moved, _command()
        )
    if processes.is_first():
        _draw(folder, wandb)


def _folder() -> Path:
    """
    Raises:
      ConfigError: none is given, or the one that follows from the work directory is in a bucket.
    """
    if _OUT.value:
        if "://" in _OUT.value:
            raise ConfigError(f"--out={_OUT.value} is in a bucket: name a folder of this machine")
        return Path(_OUT.value)
    if _REDRAW.value and not options.WORKDIR.value:
        raise ConfigError("--redraw of what? Write --out=FOLDER, or --workdir=RUN")
    workdir = options.given_workdir()
    if not is_local(open_path(workdir)):
        raise ConfigError(f"--workdir={workdir} is in a bucket: say --out=FOLDER, of this machine")
    return Path(workdir) / "analysis"


def _draw(folder: Path, wandb: wandb_log.Wandb | None) -> None:
    for written in draw.draw(folder, _PAGE_TOKENS.value if _PAGE.value else 0):
        print(f"written {written}")
    if wandb:
        shown = sorted(file for file in folder.iterdir() if file.suffix in _SHOWN)
        workdir = options.given_workdir()
        with alone(workdir):  # a run that is trained is sent by that process
            wandb_log.send(wandb, workdir, files=shown)


def _command() -> str:
    return shlex.join(["moepp", *sys.argv[1:]])
