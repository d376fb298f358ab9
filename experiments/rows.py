"""Rows of an experiment as a file: what is finished is kept when a sweep is stopped."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moepp_jax.storage import write_atomic


def write(file: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """As CSV, numbers to six digits; the file is replaced whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    write_atomic(file, text.getvalue())
