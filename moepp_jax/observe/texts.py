"""The text whose routing is looked at, in rows as training reads it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moepp_jax.data import Dataset, Tokenizer
from moepp_jax.data.packing import PackedRows, ranges
from moepp_jax.errors import ConfigError
from moepp_jax.harness.tasks import Task

# Bytes of a file that are read for each token that is wanted: more than any tokenizer packs in one.
_BYTES = 16


class Part(NamedTuple):
    """A part of the text.

    Attributes:
      kind: "source", "file" or "task".
      rows: its documents, each from BOS to EOS.
    """

    name: str
    kind: str
    rows: PackedRows

    def count(self, tokens: int) -> int:
        """Rows that hold at most so many tokens, and one at least."""
        return min(len(self.rows), max(1, tokens // self.rows.row_length))


def require_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """
    Raises:
      ConfigError: the tokenizer has ids that the model has no embedding of.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, more than config.model.vocab_size = "
            f"{vocab_size}: it is not the one that this model was trained with"
        )


class _Listed:
    """Documents in memory, end to end."""

    def __init__(self, documents: Sequence[Sequence[int]]):
        self.starts = np.cumsum([0, *map(len, documents)])
        self._tokens = np.fromiter(itertools.chain.from_iterable(documents), np.int32)

    def read(self, begin: np.ndarray, size: np.ndarray) -> np.ndarray:
        return self._tokens[ranges(begin, size)]


def listed(name: str, kind: str, documents: list[list[int]], tokenizer: Tokenizer, length: int):
    """A part of documents without BOS and EOS, in rows of `length` tokens."""
    whole = [[tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in documents]
    rows = PackedRows(_Listed(whole), length, pad_id=tokenizer.pad_id, drop_last=False)
    return Part(name, kind, rows)


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
    try:
        with path.open("rb") as file:
            raw = file.read(_BYTES * tokens)
    except OSError as error:
        raise ConfigError(f"--text={path} cannot be read: {error.strerror}") from error
    try:
        # A character that the limit cuts in two is no fault of the file's.
        text = raw.decode("utf-8", errors="strict" if len(raw) < _BYTES * tokens else "ignore")
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
                    "`main data benchmarks` makes the files anew"
                ) from error


def _items(file: Path) -> Iterator[tuple[Path, int, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield file, number, json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{file}, line {number} is no JSON: {error}") from error


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
