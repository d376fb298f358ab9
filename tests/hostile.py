"""What may lie in the place of a file, and headers of weights that lie."""

import json
import os

INSTEAD = {
    "a FIFO": os.mkfifo,
    "a device": lambda file: file.symlink_to("/dev/zero"),
    "a folder": lambda file: file.mkdir(),
    "larger than the": lambda file: (file.touch(), os.truncate(file, 2**40)),
}


def put(what: str, file) -> None:
    file.unlink(missing_ok=True)
    INSTEAD[what](file)


def header(file, fields: dict | bytes, length: int | None = None) -> None:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    length = len(text) if length is None else length
    file.write_bytes(length.to_bytes(8, "little") + text)


LONG = {"dtype": "F32", "shape": [2**60] * 100_000, "data_offsets": [0, 0]}
HEADERS = {
    "longer than the file": (b"{}", 2**63),
    "ten to the twelve numbers": {
        "a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}
    },
    "ten to the eighteen": {"a": {"dtype": "F32", "shape": [10**18], "data_offsets": [0, 4]}},
    "a number of 4,000 digits": {
        "a": {"dtype": "F32", "shape": [10**4000], "data_offsets": [0, 4]}
    },
    "many axes": {"a": LONG},
    "a long name": {"n" * 100_000: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
    "a long type": {"a": {"dtype": "F" * 100_000, "shape": [0], "data_offsets": [0, 0]}},
    "on top of each other": {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"
    },
    "deep": b"[" * 1_000_000,
    "a list": b"[]",
    "no UTF-8": b"\xff{}",
}
