"""The harness's own class for transformers, on an equal model, gives what ours gives, item by item.

The models are a vanilla pool, written as a Mixtral with our tokenizer, and an OLMoE and a Qwen3-MoE
with theirs, which have no BOS. With ours theirs differs in what looks like a special token, or like
SentencePiece's sign for a space: it reads "<s>" in a text as BOS.
"""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from moepp_jax import interop
from moepp_jax import state as state_lib
from moepp_jax.checkpoint import Checkpoints
from moepp_jax.harness.requests import encode_pairs
from moepp_jax.mesh import make_mesh
from tests import published, tiny

pytestmark = pytest.mark.harness

# The first id that is neither a special piece nor a byte.
FIRST_WORD = 260

# Questions and answers of every kind: several tokens, one token, none in common, other scripts.
TEXTS = [
    ("And God said, Let there be", " light"),
    ("And God said, Let there be ", "light"),
    ("And God said,\n\n", "Let there be light: and there was light."),
    ("", "In the beginning God created the heaven and the earth."),
    ("Question: Which is it?\nAnswer:", " A"),
    ("Question: Which is it?\nAnswer:", " B"),
    ("Ünïcödé 漢字 and  two  spaces", " follow\there"),
    ("x " * 150, "and the end of it"),  # longer than the model sees
]


@pytest.fixture(scope="module", params=["mixtral", "olmoe", "qwen3_moe"])
def both(request, tmp_path_factory):
    """(ours, theirs): the same checkpoint as two models of the harness."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    from lm_eval.models.huggingface import HFLM

    from moepp_jax.harness.model import MoEPPJax

    folder, family = tmp_path_factory.mktemp("hf"), request.param
    vanilla = {"moe.n_const": 0, "moe.n_copy": 0, "moe.n_zero": 0, "moe.rule.residual": "none"}
    changes = {"data.dir": str(folder / "data"), "data.seq_len": 96, "moe.group_size": 32}
    config = tiny.config(**vanilla, **changes, **{"moe.rule.tau": 1.0})
    if family == "mixtral":
        run = without_bytes(tiny.run_folder(folder / "run", config), config)
    else:
        run = upcycled(folder, family, config)
    interop.to_hf(run, folder / family, layout=family)
    theirs = HFLM(str(folder / family), device="cpu", dtype="float32", batch_size=3)
    return MoEPPJax(str(run), fsdp=2), theirs


def upcycled(folder, family, config):
    """A published model with a tokenizer.json and no BOS; theirs draws surplus rows, so none is
    ever the best."""
    source, run = published.whole(folder / "source", family), folder / "run"
    tensors = published.tensors_in(source)
    tensors["lm_head.weight"][480:] = 0
    save_file(tensors, source / "model.safetensors")
    interop.upcycle(source, run, config)
    return run


def without_bytes(run, config):
    """A checkpoint that never finds a byte's piece best: theirs reads broken characters otherwise.

    The logits of those pieces are 0, and of so many others one is always above it.
    """
    state = state_lib.init_state(
        state_lib.assemble(config, make_mesh(tiny.config(), jax.devices()[:1]))
    )
    output = state.params["output"].at[:FIRST_WORD].set(0.0)
    with Checkpoints(run, keep=2) as checkpoints:
        params = state.params | {"output": output}
        checkpoints.save(4, dataclasses.replace(state, params=params))
        checkpoints.wait()
    return run


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, a, i, ("task", i, 1)) for i, a in enumerate(arguments)]


def test_tokens_are_the_same(both):
    ours, theirs = both
    pairs = encode_pairs(ours._tokenizer, TEXTS)
    for text, pair in zip(TEXTS, pairs, strict=True):
        if text[0]:
            assert tuple(pair) == tuple(theirs._encode_pair(*text)), text
    assert ours.max_length == theirs.max_length == 96


def test_log_likelihoods_are_the_same(both):
    ours, theirs = both
    requests = instances("loglikelihood", TEXTS)
    mine, want = ours.loglikelihood(requests, True), theirs.loglikelihood(requests, True)
    np.testing.assert_allclose([a for a, _ in mine], [a for a, _ in want], rtol=2e-5)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in want]


def test_texts_are_the_same(both):
    """Rolling windows of texts with no, one and several windows."""
    ours, theirs = both
    texts = [(text,) for text in ("a", "And God said. " * 5, "In the beginning was the Word " * 20)]
    requests = instances("loglikelihood_rolling", texts)
    mine = ours.loglikelihood_rolling(requests, True)
    np.testing.assert_allclose(mine, theirs.loglikelihood_rolling(requests, True), rtol=2e-5)


def test_generated_texts_are_the_same(both):
    ours, theirs = both
    asked = {"until": ["\n", "th"], "max_gen_toks": 24, "do_sample": False}
    prompts = [(f"{text} ", asked) for text in ("And God said", "The king of the", "x " * 150)]
    requests = instances("generate_until", prompts)
    mine, want = ours.generate_until(requests, True), theirs.generate_until(requests, True)
    assert mine == want and any(mine)


def test_greedy_continuations_are_told(both):
    ours = both[0]
    asked = {"until": [], "max_gen_toks": 3, "do_sample": False}
    context = "And God said unto them,"
    (best,) = ours.generate_until(instances("generate_until", [(context, asked)]), True)
    requests = instances("loglikelihood", [(context, best), (context, " no, not that")])
    answers = [model.loglikelihood(requests, True) for model in both]
    assert [greedy for _, greedy in answers[0]] == [greedy for _, greedy in answers[1]]


def test_a_task_has_the_same_result_item_by_item(both, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from moepp_jax.harness import tasks

    words = ["king", "water", "stone", "garden", "horse", "river", "light"]
    (tmp_path / "arc_easy").mkdir()
    with (tmp_path / "arc_easy/test.jsonl").open("w") as file:
        for i in range(60):
            question = f"Which {words[i % 7]} is {words[(3 * i + 1) % 7]} {i}?"
            texts = [f"the {words[(i + j) % 7]} of {words[(i * j) % 7]}" for j in range(4)]
            choices = {"text": texts, "label": [*"ABCD"]}
            item = {"id": str(i), "question": question, "choices": choices}
            file.write(json.dumps(item | {"answerKey": "ABCD"[i % 4]}) + "\n")
    tasks.write(tmp_path / "tasks", tmp_path)
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    mine, want = (
        simple_evaluate(model=model, tasks=["arc_easy"], task_manager=manager, bootstrap_iters=0)
        for model in both
    )
    assert mine["results"]["arc_easy"] == want["results"]["arc_easy"]
    samples = zip(mine["samples"]["arc_easy"], want["samples"]["arc_easy"], strict=True)
    for a, b in samples:
        assert a["arguments"] == b["arguments"]
        assert (a["acc"], a["acc_norm"]) == (b["acc"], b["acc_norm"])
        for (x, x_greedy), (y, y_greedy) in zip(
            a["filtered_resps"], b["filtered_resps"], strict=True
        ):
            assert x == pytest.approx(y, rel=2e-5) and x_greedy == y_greedy
    # Not a model that always answers alike.
    assert 0 < mine["results"]["arc_easy"]["acc,none"] < 0.5
