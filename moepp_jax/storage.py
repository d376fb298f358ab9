"""Where a run is kept: in a local folder, or under a prefix of an object store (gs://, s3://)."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from moepp_jax.errors import ConfigError


class UnwritableError(ConfigError):
    """Something cannot be written now.

    Attributes:
      told: what, and why; the message says what to do about it, too.
    """

    def __init__(self, told: str, remedy: str):
        super().__init__(f"{told}; {remedy}")
        self.told = told


STORES = {"gs": "gcsfs", "s3": "s3fs"}  # scheme: the package that reads it

# Seconds between two copies of a file that grows to an object store.
_COPY_EVERY = 30.0

# pathlib.Path where files are local, epath.Path elsewhere: the same methods as far as we use them.
AnyPath = Any


def open_path(path: str | os.PathLike) -> AnyPath:
    """This path, on whichever storage it names.

    Raises:
      ConfigError: of a storage that is not known, or whose package is not installed.
    """
    _require_no_credentials(os.fspath(path))
    scheme, url, _ = os.fspath(path).partition("://")
    if not url:
        return Path(path)
    if scheme not in STORES:
        known = ", ".join(f"{name}://" for name in STORES)
        raise ConfigError(f"{path}: {scheme}:// is no known storage; there are {known} and folders")
    # Other processes, and tensorstore in this one, write there too: no listing may be remembered.
    fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False
    opened = epath.Path(path)
    try:
        opened.exists()
    except ImportError as error:
        raise ConfigError(
            f"{path}: {scheme}:// needs a package that is not installed ({error}): "
            f"pip install {STORES[scheme]}"
        ) from error
    return opened


def holds_credentials(path: str) -> bool:
    """Whether a path has a user's name or a key before its host, as s3://KEY:SECRET@BUCKET."""
    return re.match(r"[\w+.-]+://[^/]*@", path) is not None


def _require_no_credentials(path: str) -> None:
    if holds_credentials(path):
        scheme = path.partition("://")[0]
        raise ConfigError(
            f"a path {scheme}://...@... holds credentials, which would be written to files and "
            f"logs: give {scheme}://BUCKET/..., and the key in the environment, as its package "
            f"{STORES.get(scheme, '')} reads it"
        )


def is_local(path: AnyPath) -> bool:
    return isinstance(path, Path)


def same_place(a: str | os.PathLike, b: str | os.PathLike) -> bool:
    """Whether these paths are one, whether there is something or not."""
    a, b = str(a), str(b)
    if "://" in a or "://" in b:
        return a.rstrip("/") == b.rstrip("/")
    return Path(a).resolve() == Path(b).resolve()


def is_name(text: Any) -> bool:
    """Whether it names a file of a folder, and leads nowhere else."""
    named = isinstance(text, str) and text not in ("", ".", "..")
    return named and len(text.encode(errors="replace")) < 256 and not set(text) & set("/\\\0")


def write_atomic(file: AnyPath, content: str | bytes) -> None:
    """Writes a file so that no one ever sees half of it, killed or not.

    Raises:
      OSError: it cannot be written; it names the file, which is as it was.
    """
    content = content.encode() if isinstance(content, str) else content
    if not is_local(file):
        with in_store(file):
            file.write_bytes(content)  # an object appears when it is whole
        return
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, file)
    except OSError as error:  # of a full disk the system does not say which file
        raise OSError(error.errno, error.strerror or str(error), str(file)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def in_store(file: AnyPath) -> Iterator[None]:
    """Has what goes wrong there be an OSError: stores' packages raise errors of their own too."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise OSError(errno.EIO, said, str(file)) from error


def _read_from(file: Path, offset: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read()


def _is_half(file: Path) -> bool:
    """Whether it is what `write_atomic` is about to rename."""
    return file.name.startswith(".") and file.suffix == ".tmp"


def is_full(error: Exception) -> bool:
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)


def room(folder: AnyPath) -> str:
    """What still fits on a disk, of which some limit the number of files."""
    disk = os.statvfs(folder)
    files = f" and {disk.f_favail:,} more files" if disk.f_files else ""
    return f"{disk.f_bavail * disk.f_frsize:,} bytes{files} fit"


def reason(error: Exception) -> str:
    """In the system's words, of which TensorStore writes many more."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    said = re.search(r"(\w[\w ]+) \[(?:os_error_code|OS error)", str(error))
    return said[1].strip() if said else " ".join(str(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def writing(what: str, remedy: str) -> Iterator[None]:
    """Has an error of the system name what cannot be written, and what to do about it.

    Raises:
      UnwritableError: there was one.
    """
    try:
        yield
    except OSError as error:
        raise UnwritableError(f"{what} cannot be written: {reason(error)}", remedy) from error


def size(file: AnyPath) -> int:
    """Bytes of a file."""
    stat = file.stat()
    return stat.st_size if is_local(file) else stat.length


def files_below(folder: AnyPath) -> Iterator[AnyPath]:
    """Every file of a folder and of the folders in it; none if it is not there."""
    if not is_local(folder):  # one listing, not one a folder: a checkpoint has two a process
        store, root = fsspec.core.url_to_fs(os.fspath(folder))
        for name in store.find(root):
            yield folder / name.removeprefix(root).lstrip("/")
        return
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir():
            yield from files_below(entry)
        else:
            yield entry


class Staging:
    """A local folder for files that grow, as objects cannot: a copy of each is kept at `target`.

    Where `target` is local it is this folder itself. The files are few and small: numbers of a run.

    Attributes:
      folder: where to write.
      parts: of a file's name: under which name its bytes from where on are kept at `target`.
    """

    def __init__(self, target: str | os.PathLike):
        self._target = open_path(target)
        self._remote = not is_local(self._target)
        self.folder = Path(tempfile.mkdtemp()) if self._remote else self._target
        self.parts: dict[str, tuple[str, int]] = {}
        self._copied: dict[Path, tuple[int, int]] = {}
        self._last = -_COPY_EVERY

    @property
    def copies(self) -> bool:
        """Whether `target` is elsewhere."""
        return self._remote

    def fetch(self, name: str) -> Path:
        """The local file of this name, with what `target` has of it."""
        file = self.folder / name
        if self._remote:
            with in_store(self._target / name):
                if (self._target / name).exists():
                    file.write_bytes((self._target / name).read_bytes())
        return file

    def copy(self, now: bool = False) -> None:
        """Brings `target` up to date, if it was not just tried or must be done now.

        Raises:
          OSError: that is not possible now; a later call tries it again.
        """
        if not self._remote or not (now or time.monotonic() - self._last >= _COPY_EVERY):
            return
        self._last = time.monotonic()
        for file in files_below(self.folder):
            try:
                stat = file.stat()
                state = (stat.st_size, stat.st_mtime_ns)
                name = file.relative_to(self.folder).as_posix()
                name, offset = self.parts.get(name, (name, 0))
                content = _read_from(file, offset) if self._copied.get(file) != state else None
            except FileNotFoundError:
                continue  # another process that writes here has renamed it
            if content is not None and not _is_half(file) and (content or not offset):
                target = self._target / name
                with in_store(target):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content)
                self._copied[file] = state

    def close(self) -> None:
        self.copy(now=True)
        if self._remote:
            shutil.rmtree(self.folder, ignore_errors=True)
