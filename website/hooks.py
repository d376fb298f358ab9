"""Which pages there are: those of the repository, where they lie, and the tutorial as it ran.

Every page keeps its path in the repository, so the links between them are right as they are.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).resolve().parents[1]
GATHERED = ("*.md", "CITATION.cff", "docs/**/*", "experiments/results/**/*")
SUFFIXES = {".cff", ".md", ".png", ".svg", ".csv", ".html"}
TUTORIAL = ROOT / "docs" / "tutorial.py"
MADE = ROOT / "build" / "tutorial"
# Pages that the text names as code, `docs/RUNS.md`, though not where code is linked already.
_NAMED = re.compile(r"(?<!\">)<code>((?:docs|experiments)/[\w/]+?(?:\.md)?)</code>")
_ROUTING_PAGE = "docs/routing/page.html"


def on_files(files, *, config):
    for path in gathered():
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    for path in tutorial():
        uri = f"docs/{path.relative_to(MADE).as_posix()}"
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    uris = [file.src_uri for file in files.documentation_pages()]
    config.nav = expanded(config.nav, uris, set(_named(config.nav)))
    return files


def on_page_markdown(markdown, *, page, config, files):
    if page.file.src_uri != "routing_page.md":
        return markdown
    there = files.get_file_from_path(_ROUTING_PAGE) is not None
    frame = f'<iframe src="{_ROUTING_PAGE}" title="The routing page" class="frame"></iframe>'
    picture = f"![The routing page]({_ROUTING_PAGE.replace('.html', '.png')})"
    return markdown.replace("<!-- the page -->", frame if there else picture)


def on_page_content(html, *, page, config, files):
    def linked(found: re.Match) -> str:
        for uri in (found[1], f"{found[1]}/README.md", f"{found[1]}/REPORT.md"):
            if file := files.get_file_from_path(uri):
                url = get_relative_url(file.url, page.url)
                return f'<a href="{url}"><code>{found[1]}</code></a>'
        return found[0]

    return _NAMED.sub(linked, html)


def gathered() -> list[Path]:
    """Files of the repository that are pages, or that pages show."""
    found = (path for pattern in GATHERED for path in sorted(ROOT.glob(pattern)))
    return [path for path in found if path.suffix in SUFFIXES]


def tutorial() -> list[Path]:
    """The tutorial's page and what it shows; it runs if it, or the package, is not as it was.

    Raises:
      PluginError: a cell failed.
    """
    sources = [TUTORIAL, ROOT / "website" / "cells.py", *sorted(ROOT.glob("moepp_jax/**/*.py"))]
    state = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()
    key = MADE / "of.sha256"
    if not key.is_file() or key.read_text() != state:
        shutil.rmtree(MADE, ignore_errors=True)
        MADE.mkdir(parents=True)
        command = [sys.executable, "-m", "website.cells", str(TUTORIAL), str(MADE)]
        ran = subprocess.run(command, cwd=ROOT, env=os.environ | {"MPLBACKEND": "Agg"})
        if ran.returncode:
            raise PluginError(f"{TUTORIAL.relative_to(ROOT)} did not run to its end: see above")
        key.write_text(state)
    return [path for path in sorted(MADE.rglob("*")) if path.is_file() and path != key]


def expanded(entries: list[Any], uris: list[str], named: set[str]) -> list[Any]:
    """A nav whose patterns are replaced by the pages that they match and that are not named."""
    nav = []
    for entry in entries:
        if isinstance(entry, dict):
            ((title, below),) = entry.items()
            is_section = isinstance(below, list)
            nav.append({title: expanded(below, uris, named) if is_section else below})
        elif "*" in entry:
            nav += [_titled(uri) for uri in uris if uri not in named and _matches(uri, entry)]
        else:
            nav.append(_titled(entry))
    return nav


def _named(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        below = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from _named(below) if isinstance(below, list) else [below]


def _matches(uri: str, pattern: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", "[^/]*"), uri) is not None


def _titled(uri: str) -> str | dict[str, str]:
    """Reports are called as their folders: their own titles are whole questions."""
    path = Path(uri)
    if path.name == "REPORT.md":
        return {path.parent.name.replace("_", " "): uri}
    return {"Overview": uri} if uri.endswith("results/" + path.parent.name + "/README.md") else uri
