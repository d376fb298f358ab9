"""The harness itself, on files of our own: its tasks, its command line, and the paper's suite."""

import json
import os
import socket
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from moepp_jax.checkpoint import CheckpointError
from moepp_jax.errors import ConfigError
from moepp_jax.harness.requests import Pair, row_of
from tests import tiny

pytestmark = pytest.mark.harness

ITEMS = 6


@pytest.fixture(scope="module", autouse=True)
def offline():
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    changes = {"data.dir": str(folder / "data"), "data.seq_len": 96, "moe.group_size": 32}
    return tiny.run_folder(folder / "run", tiny.config(**changes))


@pytest.fixture(scope="module")
def model(run):
    from moepp_jax.harness.model import MoEPPJax

    return MoEPPJax(str(run), fsdp=2)


def write(file, items):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(item) + "\n" for item in items))


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """A few items of every task in its published format: more than there are examples."""
    folder = tmp_path_factory.mktemp("benchmarks")
    words = ["king", "water", "stone", "garden", "horse", "river"]
    four = ["a king", "the water", "a stone of some kind", "no garden"]
    for i in range(40):
        word = f"{words[i % 6]} {i}"
        for split in ("validation", "test"):
            arc = {"id": f"{split}{i}", "question": f"What is the {word}, {split}?"}
            arc |= {"choices": {"text": four, "label": [*"ABCD"]}, "answerKey": "ABCD"[i % 4]}
            for name in ("arc_easy", "arc_challenge"):
                add(folder, f"{name}/{split}", arc)
        add(
            folder,
            "sciq/validation",
            {"question": f"What is a {word}?", "support": f"The {word} is so."}
            | {"distractor1": "a", "distractor2": "b", "distractor3": "c", "correct_answer": "it"},
        )
        add(folder, "piqa/validation", {"goal": word, "sol1": "Do.", "sol2": "Go.", "label": i % 2})
        sentence = f"The king saw the {word}, but _ was gone."
        choices = {"option1": "the king", "option2": "the water", "answer": "12"[i % 2]}
        add(folder, "winogrande/validation", {"sentence": sentence} | choices)
        scene = {"ind": i, "activity_label": "Riding", "ctx_a": f"A {word} came.", "ctx_b": "he"}
        endings = {"endings": four, "source_id": "x", "split": "val", "split_type": "indomain"}
        add(folder, "hellaswag/validation", scene | endings | {"ctx": "", "label": str(i % 4)})
        logic = {"label": "abcd"[i % 4], "context": word, "question": "Which?", "options": four}
        add(folder, "logiqa/test", logic)
        passage = {"question": f"is it the {word}", "passage": f"It is the {word}.", "idx": i}
        add(folder, "boolq/validation", passage | {"label": i % 2})
        add(folder, "lambada_openai/test", {"text": f"I saw the {word} and the king"})
        add(folder, "nq_open/validation", {"question": f"who saw the {word}", "answer": ["king"]})
    from moepp_jax.harness.tasks import harness_folder

    for file in (harness_folder() / "tasks/mmlu/default").glob("mmlu_*.yaml"):
        subject = file.stem.removeprefix("mmlu_")
        for split, count in (("dev", 5), ("test", 2)):
            for i in range(count):
                item = {"question": f"{subject} {split} {i}?", "choices": four, "answer": i % 4}
                add(folder, f"mmlu/{subject}/{split}", item | {"subject": subject})
    return folder


def add(folder, name, item):
    file = folder / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(item) + "\n")


@pytest.fixture(scope="module")
def tasks(benchmarks):
    from lm_eval.tasks import TaskManager

    from moepp_jax.harness import tasks as tasks_lib

    tasks_lib.write(benchmarks / "tasks", benchmarks)
    return TaskManager(include_path=str(benchmarks / "tasks"), include_defaults=False)


def test_no_item_is_among_its_own_examples(tasks):
    loaded = tasks.load(["arc_challenge", "hellaswag", "boolq", "nq_open", "mmlu_anatomy"])["tasks"]
    shots = {"arc_challenge": 25, "hellaswag": 10, "boolq": 32, "nq_open": 32, "mmlu_anatomy": 5}
    for name, task in loaded.items():
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=40)
        for request in task.instances:
            context, question = request.args[0], task.doc_to_text(request.doc)
            assert context.count(question) == 1, name
            assert context.endswith(question)
        counted = context.count("Q: who") + context.count("Question:") + context.count("Riding:")
        assert counted - 1 == shots[name] or name == "mmlu_anatomy"
        if name == "mmlu_anatomy":
            assert context.count("Answer:") == 6


def test_the_suite_is_run_and_its_table_made(run, benchmarks):
    from moepp_jax.harness import suite
    from moepp_jax.harness.model import MoEPPJax

    model = MoEPPJax(str(run), fsdp=2, count_generated=True)
    chosen = suite.select([], str(benchmarks))
    result = suite.run(model, chosen, str(benchmarks), limit=2)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [task.name for task in chosen] and len(rows) == 11
    assert {row["items"] for name, row in rows.items() if name != "mmlu"} == {2}
    assert rows["mmlu"]["items"] == 2 * 57
    for row in rows.values():
        assert 0 <= row["value"] <= 100
        load = np.array(row["load_by_layer"])
        assert load.shape == (2, 12) and load.sum(axis=1) == pytest.approx(1)
        by_layer = 2 * load[:, :8].sum(axis=1)
        assert row["ffn_experts_per_token_by_layer"] == pytest.approx(by_layer.tolist())
    assert "100% of the prompts cut to their last 96 tokens" in rows["boolq"]["notes"]
    assert not rows["piqa"]["notes"]
    json.dumps(result, default=str)
    assert "MMLU             5 acc             114" in suite.table(result["rows"])


def test_without_files_the_tasks_are_the_harnesses_own_with_the_papers_shots(tmp_path):
    from lm_eval.tasks import TaskManager

    from moepp_jax.harness import tasks as tasks_lib

    tasks_lib.write(tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    for task in tasks_lib.PAPER:
        assert task.name in manager.all_tasks
    config = manager.task_index["boolq"].cfg
    assert config["dataset_path"] == "aps/super_glue" and config["num_fewshot"] == 32
    assert manager.task_index["mmlu_anatomy"].cfg["num_fewshot"] == 5


def instance(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0, ("task", 0, 1))


def test_a_text_is_scored_in_windows_that_predict_each_token_once(model):
    text = "And God said, Let there be light: and there was light. " * 8
    ids = model._tokenizer.encode(text)
    assert len(ids) > model.max_length
    (rolling,) = model.loglikelihood_rolling([instance("loglikelihood_rolling", text)], True)
    # As the harness's own class for transformers: BOS is predicted from BOS, too.
    tokens, most = [model._tokenizer.bos_id, *ids], model.max_length
    pairs = [Pair([model._tokenizer.bos_id], tokens[:most])]
    for start in range(most, len(tokens), most):
        part = tokens[start : start + most]
        before = start + len(part) - (most + 1)  # as much as fits before the part's last token
        pairs.append(Pair(tokens[before:start], part))
    scores = model._score([row_of(pair, most) for pair in pairs])
    assert rolling == pytest.approx(sum(s.log_probs.sum() for s in scores), rel=1e-6)


def test_generation_ends_at_a_stop(model):
    free = {"until": [], "max_gen_toks": 20, "do_sample": False}
    prompts = ["And God said", "The king"]
    whole = model.generate_until([instance("generate_until", p, free) for p in prompts], True)
    assert all(whole)
    stop = whole[0][3:5]
    ended = model.generate_until(
        [instance("generate_until", p, free | {"until": [stop]}) for p in prompts], True
    )
    assert ended == [text.split(stop)[0] for text in whole]


def test_an_answer_that_cannot_be_scored_ends_nothing(model, caplog):
    asked = [("the king", " and"), ("and th", "e"), ("the king", ""), ("a", " the king" * 99)]
    before = model.tallies["task"].unscored
    answers = model.loglikelihood([instance("loglikelihood", *pair) for pair in asked], True)
    assert all(np.isfinite(log_prob) for log_prob, _ in answers[:2])
    assert answers[2:] == [(-np.inf, False)] * 2
    assert model.tallies["task"].unscored == before + 2
    assert "2 of the answers are empty, or longer than the 96 tokens" in caplog.text
    assert "items task 0, task 0" in caplog.text
    ids = model._tokenizer.encode
    pair = Pair([model._tokenizer.bos_id, *ids("and th")], ids("e"))
    (score,) = model._score([row_of(pair, model.max_length)])
    assert answers[1][0] == pytest.approx(score.log_probs.sum(), rel=1e-5)
    only = model.loglikelihood([instance("loglikelihood", "a", "")], True)
    assert only == [(-np.inf, False)]


def test_what_cannot_be_generated_is_told(model):
    for asked, message in [
        ({"num_beams": 4}, "num_beams = 4: moepp_jax has no beams but one"),
        ({"max_gen_toks": 96}, "max_gen_toks = 96 leaves no room"),
    ]:
        with pytest.raises(ConfigError, match=message):
            model.generate_until([instance("generate_until", "a", asked)], True)


def test_arguments_of_no_use_are_told(run, tmp_path):
    from moepp_jax.harness.model import MoEPPJax

    for arguments, message in [
        ({"workdir": str(tmp_path)}, "has no config.json"),
        ({"pretrained": "x"}, "no argument pretrained"),
        ({"batch_size": "some"}, "batch_size = 'some' must be a number of rows"),
        ({"data": 3}, "does not multiply to the 8 devices"),
    ]:
        with pytest.raises(ConfigError, match=message):
            MoEPPJax(**({"workdir": str(run)} | arguments))
    with pytest.raises(CheckpointError, match="checkpoint 4"):
        MoEPPJax(str(run), step=4)


def command(*words):
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, env=environment
    )
    return done.returncode, done.stdout, done.stderr


def test_the_harnesses_own_command_line_knows_the_model(run, benchmarks, tasks, tmp_path):
    status, out, err = command(
        "moepp_jax.harness", "run", "--model", "moepp_jax", "--model_args", f"workdir={run}",
        "--include_path", str(benchmarks / "tasks"), "--tasks", "piqa", "--limit", "4",
        "--output_path", str(tmp_path),
    )  # fmt: skip
    assert status == 0, err
    assert "|piqa |" in out.replace("  ", " ") or "piqa" in out
    (file,) = tmp_path.rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["config"]["model"] == "moepp_jax" and results["config"]["step"] == 3
    assert results["n-samples"]["piqa"]["effective"] == 4
    status, _, err = command(
        "moepp_jax.harness", "run", "--model", "moepp_jax", "--model_args", "workdir=/none",
        "--include_path", str(benchmarks / "tasks"), "--tasks", "piqa",
    )  # fmt: skip
    assert status == 1 and err.splitlines()[-1].startswith("error: workdir /none is no folder")


def test_the_entry_point_is_the_registered_model(model):
    """By it releases after 0.4.13 find the model."""
    from lm_eval.api.registry import get_model

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    group = "lm_eval.models"
    ((name, value),) = project["entry-points"][group].items()
    assert EntryPoint(name, value, group).load() is get_model(name) is type(model)


def with_another_process(run, benchmarks, file):
    """What two processes, of one device each, find together."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]
    words = ["moepp_jax.main", "lm_eval", f"--workdir={run}", "--tasks=LAMBADA,sciq", "--limit=3"]
    words += [f"--benchmarks={benchmarks}", f"--coordinator=localhost:{port}", "--num_processes=2"]
    with ThreadPoolExecutor() as pool:
        other = pool.submit(command, *words, "--process_id=1")
        status, _, err = command(*words, "--process_id=0", f"--json={file}")
        assert status == 0, err
        status, out, err = other.result()
        assert status == 0 and "SciQ" not in out, err
    return json.loads(file.read_text())


def test_the_command_prints_the_table(run, benchmarks, tmp_path):
    status, out, err = command(
        "moepp_jax.main", "lm_eval", f"--workdir={run}", "--suite=paper", "--tasks=LAMBADA,sciq",
        f"--benchmarks={benchmarks}", "--limit=3", f"--json={tmp_path / 'out.json'}",
    )  # fmt: skip
    assert status == 0, err
    assert "SciQ             0 acc               3" in out
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["task"] for row in result["rows"]] == ["SciQ", "LAMBADA"] and result["step"] == 3
    together = with_another_process(run, benchmarks, tmp_path / "two.json")
    for one, two in zip(result["rows"], together["rows"], strict=True):
        assert one.keys() == two.keys() and one["value"] == two["value"]
        np.testing.assert_allclose(one["load_by_layer"], two["load_by_layer"], rtol=1e-6)
    status, _, err = command(
        "moepp_jax.main", "lm_eval", f"--workdir={run}", "--benchmarks=/none", "--tasks=sciq"
    )
    assert status == 1 and err.splitlines()[-1].startswith("error: --benchmarks=/none has no files")
