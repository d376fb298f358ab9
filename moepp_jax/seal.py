"""JSON files that say whether they are as they were written.

A number whose digit flips on a disk is a number still: what has nothing to be compared with has a
sum of itself among its fields. Files without one, as earlier versions wrote them, are taken as
they are; so is one whose sum was deleted by whoever changed it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

CHECKSUM = "checksum"


def sealed(fields: Mapping[str, Any]) -> str:
    """The text of a file with these fields and their sum."""
    return json.dumps({**fields, CHECKSUM: _sum(fields)}, indent=2) + "\n"


def opened(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What was sealed, of a file's fields.

    Raises:
      ValueError: it is no longer that; in words that go on from the name of the file.
    """
    inner = {name: value for name, value in fields.items() if name != CHECKSUM}
    if CHECKSUM in fields and fields[CHECKSUM] != _sum(inner):
        raise ValueError(
            f"has changed since it was written, as its {CHECKSUM!r} shows: restore it, or, if the "
            f"change is meant, delete the field {CHECKSUM!r}"
        )
    return inner


def _sum(fields: Mapping[str, Any]) -> str:
    """XXH3-128, whatever the order of fields and the space between them."""
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True).encode())
