"""Recipes by name: those that come with the package, and files of one's own."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

from moepp_jax.errors import ConfigError, did_you_mean

FOLDER = Path(__file__).parent / "configs"
_NO_RECIPES = {"base", "__init__"}


def names() -> list[str]:
    """Those that come with the package: "tiny", "routing/zeda"."""
    return sorted(_files())


def summary(name: str) -> str:
    """The first line of its docstring."""
    said = ast.get_docstring(ast.parse(_files()[name].read_text(encoding="utf-8")))
    return (said or "").partition("\n")[0]


def exists(given: str) -> bool:
    """Whether --config could be this: the name of a recipe, or a Python file that is there."""
    name = given.partition(":")[0]
    return name in _files() or (name.endswith(".py") and Path(name).is_file())


def with_file(given: str) -> str:
    """FILE[:ARGUMENT] of what --config gives: a file, or the name of a recipe of the package.

    "configs/tiny.py" is a name too: where there is no such file, the package's is meant.

    Raises:
      ConfigError: there is neither, or it is the folder of a run.
    """
    name, colon, argument = given.partition(":")
    file = Path(os.path.expanduser(name))
    if (file / "config.json").is_file():
        raise ConfigError(f"--config={name} is the folder of a run: write --config=run:{name}")
    if not file.is_file():
        there, asked = _files(), name.removeprefix("configs/").removesuffix(".py")
        if asked not in there:
            hint = did_you_mean(asked, there, "`moepp recipes` lists them")
            raise ConfigError(f"--config={name}: there is no such file, and no such recipe{hint}")
        file = there[asked]
    return f"{file}{colon}{os.path.expanduser(argument)}"


def _files() -> dict[str, Path]:
    return {name: file for name, file in _all() if name not in _NO_RECIPES}


def _all() -> Iterator[tuple[str, Path]]:
    for file in FOLDER.glob("*.py"):
        yield file.stem, file
    for file in (FOLDER / "routing").glob("[!_]*.py"):
        yield f"routing/{file.stem}", file
