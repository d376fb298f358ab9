"""A Python file in percent format to a page in Markdown, with what its cells print and draw.

    python -m website.cells docs/tutorial.py build/tutorial

writes tutorial.md and, in tutorial/, its figures and frames. A cell begins with `# %%`, one of text
with `# %% [markdown]`; of a cell of code `# %% [folded]` the page shows what it made, and the code
on demand. What stands last in a cell is shown, as in a notebook. Jupyter, VS Code and jupytext open
such files too.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_HEAD = re.compile(r"# %%(?: \[(\w+)\])?")
KINDS = {None: "code", "markdown": "markdown", "folded": "folded"}


class Cell(NamedTuple):
    """
    Attributes:
      kind: "code", "markdown" or "folded".
      line: number of its first line in the file, from 0.
    """

    kind: str
    line: int
    text: str


class CellError(ValueError):
    """A file that is not in percent format; the message names the line and what would be right."""


def split(source: str, name: str = "file") -> list[Cell]:
    """The cells of a file; what stands before the first is left out.

    Raises:
      CellError: there is no cell, one is of no known kind, or text is not in comments.
    """
    lines = source.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("# %%")]
    if not starts:
        raise CellError(f"{name} has no cell: each begins with a line `# %%`")
    cells = []
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        head = _HEAD.fullmatch(lines[start].rstrip())
        if head is None or head[1] not in KINDS:
            raise CellError(
                f"{name}, line {start + 1}: {lines[start]!r} must be # %%, # %% [markdown] or "
                "# %% [folded]"
            )
        kind, body = KINDS[head[1]], lines[start + 1 : end]
        if kind == "markdown":
            body = [_uncommented(line, start + 2 + i, name) for i, line in enumerate(body)]
        cells.append(Cell(kind, start + 1, "\n".join(body).strip("\n")))
    return cells


def run(path: Path, out: Path) -> Path:
    """Runs all cells, in the module `__main__` as a script's, and writes the page.

    Raises:
      CellError: as `split`.
    """
    cells = split(path.read_text(encoding="utf-8"), path.name)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module  # where classes of the cells are found by name
    shown = _Shown(out, path.stem)
    parts = []
    for cell in cells:
        if cell.kind == "markdown":
            parts.append(cell.text)
            continue
        code = f"```python\n{cell.text}\n```"
        parts.append(code if cell.kind == "code" else _folded(code))
        parts += _execute(cell, path, vars(module), shown)
    page = out / f"{path.stem}.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def _execute(cell: Cell, path: Path, namespace: dict, shown: _Shown) -> Iterator[str]:
    tree = ast.parse(cell.text)
    ast.increment_lineno(tree, cell.line)  # tracebacks name lines of the file
    last = tree.body.pop().value if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, path, "exec"), namespace)
        value = None
        if last is not None:
            value = eval(compile(ast.Expression(last), path, "eval"), namespace)
    framed = hasattr(value, "html")
    text = printed.getvalue() + ("" if value is None or framed else repr(value))
    if text.strip():
        yield f"```text\n{text.rstrip()}\n```"
    if framed:
        yield shown.frame(value)
    yield from shown.figures()


class _Shown:
    """What cells made, in files beside the page."""

    def __init__(self, out: Path, stem: str):
        self.folder, self.count = out / stem, 0
        self.folder.mkdir(parents=True, exist_ok=True)

    def figures(self) -> Iterator[str]:
        from matplotlib import pyplot

        for number in pyplot.get_fignums():
            figure = pyplot.figure(number)
            file = self._next("figure", "png")
            figure.savefig(file, dpi=120, bbox_inches="tight")
            yield f"![{figure.get_suptitle()}]({self.folder.name}/{file.name})"
            pyplot.close(figure)

    def frame(self, value) -> str:
        """What is a whole page, in a frame of its own."""
        file = self._next("frame", "html")
        file.write_text(value.html(), encoding="utf-8")
        source = f"{self.folder.name}/{file.name}"
        named = f'title="{type(value).__name__}" class="frame" sandbox="allow-scripts"'
        return f'<iframe src="{source}" {named}></iframe>'

    def _next(self, what: str, suffix: str) -> Path:
        self.count += 1
        return self.folder / f"{what}-{self.count}.{suffix}"


def _folded(code: str) -> str:
    return f'<details markdown="1"><summary>The code of this</summary>\n\n{code}\n\n</details>'


def _uncommented(line: str, number: int, name: str) -> str:
    if line and line != "#" and not line.startswith("# "):
        raise CellError(f"{name}, line {number}: text must be in comments, not {line!r}")
    return line[2:]


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")
    sys.path.insert(0, os.getcwd())
    run(Path(sys.argv[1]), Path(sys.argv[2]))
