"""curves [LABEL=]RUN ...: compares runs, as a table of held-out losses and a figure of the curves.

curves runs/a runs/b --figure=curves.png
curves moepp=runs/m0 moepp=runs/m1 vanilla=runs/v0 vanilla=runs/v1   # two rules, two seeds each

Runs of one label share a colour, and have a mean. Only metrics.jsonl is read, also that of a run
that is still being trained.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table

from moepp_jax import workdir
from moepp_jax.analysis.curves import plot_curves
from moepp_jax.commands import options
from moepp_jax.errors import ConfigError
from moepp_jax.metrics import read_metrics

flags.declare_key_flag("figure")


def run(arguments: list[str]) -> None:
    figure = Path(options.FIGURE.value or "curves.png")
    if figure.suffix != ".png":
        raise ConfigError(f"--figure={figure} must be the name of a .png file")
    runs = labelled(arguments)
    table = Table("label", "run", "step", "held-out loss", "FFN experts/token", box=None)
    for label, folders in runs.items():
        for row in _rows(label, folders):
            table.add_row(*row)
    try:
        plot_curves(runs, figure)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    Console(highlight=False).print(table)
    print(f"written {figure}")


def labelled(arguments: Sequence[str]) -> dict[str, list[str]]:
    """The folders of each label, in the order in which they were given.

    Args:
      arguments: each LABEL=RUN, or a RUN, which is its own label.

    Raises:
      ConfigError: there are none, one is no run, or one has trained nothing yet.
    """
    if not arguments:
        raise ConfigError("no run was given: write curves runs/NAME, several, or LABEL=runs/NAME")
    runs: dict[str, list[str]] = {}
    for argument in arguments:
        label, equals, folder = argument.partition("=")
        folder = folder if equals else label
        workdir.read_config(folder)
        try:
            read_metrics(folder)
        except FileNotFoundError as error:
            raise ConfigError(f"{folder} has trained nothing yet: {error}") from error
        runs.setdefault(label, []).append(folder)
    return runs


def _rows(label: str, folders: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """A row of the table for each run, by its last evaluation, and one for their mean."""
    losses = []
    for folder in folders:
        last = next((r for r in reversed(read_metrics(folder)) if "eval_loss" in r), None)
        if last is None:
            yield label, folder, "", "not evaluated yet", ""
            continue
        experts = last.get("eval_ffn_experts_per_token")
        said = "" if experts is None else f"{experts:.2f}"
        yield label, folder, f"{last['step']}", f"{last['eval_loss']:.4f}", said
        losses.append(last["eval_loss"])
    if len(losses) > 1:
        spread = f"{statistics.fmean(losses):.4f} (from {min(losses):.4f} to {max(losses):.4f})"
        yield label, f"mean of {len(losses)}", "", spread, ""
