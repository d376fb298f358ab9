"""Tables, figures and page from the records of a folder; needs no JAX."""

from __future__ import annotations

from pathlib import Path

from moepp_jax.analysis import page, record, report
from moepp_jax.storage import write_atomic

RECORD, AGAINST, PAGE = "routing.parquet", "against.parquet", "page.html"


def draw(folder: Path, page_tokens: int = 0) -> list[Path]:
    """Writes REPORT.md with what it shows, and the page; returns what was written.

    Args:
      page_tokens: of the page, at most; 0 for none.

    Raises:
      ConfigError: there is no record, or it cannot be read.
    """
    files = [folder / RECORD, folder / AGAINST]
    records = [record.read(file) for file in files if file == files[0] or file.exists()]
    written = [report.write(folder, records, records[0].meta.more.get("command", ""))]
    if page_tokens:
        write_atomic(folder / PAGE, page.build(records, page_tokens))
        written.append(folder / PAGE)
    return written
