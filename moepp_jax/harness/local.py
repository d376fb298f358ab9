"""What `data benchmarks` does: the items, and the tasks that read them."""

from collections.abc import Callable
from pathlib import Path

from moepp_jax.data import benchmarks
from moepp_jax.harness import needed, tasks


def build(folder: Path, logiqa: Path | None, report: Callable[[str], None] = print) -> None:
    """Puts the benchmarks' items into a folder and, if lm_eval is here, tasks into folder/tasks.

    Raises:
      ConfigError: as `benchmarks.build`.
    """
    benchmarks.build(folder, logiqa, report)
    if needed.is_installed("lm_eval"):
        tasks.write(folder / "tasks", folder)
        report(f"{folder / 'tasks'}: for --include_path of the harness's own command line")
