"""Records of JSON: lines, or the elements of one array, of which one at a time is in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from moepp_jax.data import opening
from moepp_jax.data.opening import BYTE_ORDER_MARK, opened, too_long

# Bytes that are looked at for what a file begins with, and that are read of an array at once.
_HEAD = 65_536
_CHUNK = 2**20

# An error so close to the end of what has been read may be that of a word cut in two.
_WORD = 16

_WHITE = re.compile(r"[ \t\r\n]*")

# Fields that an error lists.
_FIELDS = 20


class RecordError(ValueError):
    """What is wrong with a record; the message needs its place before it."""


def is_array(file: Path) -> bool:
    """Whether the file is one JSON array, not an object a line.

    Raises:
      ConfigError: the file cannot be read.
    """
    with opened(file) as (stream, _):
        head = stream.read(_HEAD)
    return head.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")


def parsed(line: bytes) -> Any:
    """
    Raises:
      RecordError: it is not JSON.
    """
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecordError(
            f"not UTF-8: byte {error.start} of the line is 0x{line[error.start]:02x}"
        ) from None
    except RecursionError:
        raise RecordError(_TOO_DEEP) from None
    except ValueError as error:
        raise RecordError(
            f"not JSON ({error}); a file holds an object a line, or one array of objects"
        ) from None


_TOO_DEEP = "its values are nested too deep to be read"


def text_of(record: Any, field: str) -> str:
    """
    Raises:
      RecordError: it has no such field, or that holds no text.
    """
    if not isinstance(record, dict):
        raise RecordError(
            f"{_kind(record)}, where an object with the field {field!r} is to be: write "
            f'{{"{field}": "..."}}'
        )
    if field not in record:
        raise RecordError(
            f"no field {field!r}; there is {_listed(record)}: set text_field of the source to the "
            "one that holds the text"
        )
    text = "" if record[field] is None else record[field]
    if not isinstance(text, str):
        raise RecordError(f"the field {field!r} holds {_kind(text)}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            f"the field {field!r} is not Unicode text: character {error.start} is half of a pair "
            f"({text[error.start]!a})"
        ) from None
    return text


def _kind(value: Any) -> str:
    """What a value that was read is called in JSON."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def _listed(record: dict[str, Any]) -> str:
    more = f" and {len(record) - _FIELDS:,} more" if len(record) > _FIELDS else ""
    return ", ".join(map(repr, list(record)[:_FIELDS])) + more


def elements(stream: BufferedIOBase) -> Iterator[Any]:
    """The elements of the one array that a file is.

    Raises:
      RecordError: it is not such an array.
    """
    values = _Values(stream)
    values.sign("[")
    if values.sign("", "]") == "]":
        values.end()
        return
    while True:
        yield values.value()
        if values.sign(",", "]") == "]":
            values.end()
            return


class _Values:
    """JSON values out of a stream, of which no more is kept than the next one needs."""

    def __init__(self, stream: BufferedIOBase):
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False

    def sign(self, *signs: str) -> str:
        """Reads one of these signs; "" stands for anything else, which stays unread."""
        found = self._next()
        if found in signs and found:
            self._at += 1
            return found
        if "" in signs and found:
            return ""
        there = f"not {found!r}" if found else "and the file ends"
        raise RecordError(f"not JSON: here is to be {' or '.join(filter(None, signs))}, {there}")

    def value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = self._parse(self._text, self._at)
            except RecursionError:
                raise RecordError(_TOO_DEEP) from None
            except json.JSONDecodeError as error:
                if self._ended or not self._may_go_on(error):
                    raise RecordError(f"not JSON ({error.msg})") from None
            except ValueError as error:
                raise RecordError(f"not JSON ({error})") from None
            else:
                if end < len(self._text) or self._ended:  # else it may be half a number
                    self._at = end
                    return value
            if len(self._text) - self._at > opening.LONGEST:
                raise RecordError(str(too_long("it")))
            self._read()

    def end(self) -> None:
        if found := self._next():
            raise RecordError(f"not JSON: {found!r} comes after the end of the array")

    def _next(self) -> str:
        """The next character that is not white, still unread; "" at the end."""
        while True:
            self._at = _WHITE.match(self._text, self._at).end()
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._read()

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether what is wrong may be that the value goes on in what has not been read."""
        unterminated = error.msg.startswith("Unterminated string")
        return unterminated or error.pos >= len(self._text) - _WORD

    def _read(self) -> None:
        left = self._text[self._at :]
        chunk = self._stream.read(max(_CHUNK, len(left)))
        self._ended = not chunk
        try:
            self._text, self._at = left + self._decode(chunk, final=self._ended), 0
        except UnicodeDecodeError as error:
            wrong = error.object[error.start]
            raise RecordError(f"it or one after it is not UTF-8: a byte is 0x{wrong:02x}") from None
