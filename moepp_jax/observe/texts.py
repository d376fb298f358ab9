"""The text whose routing is looked at, in rows as training reads it."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moepp_jax import regular
from moepp_jax.data import Dataset, Tokenizer
from moepp_jax.data.packing import Batch, PackedRows
from moepp_jax.errors import ConfigError
from moepp_jax.harness.tasks import Task

# Bytes of a file that are read for each token that is wanted: more than any tokenizer packs in one.
_BYTES = 16


class Part(NamedTuple):
    """A part of the text.

    Attributes:
      kind: "source", "file" or "task".
      rows: its documents, each from BOS to EOS; held-out text as evaluation has it, cut anywhere,
        all else whole where a row can hold it.
    """

    name: str
    kind: str
    rows: PackedRows | WholeRows

    def count(self, tokens: int) -> int:
        """Rows that hold at most so many tokens, and one at least."""
        return min(len(self.rows), max(1, tokens // self.rows.row_length))


class WholeRows:
    """Documents in rows of one length, none cut that a row can hold.

    A row takes documents, one after the other, as long as they fit; a longer one has rows of its
    own. What is left of a row is padding. Rows are read as those of `PackedRows`.
    """

    def __init__(self, documents: Sequence[Sequence[int]], row_length: int, pad_id: int):
        self.row_length, self._pad_id = row_length, pad_id
        self._documents = [np.asarray(document, np.int32) for document in documents]
        self._rows = list(_filled(list(map(len, documents)), row_length))

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, rows: np.ndarray) -> Batch:
        """Rows by number; numbers past the last row give padding."""
        shape = (len(rows), self.row_length)
        batch: Batch = {name: np.zeros(shape, np.int32) for name in _NAMES}
        batch["tokens"] += self._pad_id
        batch["loss_mask"] = np.zeros(shape, np.float32)
        for row, segment, here, document, start in self._spans(rows):
            ids = self._documents[document]
            size = here.stop - here.start
            known = len(ids[start + 1 : start + 1 + size])
            batch["tokens"][row, here] = ids[start : start + size]
            batch["targets"][row, here][:known] = ids[start + 1 : start + 1 + size]
            batch["segments"][row, here] = segment
            batch["positions"][row, here] = np.arange(size)
            batch["loss_mask"][row, here][:known] = 1
        return batch

    def standing(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `PackedRows.standing`."""
        document, place = (np.zeros((len(rows), self.row_length), np.int64) for _ in range(2))
        for row, _, here, number, start in self._spans(rows):
            document[row, here] = number
            place[row, here] = start + np.arange(here.stop - here.start)
        return document, place

    def _spans(self, rows: np.ndarray) -> Iterator[tuple[int, int, slice, int, int]]:
        """Row among those asked for, segment, where it lies, document and its first token there."""
        for row, number in enumerate(rows.tolist()):
            place = 0
            for segment, (document, start, size) in enumerate(self._row(number), 1):
                yield row, segment, slice(place, place + size), document, start
                place += size

    def _row(self, number: int) -> list[tuple[int, int, int]]:
        return self._rows[number] if number < len(self) else []


_NAMES = ("tokens", "targets", "segments", "positions")


def _filled(sizes: Sequence[int], length: int) -> Iterator[list[tuple[int, int, int]]]:
    """Rows as (document, first token, tokens) of what they hold."""
    row: list[tuple[int, int, int]] = []
    left = length
    for document, size in enumerate(sizes):
        if row and size > left:
            yield row
            row, left = [], length
        for start in range(0, size, length):
            part = min(size - start, length)
            row, left = [*row, (document, start, part)], left - part
            if left == 0:
                yield row
                row, left = [], length
    if row:
        yield row


def listed(
    name: str, kind: str, documents: list[list[int]], tokenizer: Tokenizer, length: int
) -> Part:
    """A part of documents without BOS and EOS, in rows of `length` tokens."""
    whole = [tokenizer.document(ids) for ids in documents]
    return Part(name, kind, WholeRows(whole, length, tokenizer.pad_id))


def of_sources(dataset: Dataset, names: Sequence[str] = ()) -> list[Part]:
    """Held-out text, of all sources if none is named.

    Raises:
      ConfigError: there is no such source.
    """
    for name in names:
        if name not in dataset.sources:
            there = ", ".join(dataset.sources)
            raise ConfigError(f"--source={name}: the run has the sources {there}")
    return [Part(name, "source", dataset.sources[name].eval) for name in names or dataset.sources]


def of_file(path: Path, tokenizer: Tokenizer, length: int, tokens: int) -> Part:
    """A file's text as one document, as far as it can be of use for so many tokens.

    Raises:
      ConfigError: the file cannot be read, is empty or no text.
    """
    if not str(path).strip("."):
        raise ConfigError(f"--text={path}: name a file of text")
    try:
        with path.open("rb") as file:
            raw = file.read(_BYTES * tokens)
    except OSError as error:
        raise ConfigError(f"--text={path} cannot be read: {error.strerror}") from error
    try:
        # A character that the limit cuts in two is no fault of the file's.
        decoder = codecs.getincrementaldecoder("utf-8")()
        text = decoder.decode(raw, final=len(raw) < _BYTES * tokens)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--text={path} is not UTF-8 text: byte {error.start} is {raw[error.start]:#04x}"
        ) from error
    if "\0" in text:
        raise ConfigError(f"--text={path} is not text: there is a zero byte in it")
    if not text.strip():
        raise ConfigError(f"--text={path} is empty: there is no token to look at")
    return listed(path.name, "file", [tokenizer.encode(text)], tokenizer, length)


def of_tasks(
    tasks: Iterable[Task], benchmarks: Path, tokenizer: Tokenizer, length: int, tokens: int
) -> list[Part]:
    """Benchmark items with their right answers, an item a document; so many tokens of each task."""
    parts = []
    for task in tasks:
        documents, count = [], 0
        for text in texts_of(task, benchmarks):
            documents.append(tokenizer.encode(text))
            count += len(documents[-1]) + 2
            if count > tokens + length:
                break
        if not documents:
            raise ConfigError(
                f"there is no item of {task.name} in {benchmarks / task.name}: `moepp data "
                "benchmarks` makes them"
            )
        parts.append(listed(task.name, "task", documents, tokenizer, length))
    return parts


def texts_of(task: Task, benchmarks: Path) -> Iterator[str]:
    """A task's items as text: what is asked, and the right answer.

    Raises:
      ConfigError: an item cannot be read; names the file and the line.
    """
    files = sorted((benchmarks / task.name).rglob(f"{task.evaluated}.jsonl"))
    # Of MMLU every subject in turn: the first of one alone would not be the task.
    for items in itertools.zip_longest(*map(_items, files)):
        for file, number, item in filter(None, items):
            try:
                yield TEXTS[task.name](item)
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise ConfigError(
                    f"{file}, line {number}: this is no item of {task.name} ({error!r}); "
                    "`moepp data benchmarks` makes the files anew"
                ) from error


def _items(file: Path) -> Iterator[tuple[Path, int, Any]]:
    try:
        regular.require(file)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                item = regular.parsed(line)
            except ValueError as error:
                raise ConfigError(f"{file}, line {number} is no JSON: {error}") from error
            yield file, number, item


def _lettered(question: str, choices: Sequence[str], answer: int) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip("ABCDE", choices, strict=False)]
    return "\n".join([question.strip(), *lines, f"Answer: {'ABCDE'[answer]}"])


def _arc(item: Any) -> str:
    right = item["choices"]["label"].index(item["answerKey"])
    return f"Question: {item['question']}\nAnswer: {item['choices']['text'][right]}"


def _sciq(item: Any) -> str:
    asked = f"Question: {item['question']}\nAnswer: {item['correct_answer']}"
    return f"{item['support']}\n{asked}".lstrip()


def _logiqa(item: Any) -> str:
    asked = f"Passage: {item['context']}\nQuestion: {item['question']}"
    return _lettered(asked, item["options"], "abcd".index(item["label"]))


# The harness's prompts without examples, and what follows them where the answer is right.
TEXTS: dict[str, Callable[[Any], str]] = {
    "sciq": _sciq,
    "piqa": lambda i: f"Question: {i['goal']}\nAnswer: {i[('sol1', 'sol2')[int(i['label'])]]}",
    "winogrande": lambda i: i["sentence"].replace("_", i[f"option{i['answer']}"]),
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "hellaswag": lambda i: f"{i['ctx']} {i['endings'][int(i['label'])]}",
    "logiqa": _logiqa,
    "boolq": lambda i: (
        f"{i['passage']}\nQuestion: {i['question']}?\nAnswer: {('no', 'yes')[int(i['label'])]}"
    ),
    "lambada_openai": lambda i: i["text"],
    "nq_open": lambda i: f"Q: {i['question']}?\nA: {i['answer'][0]}",
    "mmlu": lambda i: _lettered(i["question"], i["choices"], int(i["answer"])),
}
