"""The command in a process that is forked where all is imported: it starts sooner, and ends alike.

For runs that go on, and for those whose start is not what is broken.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from moepp_jax import main

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["moepp_jax.cli", "moepp_jax.commands.train", __name__])


class Forked:
    """A process of `moepp` with these arguments, and with only this environment.

    Args:
      said: a folder for what it says.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], said: Path):
        said.mkdir(parents=True)
        self._said = said
        self._process = _FORKS.Process(target=_moepp, args=(arguments, environment, said))
        self._process.start()

    def wait(self, seconds: float) -> int | None:
        """Its status; None if it still runs after so long, and is killed."""
        self._process.join(seconds)
        status = self._process.exitcode
        self._process.kill()
        self._process.join()
        return status

    def out(self) -> str:
        return (self._said / "out").read_text(errors="replace")

    def err(self) -> str:
        return (self._said / "err").read_text(errors="replace")


def _moepp(arguments: Sequence[str], environment: Mapping[str, str], said: Path) -> None:
    os.chdir(Path(__file__).parents[2])
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(said / name, os.O_WRONLY | os.O_CREAT, 0o666), number)
    for name in ("compilation_cache_dir", *_NUMBERS):  # read from the environment when imported
        value = environment[f"JAX_{name.upper()}"]
        jax.config.update(f"jax_{name}", int(value) if name in _NUMBERS else value)
    sys.argv = ["moepp", *arguments]
    main.main()


_NUMBERS = (
    "persistent_cache_min_compile_time_secs",
    "persistent_cache_min_entry_size_bytes",
)
