"""The paper's suite: its tasks with its shots, and our numbers beside its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moepp_jax.errors import ConfigError
from moepp_jax.harness import tasks as tasks_lib
from moepp_jax.harness.tasks import Task

# Where `benchmarks` says that the harness is to download the items itself.
HUB = "hub"

# Of the standard error of LAMBADA's perplexity; all others have a formula.
_DRAWS = 1000


def select(names: Sequence[str], benchmarks: str) -> list[Task]:
    """The tasks that can be run with these files.

    Raises:
      ConfigError: there are no files, or none of a task that was asked for by name.
    """
    asked = tasks_lib.chosen(names)
    if benchmarks == HUB:
        return asked
    folder = Path(benchmarks)
    there = [task for task in asked if tasks_lib.has_files(task, folder)]
    missing = [task.name for task in asked if task not in there]
    if not there or (names and missing):
        raise ConfigError(
            f"--benchmarks={benchmarks} has no files of {', '.join(missing)}: "
            f"`moepp data benchmarks --dir={benchmarks}` makes them (LogiQA's with "
            f"--logiqa=FILE); --benchmarks={HUB} lets the harness download the items"
        )
    return there


def run(model: Any, tasks: Sequence[Task], benchmarks: str, limit: int | None) -> dict[str, Any]:
    """The harness's evaluation of the tasks, and where the tokens of each went.

    Args:
      model: an `MoEPPJax`.
      limit: items of each task (of each subject of MMLU), or all.

    Returns:
      {"rows": [see `row`], "harness": what the harness itself reports}.
    """
    if benchmarks != HUB:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    # JAX has threads, with which the harness's worker processes must not be forked.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        tasks_lib.write(Path(folder), None if benchmarks == HUB else Path(benchmarks))
        manager = TaskManager(include_path=folder, include_defaults=False)
        report = simple_evaluate(
            model=model,
            tasks=[task.name for task in tasks],
            task_manager=manager,
            limit=limit,
            log_samples=False,
            bootstrap_iters=_DRAWS,
        )
    kept = ("results", "groups", "n-samples", "n-shot", "versions", "config")
    return {
        "rows": [row(task, report, model, local=benchmarks != HUB) for task in tasks],
        "harness": {name: report[name] for name in kept if name in report},
    }


def row(task: Task, report: dict[str, Any], model: Any, local: bool) -> dict[str, Any]:
    """One task's line.

    It has task, shots, metric, items, value and stderr (%), paper (%), ffn_experts_per_token (mean
    over the layers), ffn_experts_per_token_by_layer, paper_ffn_experts_per_token, load_by_layer
    (share of the assignments that each expert served) and notes.
    """
    result = report["results"][task.name]
    metric = next(name for name in result if name.split(",")[0] == task.metric)
    stderr = result[metric.replace(",", "_stderr,", 1)]
    parts = [name for name in report["n-samples"] if _belongs(name, task)]
    tallies = [model.tallies[name] for name in parts if name in model.tallies]
    m = model.config.model
    nothing = np.zeros((m.num_layers // m.moe_every, model.config.moe.num_experts))
    served = sum((np.asarray(tally.served) for tally in tallies), start=nothing)
    tokens = max(1, sum(tally.tokens for tally in tallies))  # none, if no answer can be scored
    by_layer = served[:, : model.config.moe.n_ffn].sum(axis=1) / tokens
    notes = [task.note] if local and task.note else []
    if cut := sum(tally.cut for tally in tallies):
        share = cut / sum(tally.requests for tally in tallies)
        notes.append(f"{share:.0%} of the prompts cut to their last {model.max_length} tokens")
    if unscored := sum(tally.unscored for tally in tallies):
        notes.append(
            f"{unscored} answers count as impossible: empty, or of more than {model.max_length} "
            "tokens"
        )
    return {
        "task": task.label,
        "name": task.name,
        "shots": task.shots,
        "metric": task.metric,
        "items": sum(report["n-samples"][name]["effective"] for name in parts),
        "value": 100 * result[metric],
        "stderr": 100 * stderr if isinstance(stderr, float) else None,
        "paper": task.paper,
        "ffn_experts_per_token": float(by_layer.mean()),
        "ffn_experts_per_token_by_layer": by_layer.tolist(),
        "paper_ffn_experts_per_token": task.paper_ffn,
        "load_by_layer": (served / np.maximum(served.sum(axis=1, keepdims=True), 1)).tolist(),
        "notes": notes,
    }


def _belongs(name: str, task: Task) -> bool:
    return name == task.name or (task.name == "mmlu" and name.startswith("mmlu_"))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as the paper's table, with what is to be known of them below."""
    lines = [
        f"{'task':12} {'shots':>5} {'metric':12} {'items':>6} {'ours':>14} {'paper 7B':>9} "
        f"{'FFN/token':>10} {'middle':>7} {'paper':>6}"
    ]
    for r in rows:
        error = "" if r["stderr"] is None else f" ± {r['stderr']:.1f}"
        layers = r["ffn_experts_per_token_by_layer"]
        lines.append(
            f"{r['task']:12} {r['shots']:5} {r['metric']:12} {r['items']:6} "
            f"{r['value']:7.1f}{error:>7} {r['paper']:9.1f} {r['ffn_experts_per_token']:10.3f} "
            f"{layers[(len(layers) - 1) // 2]:7.3f} {r['paper_ffn_experts_per_token']:6.3f}"
        )
    ours, paper = (np.mean([r[name] for r in rows]) for name in ("value", "paper"))
    lines.append(f"{'average':12} {'':25} {ours:7.1f}{'':7} {paper:9.1f}")
    lines += [
        "",
        "paper 7B: MoE++ 7B/(16+4)E after 1T tokens. FFN/token: FFN experts that served a token",
        "of the requests, mean over the layers; middle: in the middle layer, as in the paper's",
        "column (layer 12 of 24). The paper's average of all eleven tasks is 56.2.",
    ]
    lines += [f"{r['task']}: {'; '.join(r['notes'])}." for r in rows if r["notes"]]
    return "\n".join(lines)
