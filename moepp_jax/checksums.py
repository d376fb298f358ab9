"""The SHA-256 of every file of a folder, kept in it: a flipped byte would be read in silence."""

import concurrent.futures
import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from moepp_jax.storage import AnyPath, files_below, write_atomic

_FILE = "checksums.json"
_NOT_READ = ("is missing", "cannot be read")


def write(folder: AnyPath, items: Iterable[str]) -> None:
    """Sums up every file in these folders of the folder."""
    names = _names(folder, list(items))
    sums = dict(zip(names, _sha256([folder / name for name in names]), strict=True))
    write_atomic(folder / _FILE, json.dumps(sums, indent=0))


class Verdict(NamedTuple):
    """What is wrong with files, in words; nothing if they are as they were summed up.

    Attributes:
      damage: a file is missing, cannot be read or is not what it was.
      doubt: a file was never summed up, so nobody knows.
    """

    damage: str | None = None
    doubt: str | None = None


def verdict(folder: AnyPath, items: Collection[str], required: Collection[str]) -> Verdict:
    """On every file of these items.

    Args:
      required: items that must have files.
    """
    try:
        there = _names(folder, items)
        missing = [item for item in required if not any(_item(name) == item for name in there)]
        if missing:
            return Verdict(damage=f"{missing[0]}/ is missing")
        if not (folder / _FILE).exists():
            return Verdict(doubt=f"it has no {_FILE}")
        sums = dict(json.loads((folder / _FILE).read_text(encoding="utf-8")))
    except OSError as error:
        return Verdict(damage=f"it cannot be read: {error.strerror or error}")
    except (ValueError, TypeError) as error:
        return Verdict(damage=f"{_FILE} is no JSON object ({error})")
    names = [name for name in sums if _item(name) in items]
    for name, found in zip(names, _sha256([folder / name for name in names]), strict=True):
        if found != sums[name]:
            wrong = found if found in _NOT_READ else "is not as it was saved"
            return Verdict(damage=f"{name} {wrong}")
    left = sorted(set(there) - set(names))
    return Verdict(doubt=f"{left[0]} is not in its {_FILE}" if left else None)


def are_there(folder: AnyPath) -> bool:
    """Whether any file of a folder was summed up; looks at none of them."""
    try:
        return bool(json.loads((folder / _FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def _names(folder: AnyPath, items: Collection[str]) -> list[str]:
    files = (file for item in items for file in files_below(folder / item))
    return [file.relative_to(folder).as_posix() for file in files]


def _item(name: str) -> str:
    return name.split("/")[0]


def of_all(folder: AnyPath) -> str:
    """One checksum of all that was summed up; empty without checksums."""
    file = folder / _FILE
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


def _sha256(files: Sequence[AnyPath]) -> list[str]:
    """Of several files at once, as hashing leaves the interpreter to others; or of `_NOT_READ`."""

    def digest(file: AnyPath) -> str:
        try:
            with file.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except FileNotFoundError:
            return _NOT_READ[0]
        except OSError:
            return _NOT_READ[1]

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(digest, files))
