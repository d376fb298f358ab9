"""Files from elsewhere that lie or do not end: one line, in little time and memory, and no code."""

from __future__ import annotations

import bz2
import functools
import gzip
import json
import lzma
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from moepp_jax.data.opening import zstd
from tests.chaos.room import Room, ended, recipe_of, require_one_line
from tests.chaos.trial import Lost, Trial
from tests.hostile import HEADERS, INSTEAD, header, put
from tests.released import checkpoint

# What refusing a file may take: bytes of memory of any process, seconds.
_MEMORY = {"hostile checkpoint": 800e6, "hostile source": 1.5e9}
_SECONDS = 90

# A command that ends with this one, and in a file how much memory it and its children took at the
# most, in kibibytes.
_MEASURED = """
import ctypes, resource, signal, subprocess, sys
end_too = lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
status = subprocess.call(sys.argv[2:], preexec_fn=end_too)
with open(sys.argv[1], "w") as file:
    file.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(status)
"""

# Bytes of a line of which nothing ends, unpacked.
_LINE, _PIECE = 12 * 2**30, 2**26
_PACKERS = {"gz": gzip.compress, "zst": zstd.compress, "bz2": bz2.compress, "xz": lzma.compress}


def trials(room: Room, kills: int, seed: int) -> Iterator[Trial]:
    for case, make in _CHECKPOINTS.items():
        fault = functools.partial(_refused, room, "hostile checkpoint", _convert, make)
        yield Trial("hostile checkpoint", case, fault)
    for case, make in _SOURCES.items():
        fault = functools.partial(_refused, room, "hostile source", _prepare, make)
        yield Trial("hostile source", case, fault)


# --- checkpoints ----------------------------------------------------------------------------------

Make = Callable[[Path], Path]


class _Touches:
    """What unpickles it makes a file."""

    def __init__(self, file: Path):
        self._file = file

    def __reduce__(self):
        return Path.touch, (self._file,)


def _instead(what: str, name: str, folder: Path) -> Path:
    source = checkpoint(folder / "source")
    put(what, source / name)
    return source


def _lies(name: str, folder: Path) -> Path:
    source, said = checkpoint(folder / "source"), HEADERS[name]
    header(source / "model.safetensors", *(said if isinstance(said, tuple) else (said,)))
    return source


def _elsewhere(name: str, folder: Path) -> Path:
    """Its index names a file that is not in its folder, and is there."""
    source = checkpoint(folder / "source")
    (source / "model.safetensors").rename(folder / "secret.safetensors")
    named = name.format(folder=folder)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": named}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return source


def _pickled(folder: Path) -> Path:
    source = checkpoint(folder / "source")
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(_Touches(folder / "owned")))
    return source


def _deep(folder: Path) -> Path:
    source = checkpoint(folder / "source")
    (source / "config.json").write_text('{"a": ' + "[" * 1_000_000)
    return source


_CHECKPOINTS: dict[str, Make] = {
    **{
        f"{what.removesuffix(' than the')} in the place of {name}": functools.partial(
            _instead, what, name
        )
        for name in ("config.json", "generation_config.json", "model.safetensors")
        for what in INSTEAD
        if (name, what) != ("model.safetensors", "larger than the")  # they may be of any size
    },
    **{f"a header: {name}": functools.partial(_lies, name) for name in HEADERS},
    **{
        f"an index that names {name}": functools.partial(_elsewhere, name)
        for name in ("../secret.safetensors", "{folder}/secret.safetensors")
    },
    "a pickle with code": _pickled,
    "a configuration nested a million deep": _deep,
}


def _convert(room: Room, source: Path, run: Path) -> list[str]:
    return ["convert", "from-hf", str(source), str(run)]


# --- sources of text ------------------------------------------------------------------------------


_BEGINS = {"jsonl": b'{"text": "', "json": b'[{"text": "', "txt": b""}


def _endless(name: str, folder: Path) -> Path:
    """A line, or a record, of twelve gigabytes, packed: pieces that follow each other are one."""
    file, (_, kind, packed) = folder / name, name.split(".")
    pack = _PACKERS[packed]
    piece = pack(b"x" * _PIECE)
    with file.open("wb") as to:
        to.write(pack(_BEGINS[kind]))
        for _ in range(_LINE // _PIECE):
            to.write(piece)
    return file


def _text_instead(what: str, folder: Path) -> Path:
    file = folder / "text.jsonl"
    put(what, file)
    return file


def _page(folder: Path) -> Path:
    """One page of a Parquet file that unpacks to 600 megabytes."""
    table = pyarrow.table({"text": ["x" * 10**8] * 6})
    pyarrow.parquet.write_table(
        table, folder / "text.parquet", compression="zstd", use_dictionary=False
    )
    return folder / "text.parquet"


def _batch(folder: Path) -> Path:
    """One record batch of an Arrow file that unpacks to 600 megabytes."""
    table = pyarrow.table({"text": ["x" * 10**8] * 6})
    packed = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_stream(folder / "text.arrow", table.schema, options=packed) as writer:
        writer.write_table(table)
    return folder / "text.arrow"


_SOURCES: dict[str, Make] = {
    **{
        f"12 GB in a line of {name}": functools.partial(_endless, name)
        for name in (
            *(f"text.jsonl.{packed}" for packed in _PACKERS),
            "text.json.gz",
            "text.txt.gz",
        )
    },
    **{
        f"{what} in its place": functools.partial(_text_instead, what)
        for what in ("a FIFO", "a device")
    },
    "a line of a terabyte": functools.partial(_text_instead, "larger than the"),
    "a page of Parquet that unpacks to 600 MB": _page,
    "a batch of Arrow that unpacks to 600 MB": _batch,
}


def _prepare(room: Room, source: Path, data: Path) -> list[str]:
    (tokenizer,) = room.data.glob("*.model")  # it would have to read all to learn one
    changes = (f"--config.data.sources.text.path={source}", f"--config.data.tokenizer={tokenizer}")
    return ["data", "prepare", "--workers=2", recipe_of(data), *changes]


# --- both -----------------------------------------------------------------------------------------


def _refused(
    room: Room,
    fault: str,
    command: Callable[[Room, Path, Path], list[str]],
    make: Make,
    folder: Path,
) -> None:
    """By a command that makes something of a source in another folder."""
    source, made, most = make(folder), folder / "made", folder / "most"
    began = time.monotonic()
    measured = [sys.executable, "-c", _MEASURED, str(most)]
    said = ended(room.popen(command(room, source, made), under=measured))
    seconds = time.monotonic() - began
    require_one_line(said)
    if str(folder) not in said.err:
        raise Lost(f"did not say which file: {said.err}")
    if (folder / "owned").exists():
        raise Lost("code of a file was run")
    left = [str(file) for file in made.rglob("*") if file.is_file()]
    if left:
        raise Lost(f"left behind {left}")
    took = 1024 * int(most.read_text())
    if took > _MEMORY[fault] or seconds > _SECONDS:
        raise Lost(f"took {took / 1e6:,.0f} MB and {seconds:.0f} s: {said.err}")
