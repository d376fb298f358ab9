"""The paper's eleven tasks (its table of the 1T-token 7B model) as tasks of the harness."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moepp_jax.errors import ConfigError
from moepp_jax.storage import write_atomic


@dataclasses.dataclass(frozen=True)
class Task:
    """One row of the paper's table.

    Attributes:
      label: the paper's name; `name` is the harness's.
      shots: solved examples before each question.
      metric: acc; acc_norm (the choices' log-likelihoods over their bytes) where tables with these
        shots customarily give it: the paper does not say which it gives.
      paper: of the 7B model after 1T tokens, %.
      paper_ffn: FFN experts per token there, in layer 12 of 24.
      shipped: the harness's definition, below its folder of tasks.
      evaluated: the split whose items are asked, of our files.
      examples: the split that the examples come from; the evaluated one lends all items but the one
        asked.
      note: how our files differ from what the harness would download.
    """

    label: str
    name: str
    shots: int
    metric: str
    paper: float
    paper_ffn: float
    shipped: str
    evaluated: str = "validation"
    examples: str = "validation"
    note: str = ""


_OWN = "examples from the evaluated split, the asked item left out"

PAPER = (
    Task(
        "SciQ", "sciq", 0, "acc", 89.7, 1.486, "sciq/sciq.yaml",
        note="the validation split instead of the test split",
    ),
    Task("PIQA", "piqa", 0, "acc", 77.6, 1.588, "piqa/piqa.yaml"),
    Task("WinoGrande", "winogrande", 0, "acc", 63.1, 1.582, "winogrande/default.yaml"),
    Task("ARC-E", "arc_easy", 0, "acc", 66.5, 1.569, "arc/arc_easy.yaml", "test"),
    Task(
        "ARC-C", "arc_challenge", 25, "acc_norm", 42.3, 1.515, "arc/arc_challenge.yaml", "test",
        note="examples from the validation split instead of the training split",
    ),
    Task(
        "HellaSwag", "hellaswag", 10, "acc_norm", 72.3, 1.590, "hellaswag/hellaswag.yaml",
        note=_OWN,
    ),
    Task("LogiQA", "logiqa", 0, "acc_norm", 28.4, 1.533, "logiqa/logiqa.yaml", "test"),
    Task("BoolQ", "boolq", 32, "acc", 68.3, 1.553, "super_glue/boolq/default.yaml", note=_OWN),
    Task(
        "LAMBADA", "lambada_openai", 0, "acc", 67.4, 1.564, "lambada/lambada_openai.yaml", "test",
        note="line ends are spaces",
    ),
    Task("NQ", "nq_open", 32, "exact_match", 18.1, 1.519, "nq_open/nq_open.yaml", note=_OWN),
    Task("MMLU", "mmlu", 5, "acc", 24.6, 1.499, "mmlu/default", "test", "dev"),
)  # fmt: skip


def chosen(names: Sequence[str]) -> list[Task]:
    """The tasks of these names, the paper's or the harness's; all of them if none is given.

    Raises:
      ConfigError: a name is of no task.
    """
    known = {name.lower(): task for task in PAPER for name in (task.name, task.label)}
    if unknown := [name for name in names if name.lower() not in known]:
        raise ConfigError(
            f"--tasks={','.join(unknown)}: the suite's tasks are "
            + ", ".join(task.name for task in PAPER)
        )
    wanted = [known[name.lower()] for name in names]
    return [task for task in PAPER if not names or task in wanted]


def has_files(task: Task, benchmarks: Path) -> bool:
    return (benchmarks / task.name).is_dir()


def write(folder: Path, benchmarks: Path | None = None) -> None:
    """Writes the tasks' definitions, for the harness's --include_path.

    Each is the harness's own with the paper's shots; from it come the prompts and the metrics.

    Args:
      benchmarks: where `data benchmarks` put the items; without it the harness downloads them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shipped = harness_folder() / "tasks"
    for task in PAPER:
        if benchmarks and not has_files(task, benchmarks):
            continue
        if task.name == "mmlu":
            _write_mmlu(folder, task, shipped / task.shipped, benchmarks)
            continue
        files = benchmarks and benchmarks / task.name
        _write(folder / f"{task.name}.yaml", _definition(task, shipped / task.shipped, files))


def harness_folder() -> Path:
    """Of the installed package; finding it imports nothing."""
    return Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0])


def _definition(task: Task, shipped: Path, files: Path | None) -> dict[str, Any]:
    changes: dict[str, Any] = {"include": str(shipped), "num_fewshot": task.shots}
    if files is None:
        return changes
    splits = {task.evaluated, task.examples} if task.shots else {task.evaluated}
    return changes | {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str((files / f"{split}.jsonl").resolve()) for split in splits}
        },
        # The harness keeps the asked item out of its examples where both splits have one name.
        "training_split": None,
        "validation_split": None,
        "test_split": task.evaluated,
        "fewshot_split": task.examples if task.shots else None,
    }


def _write_mmlu(folder: Path, task: Task, shipped: Path, benchmarks: Path | None) -> None:
    """MMLU's subjects, and the groups that average them."""
    for file in sorted(shipped.glob("*mmlu*.yaml")):
        if file.name.startswith("_"):
            _write(folder / file.name, {"include": str(file)})
            continue
        subject = file.stem.removeprefix("mmlu_")
        files = benchmarks and benchmarks / "mmlu" / subject
        _write(folder / file.name, _definition(task, file, files))


def _write(file: Path, definition: dict[str, Any]) -> None:
    write_atomic(file, json.dumps(definition, indent=2) + "\n")  # JSON is YAML
