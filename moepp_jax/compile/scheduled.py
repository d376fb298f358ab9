"""The training step compiled as far as its schedule, in a process that is then ended.

The compiler writes the scheduled program and its plan of the memory before it makes machine code,
which takes it minutes for a model whose schedule it has in seconds.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from moepp_jax import worker
from moepp_jax.config import Config
from moepp_jax.errors import ConfigError

_TIMEOUT = 1800.0
_LOOK_EVERY = 0.1
_TEXT = "*jit_step*.after_optimizations.txt"
_MEMORY = "*jit_step*.after_optimizations-memory-usage-report.txt"
_LAST_LINES = 4


class Scheduled(NamedTuple):
    """
    Attributes:
      text: HLO, in the order in which a device runs it.
      hbm_bytes: of a device, what is there when most is, the program itself aside.
    """

    text: str
    hbm_bytes: int


class DiedError(Exception):
    """The compiler ended before it had a schedule; what it said last."""


def compile_step(config: Config, topology: str, timeout: float = _TIMEOUT) -> Scheduled:
    """Schedules a training step for a topology of TPUs.

    Raises:
      DiedError: the compiler failed.
      ConfigError: it took longer than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="moepp_compile_", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "config.json").write_text(config.to_json())
        command = worker.command("moepp_jax.compile.child", str(folder / "config.json"), topology)
        with (folder / "said").open("wb") as said:
            child = subprocess.Popen(
                command,
                env=_environment(folder),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )
            try:
                return _wait(child, folder, topology, timeout)
            finally:
                child.kill()
                child.wait()


def _environment(folder: Path) -> dict[str, str]:
    dumps = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*jit_step.*"
    return os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {dumps}".strip(),
        # This process may have the compiler loaded, and waits.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # The worker looks for modules where we do, and a rule of the user's is one.
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }


def _wait(child: subprocess.Popen, folder: Path, topology: str, timeout: float) -> Scheduled:
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        ended = child.poll() is not None  # before we look, so that nothing comes after
        if found := _read(folder):
            return found
        if ended:
            raise DiedError(_last_words(folder, child.returncode))
        time.sleep(_LOOK_EVERY)
    raise ConfigError(
        f"--topology={topology}: no schedule after {timeout:.0f} s; a smaller "
        "config.model.num_layers shows whether there is one, and --profile=full waits for ever"
    )


def _read(folder: Path) -> Scheduled | None:
    """Both, once they are there: the compiler writes that of the memory last."""
    report = next(folder.glob(_MEMORY), None)
    total = report and re.search(r"\(color=0\)\s+Total bytes: (\d+) ", report.read_text())
    if not total:
        return None
    return Scheduled(next(folder.glob(_TEXT)).read_text(), int(total[1]))


def _last_words(folder: Path, status: int) -> str:
    said = (folder / "said").read_text(errors="replace").splitlines()
    lines = [" ".join(line.split()) for line in said if line.strip()]
    telling = [line for line in lines if "RESOURCE_EXHAUSTED" in line]
    if telling:
        return telling[-1]
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return f"the compiler ended with {how}: {' | '.join(lines[-_LAST_LINES:]) or 'it said nothing'}"
