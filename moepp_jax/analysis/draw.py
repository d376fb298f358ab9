"""Tables, figures and page from the records of a folder; needs no JAX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moepp_jax.analysis import page, record, report
from moepp_jax.errors import ConfigError
from moepp_jax.storage import write_atomic

RECORD, AGAINST, PAGE = "routing.parquet", "against.parquet", "page.html"


def _require_same_text(records: Sequence[record.Record]) -> None:
    first, *others = records
    for other in others:
        if not np.array_equal(first.rows.token, other.rows.token):
            raise ConfigError(
                f"{RECORD} and {AGAINST} are of different texts: analyze again, or remove {AGAINST}"
            )


def draw(folder: Path, page_tokens: int = 0) -> list[Path]:
    """Writes REPORT.md with what it shows, and the page; returns what was written.

    Args:
      page_tokens: of the page, at most; 0 for none.

    Raises:
      ConfigError: there is no record, or it cannot be read.
    """
    files = [folder / RECORD, folder / AGAINST]
    records = [record.read(file) for file in files if file == files[0] or file.exists()]
    _require_same_text(records)
    written = [report.write(folder, records, records[0].meta.more.get("command", ""))]
    if page_tokens:
        write_atomic(folder / PAGE, page.build(records, page_tokens))
        written.append(folder / PAGE)
    return written
