"""Sums of every file of a folder, kept in it: a flipped byte would be read in silence.

`checksums.json` has of every file a list, the XXH3-128 of each 64 MiB of it: parts that threads and
processes sum up side by side, at the speed of memory. Earlier versions wrote one SHA-256 of the
whole file in its place, which is compared as ever.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import xxhash

from moepp_jax import regular
from moepp_jax.storage import AnyPath, files_below, is_local, size, write_atomic

_FILE = "checksums.json"

# Bytes that have a sum of their own; it is part of the format.
_PART = 64 * 2**20

# Bytes that are read at once: few enough to stay in a cache of the core that sums them up.
_CHUNK = 2**20

# What one process has summed up, until all of it is in `_FILE`.
_OWN = "checksums.{}.json"


def write_own(folder: AnyPath, who: str, own: AnyPath, name: str) -> None:
    """Sums up every file of another folder, for `write` to collect.

    Args:
      who: tells such writers apart.
      own: where the files lie by now.
      name: what will be its path in the folder.
    """
    sums = summed(own, [file.relative_to(own).as_posix() for file in files_below(own)])
    named = {f"{name}/{file}": of_file for file, of_file in sums.items()}
    write_atomic(folder / _OWN.format(who), json.dumps(named))


def write(folder: AnyPath, items: Iterable[str], writers: Collection[str] = ()) -> None:
    """Sums up every file in these folders of the folder that `write_own` did not.

    Args:
      writers: who has called that.

    Raises:
      FileNotFoundError: one of them has not.
    """
    with ThreadPoolExecutor() as pool:
        # By name: a listing may lack what another machine has just written.
        own = [folder / _OWN.format(who) for who in writers]
        sums = {}
        for text in pool.map(lambda file: file.read_text(encoding="utf-8"), own):
            sums |= json.loads(text)
        names = _names(folder, items)
        sums |= summed(folder, [name for name in names if name not in sums])
        write_atomic(folder / _FILE, json.dumps({name: sums[name] for name in names}, indent=0))
        list(pool.map(lambda file: file.unlink(), own))


class Verdict(NamedTuple):
    """What is wrong with files, in words; nothing if they are as they were summed up.

    Attributes:
      damage: a file is missing, cannot be read or is not what it was.
      doubt: a file was never summed up, so nobody knows.
    """

    damage: str | None = None
    doubt: str | None = None


class Share(NamedTuple):
    """Which part of the reading is one process's, of so many."""

    process: int
    of: int


ALL = Share(0, 1)


def verdict(
    folder: AnyPath, items: Collection[str], required: Collection[str], share: Share = ALL
) -> Verdict:
    """On every file of these items, or on a share of their bytes.

    Args:
      required: items that must have files.
      share: what the shares find together is what one process finds that reads all. The first one
        looks for files that are missing, too.
    """
    wrong = listed(folder, items, required) if share.process == 0 else Verdict()
    if wrong.damage is not None:
        return wrong
    try:
        if not (folder / _FILE).exists():
            return wrong
        parts = [part for part in _parts(_read(folder)) if _item(part.name) in items]
    except OSError as error:
        return Verdict(damage=_unreadable(error))
    except (ValueError, TypeError) as error:
        return Verdict(damage=_no_sums(error))
    damage = _first_damage(folder, parts[share.process :: share.of])
    return wrong if damage is None else Verdict(damage=damage)


def listed(folder: AnyPath, items: Collection[str], required: Collection[str]) -> Verdict:
    """Whether files are there and were summed up; does not read them."""
    try:
        there = _names(folder, items)
        missing = [item for item in required if not any(_item(name) == item for name in there)]
        if missing:
            return Verdict(damage=f"{missing[0]}/ is missing")
        for file in (folder / name for name in there if is_local(folder)):
            regular.require(file)
        if not (folder / _FILE).exists():
            return Verdict(doubt=f"it has no {_FILE}")
        left = sorted(set(there) - _read(folder).keys())
    except OSError as error:
        return Verdict(damage=_unreadable(error))
    except (ValueError, TypeError) as error:
        return Verdict(damage=_no_sums(error))
    return Verdict(doubt=f"{left[0]} is not in its {_FILE}" if left else None)


def are_there(folder: AnyPath) -> bool:
    """Whether any file of a folder was summed up; looks at none of them."""
    try:
        return bool(regular.read_json(folder / _FILE))
    except (OSError, ValueError):
        return False


def of_all(folder: AnyPath) -> str:
    """One checksum of all that was summed up; empty without checksums."""
    file = folder / _FILE
    return hashlib.sha256(regular.read_bytes(file)).hexdigest() if file.exists() else ""


def _unreadable(error: OSError) -> str:
    named = f" ({error.filename})" if error.filename else ""
    return f"it cannot be read: {error.strerror or error}{named}"


def _no_sums(error: Exception) -> str:
    return f"{_FILE} is no JSON object of sums ({error})"


def _read(folder: AnyPath) -> dict[str, Any]:
    sums = dict(regular.read_json(folder / _FILE))
    outside = next((name for name in sums if not _is_below(name)), None)
    if outside is not None:
        raise ValueError(f"{outside!r:.200} is no file of its folder")
    return sums


def _is_below(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return not name.startswith("/") and ".." not in parts and "\0" not in name


def _names(folder: AnyPath, items: Iterable[str]) -> list[str]:
    files = (file for item in items for file in files_below(folder / item))
    return sorted(file.relative_to(folder).as_posix() for file in files)


def _item(name: str) -> str:
    return name.split("/")[0]


class _Part(NamedTuple):
    """What has one sum: a file or some of it."""

    name: str
    digest: Callable[[AnyPath], str]
    sum: str


def _parts(sums: dict[str, Any]) -> list[_Part]:
    """
    Raises:
      TypeError: the sum of a file is none.
    """
    parts = []
    for name, of_file in sorted(sums.items()):
        if isinstance(of_file, str):
            parts.append(_Part(name, sha256, of_file))
        elif isinstance(of_file, list) and of_file and all(isinstance(s, str) for s in of_file):
            digests = _digests(len(of_file))
            parts += [_Part(name, d, s) for d, s in zip(digests, of_file, strict=True)]
        else:
            raise TypeError(f"{name} has {of_file!r}")
    return parts


def _first_damage(folder: AnyPath, parts: Sequence[_Part]) -> str | None:
    def damage(part: _Part) -> str | None:
        try:
            as_saved = part.digest(folder / part.name) == part.sum
        except FileNotFoundError:
            return f"{part.name} is missing"
        except OSError:
            return f"{part.name} cannot be read"
        return None if as_saved else f"{part.name} is not as it was saved"

    with ThreadPoolExecutor() as pool:
        return next(filter(None, pool.map(damage, parts)), None)


def summed(folder: AnyPath, names: Sequence[str]) -> dict[str, list[str]]:
    """The sums of each file's parts; all files at once, on threads.

    Raises:
      OSError: a file cannot be read.
    """
    files = [folder / name for name in names]
    with ThreadPoolExecutor() as pool:
        counts = pool.map(lambda file: max(1, -(-size(file) // _PART)), files)
        digests = [_digests(count) for count in counts]
        of_files = [
            [pool.submit(digest, file) for digest in of_file]
            for file, of_file in zip(files, digests, strict=True)
        ]
        sums = [[part.result() for part in of_file] for of_file in of_files]
    return dict(zip(names, sums, strict=True))


def _digests(count: int) -> list[Callable[[AnyPath], str]]:
    """Of each part of a file that has so many."""
    return [functools.partial(_xxh3, part, part == count - 1) for part in range(count)]


def _xxh3(part: int, last: bool, file: AnyPath) -> str:
    """Of a part; the last one has what comes after it too: a file that grew is another one."""
    regular.require(file)
    total = xxhash.xxh3_128()
    left = _PART + last
    with file.open("rb") as stream:
        stream.seek(part * _PART)
        while left and (chunk := stream.read(min(left, _CHUNK))):
            total.update(chunk)
            left -= len(chunk)
    return total.hexdigest()


def sha256(file: AnyPath) -> str:
    """As versions before this one summed up a file."""
    regular.require(file)
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
