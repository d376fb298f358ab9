"""Folders that are made: under another name first, and whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from moepp_jax.config import ConfigError
from moepp_jax.interop.errors import ConversionError
from moepp_jax.storage import is_local, open_path


def local(path: str | os.PathLike) -> Path:
    """
    Raises:
      ConversionError: the folder is in a bucket.
    """
    folder = open_path(path)
    if not is_local(folder):
        raise ConversionError(f"{path} must be a local folder: copy it to or from there yourself")
    return folder


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A new folder's temporary name; it gets its own when all went well, and goes when not.

    Raises:
      ConversionError: there is something of that name, or it cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConversionError(f"{target} is there already: give the name of a new folder")
    made = target.absolute().with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        made.parent.mkdir(parents=True, exist_ok=True)
        yield made
        os.replace(made, target)
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise ConversionError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
