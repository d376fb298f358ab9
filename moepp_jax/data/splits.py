"""Which files of a source are its training, validation and test splits, by their names.

A name says a split where one of its words is train, validation, valid, val, dev or test. It is
taken at its word where it cannot be an accident: where a name beside it, in the same folder, says
another split and is alike but for that word and for numbers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

from moepp_jax.data.opening import ending, of_text

TRAIN, VALIDATION, TEST = "train", "validation", "test"

_WORDS = {
    "train": TRAIN,
    "validation": VALIDATION,
    "valid": VALIDATION,
    "val": VALIDATION,
    "dev": VALIDATION,
    "test": TEST,
}

# Of a file of several: train-00003-of-00010-0123456789abcdef.
_HASH = re.compile(r"(-of-\d+)-[0-9a-f]{16}$")

Folder = tuple[str, ...]


class _Said(NamedTuple):
    """What the name of a file or folder says."""

    split: str
    beside: tuple[str, ...]  # its other words: twins have the same ones


def of_files(names: Iterable[str], declared: Collection[Folder] = ()) -> dict[str, str]:
    """The split of each file that belongs to one.

    The outermost name that decides is that of a folder on the way, or the file's own. In a folder
    where splits are found, a name that says one of them belongs to it even without a twin:
    test_results.jsonl beside train.jsonl and test.jsonl is of the test split.

    Args:
      names: paths in the source, with /.
      declared: folders whose folders are splits, by a word of the data set's own.
    """
    paths = {name: _path(name) for name in names}
    twins: dict[tuple[Folder, tuple[str, ...]], set[str]] = defaultdict(set)
    for path in paths.values():
        for folder, said in path:
            twins[folder, said.beside].add(said.split)
    found: dict[Folder, set[str]] = defaultdict(set)
    for (folder, _), splits in twins.items():
        if len(splits) > 1 or folder in declared:
            found[folder] |= splits
    chosen = {}
    for name, path in paths.items():
        for folder, said in path:
            if said.split in found[folder]:
                chosen[name] = said.split
                break
    return chosen


def accidental(names: Iterable[str], chosen: Collection[str]) -> list[str]:
    """Files that are trained on although their name says that they are not of a training split."""
    return [
        name
        for name in names
        if name not in chosen and any(said.split != TRAIN for _, said in _path(name))
    ]


def _path(name: str) -> list[tuple[Folder, _Said]]:
    """What folders on the way and the file say, each with the folder that it is in."""
    *folders, file = PurePosixPath(name).parts
    stem = file.removesuffix(ending(file)) if of_text(file) else file
    parts = [*folders, stem]
    said = ((tuple(folders[:i]), _said(part)) for i, part in enumerate(parts))
    return [(folder, what) for folder, what in said if what]


def _said(name: str) -> _Said | None:
    words = re.findall(r"[^\W\d_]+", _HASH.sub(r"\1", name.lower()))
    at = next((i for i, word in enumerate(words) if word in _WORDS), None)
    if at is None:
        return None
    beside = [word for word in [*words[:at], "*", *words[at + 1 :]] if word != "of"]
    return _Said(_WORDS[words[at]], tuple(beside))
