"""Folders that are made: under another name first, and whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from moepp_jax.errors import ConfigError
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
    made = None
    try:
        place = target.resolve()  # a link stays one
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise ConversionError(f"{target} is there already: give the name of a new folder")
        made = place.with_name(f".{place.name}.{uuid.uuid4().hex}.tmp")
        made.parent.mkdir(parents=True, exist_ok=True)
        yield made
        os.replace(made, place)
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise ConversionError(f"{target} cannot be written: {error}") from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
