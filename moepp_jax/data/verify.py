"""Prepared data read again, every byte, beside what was noted when it was written."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moepp_jax.config import Config
from moepp_jax.data import records
from moepp_jax.data.prepare import noted_text, prepared_sources
from moepp_jax.data.sources import Report
from moepp_jax.data.storage import DataError
from moepp_jax.data.work import Advance, Meter

# Bytes that are read at once.
_CHUNK = 2**20


def verify(config: Config, report: Report = print, workers: int | None = None) -> None:
    """Reads all that is prepared for this configuration, and reports each file that is damaged.

    Args:
      workers: files that are read at once; by default a few more than there are cores.

    Raises:
      DataError: files are missing or not as they were written; once all are read.
      ConfigError: something is not prepared.
    """
    folders = {}
    for name, tokens in prepared_sources(config).tokens.items():
        text = Path(config.data.dir) / noted_text(config.data, name)
        folders |= {folder: name for folder in (text, tokens) if folder.exists()}
    files = {file: noted for folder in folders for file, noted in records.files(folder).items()}
    total = sum(size for size, _ in files.values())
    damaged: dict[Path, DataError] = {}
    with Meter("verify", total, 0, report) as meter, ThreadPoolExecutor(workers) as pool:
        advance = _locked(meter.advance)
        checks = pool.map(lambda file: _damage(file, *files[file], advance), files)
        for file, error in zip(files, checks, strict=True):
            if error is not None:
                damaged[file] = error
                report(f"damaged: {str(error).partition(';')[0]}")
    for folder, name in folders.items():
        sizes = [size for file, (size, _) in files.items() if file.parent == folder]
        if not any(file.parent == folder for file in damaged):
            report(f"{name}: {sum(sizes):,} bytes of {folder} are as written")
    if damaged:
        first = next(iter(damaged.values()))
        raise DataError(f"{len(damaged)} of {len(files)} files are damaged; {first}")


def _damage(file: Path, size: int, sha256: str, advance: Advance) -> DataError | None:
    try:
        records.check_size(file, size)
        found = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                found.update(chunk)
                advance(len(chunk))
    except DataError as error:
        advance(size)
        return error
    except OSError as error:
        return records.damaged(file, f" cannot be read: {error.strerror or error}")
    if found.hexdigest() != sha256:
        return records.damaged(file, " is not as it was written: its SHA-256 is another")
    return None


def _locked(advance: Advance) -> Advance:
    """The same, for threads."""
    lock = threading.Lock()

    def one_at_a_time(num_bytes: int) -> None:
        with lock:
            advance(num_bytes)

    return one_at_a_time
