"""Files as they lie on disk: what their names say, unpacked as streams, no line without a bound."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from pathlib import Path, PurePath

from moepp_jax.errors import ConfigError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# Bytes of one line, and of one document: what is longer is refused. Reading it takes a few times
# as much memory, whatever a file claims to unpack to.
LONGEST = 128 * 2**20

# Bytes that are unpacked as a whole, before a document can be told from the next: a page of a
# Parquet file, a record batch of an Arrow file, the window of an .xz file. Some writers make pages
# of a thousand documents.
AT_ONCE = 4 * LONGEST

BYTE_ORDER_MARK = codecs.BOM_UTF8

# Some compress with a window of gigabytes (zstd --long=31), which a reader has to allow.
_ANY_WINDOW = {zstd.DecompressionParameter.window_log_max: 31 if sys.maxsize > 2**32 else 30}


class _Xz(io.RawIOBase):
    """An .xz file unpacked: lzma.LZMAFile would allot what its header asks for, up to 4 GiB.

    Raises:
      LZMAError, EOFError: on reading, of a file that is damaged, cut off, or asks for too much.
    """

    def __init__(self, raw: BufferedIOBase):
        self._raw = raw
        self._unpacker = lzma.LZMADecompressor(memlimit=AT_ONCE)

    def readable(self) -> bool:
        return True

    def readinto(self, into: memoryview) -> int:
        while True:
            if self._unpacker.eof:  # another stream may follow, after zeros
                rest = self._unpacker.unused_data
                while not rest.strip(b"\0"):
                    if not (rest := self._raw.read(io.DEFAULT_BUFFER_SIZE)):
                        return 0
                packed = rest.lstrip(b"\0")
                self._unpacker = lzma.LZMADecompressor(memlimit=AT_ONCE)
            elif self._unpacker.needs_input:
                if not (packed := self._raw.read(io.DEFAULT_BUFFER_SIZE)):
                    raise EOFError("it ends before its end-of-stream marker")
            else:
                packed = b""
            if content := self._unpacker.decompress(packed, len(into)):
                into[: len(content)] = content
                return len(content)


COMPRESSED = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lambda raw: io.BufferedReader(_Xz(raw)),
    ".zst": lambda raw: zstd.ZstdFile(raw, options=_ANY_WINDOW),
}
COMPRESSED[".zstd"] = COMPRESSED[".zst"]

KINDS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}


def ending(name: str) -> str:
    """What says how a file is to be read, as it is written: ".jsonl", ".JSON.gz", ".md", ""."""
    bare = name
    while PurePath(bare).suffix.lower() in COMPRESSED:
        bare = PurePath(bare).stem
    return name[len(bare) - len(PurePath(bare).suffix) :]


def of_text(name: str) -> str | None:
    """The kind of text that a file's name says, if it says one."""
    said = ending(name).lower()
    return next((KINDS[suffix] for suffix in KINDS if _begins(said, suffix)), None)


def _begins(said: str, suffix: str) -> bool:
    return said == suffix or said.startswith(f"{suffix}.")


def kind(file: PurePath) -> str:
    """ "text", "json", "parquet" or "arrow", by the file's name; what says nothing is text."""
    return of_text(file.name) or "text"


def is_compressed(file: PurePath) -> bool:
    return file.suffix.lower() in COMPRESSED


@contextlib.contextmanager
def opened(file: Path) -> Iterator[tuple[BufferedIOBase, BufferedIOBase]]:
    """The file's content, and the file itself, which is the same where it is not compressed.

    Raises:
      ConfigError: the file is damaged, or cannot be read.
    """
    try:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(file.open("rb"))
            unpack = COMPRESSED.get(file.suffix.lower())
            yield stack.enter_context(unpack(raw)) if unpack else raw, raw
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError) as error:
        if isinstance(error, lzma.LZMAError) and "limit exceeded" in str(error):
            raise ConfigError(
                f"{file} asks for more than the {AT_ONCE:,} bytes of memory that unpacking may "
                "take: compress it again with a smaller dictionary, as of xz -9"
            ) from None
        raise ConfigError(
            f"{file} cannot be read to its end: {error}. It is damaged or cut off: get it again"
        ) from None


def lines(stream: BufferedIOBase, where: Callable[[int], str]) -> Iterator[bytes]:
    """The lines of a stream, with their ends.

    Args:
      where: of a line's number in the stream, from 0: what to call it.

    Raises:
      ConfigError: a line is longer than LONGEST.
    """
    number = 0
    while line := stream.readline(LONGEST + 1):
        if len(line) > LONGEST:
            raise too_long(where(number))
        yield line
        number += 1


def too_long(what: str) -> ConfigError:
    return ConfigError(
        f"{what} is longer than the {LONGEST:,} bytes that a line or a document may have: cut it "
        "into several, or leave it out"
    )


def begins_with_mark(file: Path) -> bool:
    """Whether a byte order mark, which is no text, stands before the file's content."""
    try:
        with opened(file) as (stream, _):
            return stream.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK
    except ConfigError:  # told where the file is read
        return False
