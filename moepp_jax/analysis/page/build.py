"""One HTML file that holds all it needs: the text, how it was routed, the styles, the program.

The data are a block of bytes: the length of a JSON head as uint32, the head, and the arrays that
it lists, each from a multiple of 8 bytes; the block is gzipped and written in base64, whose
letters cannot end a script element, whatever the text says.
"""

from __future__ import annotations

import base64
import gzip
import html
import importlib.resources
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moepp_jax.analysis.record import KINDS, Record, Rows
from moepp_jax.errors import ConfigError

TEXT, SPECIAL, PART = range(3)  # how a token is shown; PART: the rest of a character
NO_LOSS = 0xFFFF  # the largest loss that can be told is 65.534 nats
_ALIGN = 8
PROGRAM = ("helps", "data", "state", "colours", "lines", "drawing", "about", "loads", "token")
PROGRAM += ("layers", "search", "jumps", "mouse", "keys", "theme", "start")


class Shown(NamedTuple):
    """A token as the page has it.

    Attributes:
      text: with a sign for what cannot be seen.
      raw: what is searched and copied.
      style: TEXT, SPECIAL or PART.
    """

    text: str
    raw: str
    style: int


def build(records: Sequence[Record], tokens: int = 50_000) -> str:
    """The page, as HTML.

    Args:
      records: one, or two of the same text, which are shown beside each other.
      tokens: at most so many are shown, from the first.

    Raises:
      ConfigError: there are no tokens, the texts of two records differ, or there are more than two.
    """
    cuts = [_first(record, tokens) for record in records]
    _check(cuts, tokens)
    assets = importlib.resources.files(__package__)
    parts = {
        "title": html.escape(_sound(" and ".join(record.meta.name for record in cuts))),
        "style": assets.joinpath("page.css").read_text(encoding="utf-8"),
        "program": _program(assets.joinpath("program")),
        "data": _packed(*_content(cuts, records)),
    }
    template = assets.joinpath("page.html").read_text(encoding="utf-8")
    # In one pass: a name that looks like a placeholder is left as it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _program(folder: Any) -> str:
    """The page's one script, in rooms: each uses what stands before it."""
    return "\n".join(folder.joinpath(f"{n}.js").read_text(encoding="utf-8") for n in PROGRAM)


def _first(record: Record, tokens: int) -> Record:
    cut = slice(max(tokens, 0))
    per_layer = ("experts", "gates", "kept", "scores", "entropy")
    return Record(
        record.meta,
        Rows(
            **{
                name: rows[:, cut] if name in per_layer else rows[cut]
                for name, rows in record.rows._asdict().items()
            }
        ),
    )


def _check(records: Sequence[Record], tokens: int) -> None:
    """
    Raises:
      ConfigError: these cannot be shown.
    """
    if len(records) not in (1, 2):
        raise ConfigError(f"a page shows one record or two beside each other, not {len(records)}")
    for record in records:
        if not record.num_tokens:
            raise ConfigError(
                f"no tokens of {record.meta.name} to show, of the first {tokens}; "
                "a page needs one at least"
            )
    if len(records) == 2:
        _check_text(*records)


def _check_text(a: Record, b: Record) -> None:
    def refuse(why: str) -> None:
        raise ConfigError(
            f"{a.meta.name} and {b.meta.name} are of different texts, and cannot be shown beside "
            f"each other: {why}; analyze the same text with both"
        )

    if a.num_tokens != b.num_tokens:
        refuse(f"{a.num_tokens} and {b.num_tokens} tokens")
    for what in ("token", "document"):
        differ = np.flatnonzero(getattr(a.rows, what) != getattr(b.rows, what))
        if differ.size:
            refuse(f"the first {what} that differs is at {differ[0]}")
    for token in np.unique(a.rows.token).tolist():
        if a.meta.pieces[token] != b.meta.pieces[token]:
            refuse(f"token {token} is {a.text_of(token)!r} in one and {b.text_of(token)!r} in two")


# --- text


def shown(record: Record) -> list[Shown]:
    """Each token as it is shown, in its context.

    A character that several tokens make up is shown in the first of them.
    """
    meta, result = record.meta, []
    for document in record.documents():
        for special, run in _runs(record.rows.token[document].tolist(), meta.special):
            if special:
                names = [meta.special[token] for token in run]
                result += [Shown(visible(name), name, SPECIAL) for name in names]
            else:
                texts = characters([record.bytes_of(token) for token in run])
                result += [
                    Shown(visible(text), _sound(text), TEXT) if text else Shown("·", "", PART)
                    for text in texts
                ]
    return result


def _runs(
    tokens: Sequence[int], special: Mapping[int, str]
) -> Iterator[tuple[bool, Sequence[int]]]:
    """Side by side, and all of them special, or none."""
    cuts = [
        i for i in range(1, len(tokens)) if (tokens[i] in special) != (tokens[i - 1] in special)
    ]
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        yield tokens[start] in special, tokens[start:end]


def characters(parts: Sequence[bytes]) -> list[str]:
    """The text of each part; a byte that is of no character is a lone surrogate, as in PEP 383."""
    texts = [""] * len(parts)
    owner = [number for number, part in enumerate(parts) for _ in part]
    at = 0
    for character in b"".join(parts).decode("utf-8", errors="surrogateescape"):
        texts[owner[at]] += character
        at += len(character.encode("utf-8", errors="surrogateescape"))
    return texts


def visible(text: str) -> str:
    """With a sign for each character that cannot be seen, or that would move its neighbours."""
    whole = len(text) > 1
    signs = "".join(_sign(character, whole) for character in text)
    bare = signs and unicodedata.combining(signs[0])
    return f"◌{signs}" if bare else signs


def _sign(character: str, among_others: bool) -> str:
    code = ord(character)
    if character in _SIGNS:
        return _SIGNS[character]
    if code < 0x20:
        return chr(0x2400 + code)
    if character in _JOINERS and among_others:
        return character  # scripts and emoji are written with them
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        of_no_character = 0xDC80 <= code <= 0xDCFF
        return f"\\x{code - 0xDC00:02X}" if of_no_character else f"\\u{code:04X}"
    return character


_SIGNS = {"\n": "↵", "\t": "⇥", "\x7f": "␡"}
_JOINERS = "\u200c\u200d"


def _sound(text: str) -> str:
    """With a replacement character for each lone surrogate, which UTF-8 does not have."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


# --- data


def _content(
    cuts: Sequence[Record], whole: Sequence[Record]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The head without its list of arrays, and the arrays."""
    first = cuts[0]
    numbers, table = _numbered(shown(first))
    head = {
        "kinds": KINDS,
        "strings": [[s.text, s.style, s.raw.count("\n")] for s in table],
        "raw": {n: s.raw for n, s in enumerate(table) if s.raw != s.text},
        "segments": _segments(first.rows),
        "sources": list(first.meta.sources.items()),
        "tokens": first.num_tokens,
        "noLoss": NO_LOSS,
        "models": [_about(cut, record.num_tokens) for cut, record in zip(cuts, whole, strict=True)],
    }
    arrays = {"text": _small(numbers), "token": _small(first.rows.token)}
    for number, cut in enumerate(cuts):
        arrays[f"choice{number}"] = _small(_choices(cut))
        arrays[f"gate{number}"] = _gates(cut)
        arrays[f"loss{number}"] = _losses(cut.rows.loss)
    return head, arrays


def _numbered(tokens: Iterable[Shown]) -> tuple[np.ndarray, list[Shown]]:
    """The number of each in a table of those that differ."""
    numbers: dict[Shown, int] = {}
    each = [numbers.setdefault(token, len(numbers)) for token in tokens]
    return np.array(each), list(numbers)


def _segments(rows: Rows) -> list[list[int]]:
    """[start, source, document, position] of each run of tokens that follow each other."""
    follows = (
        (np.diff(rows.document) == 0)
        & (np.diff(rows.source.astype(np.int64)) == 0)
        & (np.diff(rows.position) == 1)
    )
    starts = np.concatenate([[0], np.flatnonzero(~follows) + 1])
    columns = (starts, rows.source[starts], rows.document[starts], rows.position[starts])
    return np.stack(columns, axis=1).tolist()


def _about(record: Record, total: int) -> dict[str, Any]:
    meta, loss = record.meta, record.rows.loss
    known = loss[~np.isnan(loss)]
    return {
        "name": meta.name,
        "step": meta.step,
        "rule": dict(meta.rule),
        "counts": meta.counts,
        "most": meta.most,
        "layers": meta.layers,
        "wanted": meta.wanted,
        "total": total,
        "gates": _gate_range(record.rows.gates),
        "meanFfn": float(record.ffn.mean()) if meta.layers else 0.0,
        "meanLoss": float(known.mean(dtype=np.float64)) if known.size else None,
    }


def _choices(record: Record) -> np.ndarray:
    """[J K T]: the expert that served; N if the choice is unused; N + 1 + the one that dropped."""
    N, experts = record.meta.num_experts, record.rows.experts.astype(np.int32)
    dropped = ~record.rows.kept & (experts < N)
    return np.moveaxis(np.where(dropped, experts + N + 1, experts), 2, 1)


def _gate_range(gates: np.ndarray) -> list[float]:
    finite = gates[np.isfinite(gates)]
    return [float(min(finite.min(initial=0), 0)), float(max(finite.max(initial=0), 1e-9))]


def _gates(record: Record) -> np.ndarray:
    """[J K T] uint8, in 255 steps of their range."""
    low, high = _gate_range(record.rows.gates)
    steps = np.rint((np.nan_to_num(record.rows.gates) - low) * (255 / (high - low)))
    return np.moveaxis(np.clip(steps, 0, 255).astype(np.uint8), 2, 1)


def _losses(loss: np.ndarray) -> np.ndarray:
    """In thousandths of a nat."""
    known = ~np.isnan(loss)
    thousandths = np.clip(np.rint(np.where(known, loss, 0) * 1000), 0, NO_LOSS - 1)
    return np.where(known, thousandths, NO_LOSS).astype(np.uint16)


def _small(values: np.ndarray) -> np.ndarray:
    """As the smallest unsigned integers that can tell them."""
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


def _packed(head: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    listed, parts, at = [], [], 0
    for name, values in arrays.items():
        part = values.astype(values.dtype.newbyteorder("<")).tobytes()
        listed.append([name, values.dtype.itemsize, at, values.size])
        parts.append(part + b"\0" * (-len(part) % _ALIGN))
        at += len(parts[-1])
    said = json.dumps({**head, "arrays": listed}, separators=(",", ":")).encode()
    said += b" " * (-(len(said) + 4) % _ALIGN)
    block = b"".join([len(said).to_bytes(4, "little"), said, *parts])
    return base64.b64encode(gzip.compress(block, compresslevel=6, mtime=0)).decode()
