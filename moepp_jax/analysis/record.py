"""What was routed of a text, token by token: a Parquet file, from which all else is drawn.

A row is a token that the model read. Its columns:

  token       id in the vocabulary
  source      what the text is of: a source of the held-out text, a task, a file
  document    number of its document
  position    in its document, from 0
  place       in the row of tokens that the model read, from 0
  loss        nats of the token that follows; null where none does

and of each MoE layer j (from 1; `Meta.layers` says which of the model's layers it is):

  experts_j   the chosen experts, best first; N where a choice is not used
  gates_j     their weights in the layer's output
  kept_j      whether the expert served the token, or dropped it
  scores_j    the two best scores over the sum of all
  entropy_j   of the scores over their sum, nats

The file's metadata hold a `Meta`. Nothing here needs JAX.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moepp_jax.errors import ConfigError

VERSION = 1
KINDS = ("FFN", "constant", "copy", "zero")  # of experts, in the order of their numbers
_META = b"moepp_jax"
_FLAT = {
    "token": pa.int32(),
    "source": pa.dictionary(pa.int16(), pa.string()),
    "document": pa.int32(),
    "position": pa.int32(),
    "place": pa.int32(),
    "loss": pa.float32(),
}


@dataclasses.dataclass(frozen=True)
class Meta:
    """What is known of the model and of the text.

    Attributes:
      name: of the run.
      step: of the checkpoint.
      rule: of routing, its name and options.
      counts: experts of each of KINDS.
      most: K, the most experts of a token.
      layers: number in the model, from 1, of each MoE layer.
      pieces: bytes that each token id stands for, as text of a character a byte (Latin-1).
      special: id -> name, of tokens that stand for no text.
      sources: in the order of the text, name -> "source", "task" or "file".
      wanted: FFN experts that a token has at balance.
      machine: that it was made on.
      more: what was found beside the rows, by name; see `moepp_jax.observe.beside`.
    """

    name: str
    step: int
    rule: Mapping[str, Any]
    counts: tuple[int, int, int, int]
    most: int
    layers: tuple[int, ...]
    pieces: tuple[str, ...]
    special: Mapping[int, str]
    sources: Mapping[str, str]
    wanted: float
    machine: str = ""
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        """N, of all kinds."""
        return sum(self.counts)

    @property
    def starts(self) -> list[int]:
        """Number of the first expert of each kind, and N."""
        return [0, *np.cumsum(self.counts).tolist()]

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> Meta:
        """
        Raises:
          ValueError: it is no Meta, or one of another version.
        """
        said = json.loads(text)
        if not isinstance(said, dict):
            raise ValueError("its description is damaged")
        version = said.pop("version", None)
        if version != VERSION:
            raise ValueError(f"it is of version {version}, and this program reads {VERSION}")
        tuples = {name: tuple(said[name]) for name in ("counts", "layers", "pieces")}
        special = {int(token): name for token, name in said["special"].items()}
        return cls(**{**said, **tuples, "special": special})


class Rows(NamedTuple):
    """Tokens and how they were routed: T tokens, J MoE layers.

    Attributes:
      source: numbers of names in `Meta.sources`.
      loss: NaN where no token follows.
    """

    token: np.ndarray  # [T]
    source: np.ndarray  # [T]
    document: np.ndarray  # [T]
    position: np.ndarray  # [T]
    place: np.ndarray  # [T]
    loss: np.ndarray  # [T]
    experts: np.ndarray  # [J T K]
    gates: np.ndarray  # [J T K]
    kept: np.ndarray  # [J T K]
    scores: np.ndarray  # [J T 2]
    entropy: np.ndarray  # [J T]


@dataclasses.dataclass(frozen=True)
class Record:
    """A file's content."""

    meta: Meta
    rows: Rows

    @property
    def num_tokens(self) -> int:
        return len(self.rows.token)

    @property
    def num_layers(self) -> int:
        """J, that are MoE layers."""
        return len(self.meta.layers)

    @functools.cached_property
    def kind(self) -> np.ndarray:
        """[J T K] uint8: the number in KINDS of what served each choice; 4 if nothing did."""
        ends = np.cumsum(self.meta.counts)
        kind = np.searchsorted(ends, self.rows.experts, side="right").astype(np.uint8)
        return np.where(self.rows.kept, kind, np.uint8(len(KINDS)))

    @functools.cached_property
    def ffn(self) -> np.ndarray:
        """[J T] uint8: FFN experts that served each token."""
        return np.sum(self.kind == 0, axis=-1, dtype=np.uint8)

    def of_kind(self, kind: str) -> np.ndarray:
        """[J T]: experts of a kind that served each token."""
        return np.sum(self.kind == KINDS.index(kind), axis=-1, dtype=np.uint8)

    def load(self, tokens: np.ndarray | slice = slice(None)) -> np.ndarray:
        """[J N]: share of the tokens that each expert served.

        Args:
          tokens: those that are looked at, all by default.
        """
        experts, kept = self.rows.experts[:, tokens], self.rows.kept[:, tokens]
        N, count = self.meta.num_experts, max(experts.shape[1], 1)
        return np.stack(
            [
                np.bincount(e[k].astype(np.int64), minlength=N)[:N] / count
                for e, k in zip(experts, kept, strict=True)
            ]
        )

    def text_of(self, token: int) -> str:
        """A token as it is shown by itself: its text, or the name of what has none."""
        if token in self.meta.special:
            return self.meta.special[token]
        return self.bytes_of(token).decode("utf-8", errors="replace")

    def bytes_of(self, token: int) -> bytes:
        """What the token stands for, which may be a part of a character."""
        return self.meta.pieces[token].encode("latin-1")

    def documents(self) -> Iterator[slice]:
        """The tokens of each document, which lie side by side."""
        cuts = np.flatnonzero(np.diff(self.rows.document)) + 1
        edges = [0, *cuts.tolist(), self.num_tokens]
        yield from (slice(*pair) for pair in itertools.pairwise(edges))


class Writer:
    """A file that is written batch by batch; a context manager.

    It has its name once it is whole: what is not finished leaves nothing behind.
    """

    def __init__(self, file: str | os.PathLike, meta: Meta):
        self._file, self._made = Path(file), Path(f"{file}.part")
        self._meta, self._names = meta, pa.array(list(meta.sources), pa.string())
        self._schema = _schema(meta)

    def __enter__(self) -> Writer:
        flat = [name for name in self._schema.names if not name.startswith(_PACKED)]
        self._writer = pq.ParquetWriter(
            self._made, self._schema, compression="zstd", compression_level=6, use_dictionary=flat
        )
        return self

    def write(self, rows: Rows) -> None:
        source = pa.DictionaryArray.from_arrays(pa.array(rows.source, pa.int16()), self._names)
        loss = pa.array(rows.loss, pa.float32(), mask=np.isnan(rows.loss))
        columns = [pa.array(rows.token, pa.int32()), source]
        columns += [pa.array(a, pa.int32()) for a in (rows.document, rows.position, rows.place)]
        columns.append(loss)
        for j in range(len(self._meta.layers)):
            field = self._schema.field(f"experts_{j + 1}").type.value_type
            columns += [
                _lists(rows.experts[j], field),
                _lists(_rounded(rows.gates[j]), pa.float32()),
                _lists(rows.kept[j], pa.bool_()),
                _lists(_rounded(rows.scores[j]), pa.float32()),
                pa.array(_rounded(rows.entropy[j]), pa.float32()),
            ]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))

    def add(self, **found: Any) -> None:
        """What was found beside the rows, as JSON takes it."""
        self._meta = dataclasses.replace(self._meta, more={**self._meta.more, **found})

    def __exit__(self, kind: object, *error: object) -> None:
        try:
            if kind is None:
                self._writer.add_key_value_metadata({_META: self._meta.to_json().encode()})
            self._writer.close()
            if kind is None:
                self._made.replace(self._file)
        finally:
            self._made.unlink(missing_ok=True)


_PACKED = ("gates_", "scores_", "entropy_", "kept_", "loss")


def _schema(meta: Meta) -> pa.Schema:
    number = pa.uint8() if meta.num_experts < 256 else pa.uint16()
    fields = [pa.field(name, kind) for name, kind in _FLAT.items()]
    for j in range(1, len(meta.layers) + 1):
        fields += [
            pa.field(f"experts_{j}", pa.list_(number, meta.most)),
            pa.field(f"gates_{j}", pa.list_(pa.float32(), meta.most)),
            pa.field(f"kept_{j}", pa.list_(pa.bool_(), meta.most)),
            pa.field(f"scores_{j}", pa.list_(pa.float32(), 2)),
            pa.field(f"entropy_{j}", pa.float32()),
        ]
    return pa.schema(fields)


def _lists(rows: np.ndarray, kind: pa.DataType) -> pa.Array:
    """[T K] as lists of K."""
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1), kind), rows.shape[-1])


def _rounded(values: np.ndarray) -> np.ndarray:
    """To 11 bits, as half precision has: the rest is noise that would double the file."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def write(file: str | os.PathLike, meta: Meta, batches: Sequence[Rows]) -> None:
    """The file of what is there already."""
    with Writer(file, meta) as writer:
        for rows in batches:
            writer.write(rows)


def read(file: str | os.PathLike) -> Record:
    """
    Raises:
      ConfigError: there is no such file, it is damaged, or is no record of this version.
    """
    if not Path(file).exists():
        raise ConfigError(f"there is no {file}: `main analyze` writes it")
    try:
        with pq.ParquetFile(file) as there:
            said = (there.schema_arrow.metadata or {}) | (there.metadata.metadata or {})
            if _META not in said:
                raise ValueError("it has no routing in it")
            meta = Meta.from_json(said[_META].decode())
            made = Record(meta, _rows(there.read(), meta))
            _require_sound(made)
            return made
    except (OSError, LookupError, TypeError, ValueError, pa.ArrowException) as error:
        raise ConfigError(
            f"{file} cannot be read: {error}; it must be a routing.parquet of `main analyze`"
        ) from error


def _require_sound(made: Record) -> None:
    meta, rows = made.meta, made.rows
    if len(meta.counts) != len(KINDS) or not made.num_layers:
        raise ValueError("its description is damaged")
    if made.num_tokens and not 0 <= rows.token.min() <= rows.token.max() < len(meta.pieces):
        raise ValueError(f"it has tokens beyond the {len(meta.pieces)} that it describes")
    if made.num_tokens and rows.experts.max() > meta.num_experts:
        raise ValueError(f"it has experts beyond the {meta.num_experts} that it describes")


def _rows(table: pa.Table, meta: Meta) -> Rows:
    def flat(name: str) -> np.ndarray:
        return table.column(name).to_numpy()

    def listed(name: str, width: int) -> np.ndarray:
        each = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in _chunks(table, name)]
        return np.concatenate(each).reshape(-1, width) if each else np.zeros((0, width))

    def layers(name: str, width: int) -> np.ndarray:
        return np.stack([listed(f"{name}_{j + 1}", width) for j in range(len(meta.layers))])

    names = {name: number for number, name in enumerate(meta.sources)}
    source = [
        np.array([names[n] for n in chunk.dictionary.to_pylist()], np.int16)[chunk.indices]
        for chunk in _chunks(table, "source")
    ]
    return Rows(
        token=flat("token"),
        source=np.concatenate(source) if source else np.zeros(0, np.int16),
        document=flat("document"),
        position=flat("position"),
        place=flat("place"),
        loss=flat("loss"),
        experts=layers("experts", meta.most),
        gates=layers("gates", meta.most),
        kept=layers("kept", meta.most).astype(bool),
        scores=layers("scores", 2),
        entropy=np.stack([flat(f"entropy_{j + 1}") for j in range(len(meta.layers))]),
    )


def _chunks(table: pa.Table, name: str) -> list[pa.Array]:
    return table.column(name).chunks
