"""The SHA-256 of every file of a folder, kept in it: a flipped byte would be read in silence."""

import concurrent.futures
import hashlib
import json
from collections.abc import Collection, Iterable, Sequence

from moepp_jax.storage import AnyPath, files_below, write_atomic

_FILE = "checksums.json"


def write(folder: AnyPath, items: Iterable[str]) -> None:
    """Sums up every file in these folders of the folder."""
    files = [file for item in items for file in files_below(folder / item)]
    names = [file.relative_to(folder).as_posix() for file in files]
    sums = dict(zip(names, _sha256(files), strict=True))
    write_atomic(folder / _FILE, json.dumps(sums, indent=0))


def damage(folder: AnyPath, items: Collection[str]) -> str | None:
    """Which file of these items is not what was summed up, if any; None without checksums."""
    if not (folder / _FILE).exists():
        return None
    try:
        sums = dict(json.loads((folder / _FILE).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        return f"{_FILE} is no JSON object ({error})"
    names = [name for name in sums if name.split("/")[0] in items]
    for name, found in zip(names, _sha256([folder / name for name in names]), strict=True):
        if found != sums[name]:
            return f"{name} is missing" if found is None else f"{name} is not as it was saved"
    return None


def of_all(folder: AnyPath) -> str:
    """One checksum of all that was summed up; empty without checksums."""
    file = folder / _FILE
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


def _sha256(files: Sequence[AnyPath]) -> list[str | None]:
    """Of several files at once, as hashing leaves the interpreter to others; None if not there."""

    def digest(file: AnyPath) -> str | None:
        if not file.exists():
            return None
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(digest, files))
