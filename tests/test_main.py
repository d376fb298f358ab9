"""The command line as its users meet it: real processes, killed and continued, and its errors."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as orbax
import pytest

from moepp_jax import cli, main
from moepp_jax import mesh as mesh_lib
from moepp_jax import state as state_lib
from moepp_jax.checkpoint import Checkpoints
from moepp_jax.data import Tokenizer, open_dataset
from moepp_jax.metrics import read_metrics
from moepp_jax.workdir import read_config
from tests import hurry, tiny

ROOT = Path(__file__).parents[1]
# As on a user's machine, with one device, but compiled in a hurry.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")} | {
    "XLA_FLAGS": hurry.XLA_FLAGS
}


# The README's command: the rest of the devices, made on a machine that has one.
README = ["--config.moe.rule.tau=0.5", "--config.train.steps=120", "--config.mesh.data=-1"]
README += ["--config.mesh.fsdp=1", "--config.mesh.expert=2"]


def flags(folder) -> list[str]:
    changes = tiny.CHANGES | {"data.dir": str(folder / "data")}
    return ["--config=configs/tiny.py", *(f"--config.{k}={v}" for k, v in changes.items())]


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "moepp_jax.main", *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen, status: int = 0) -> str:
    """Its standard output, once it has ended as it should."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, out + err
    return out


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("main")
    with pytest.MonkeyPatch.context() as patch:
        # As a user sets it who starts the same things again and again.
        patch.setitem(ENVIRONMENT, "JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
        patch.setitem(ENVIRONMENT, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        yield folder


@pytest.fixture(scope="module")
def runs(folder):
    """What was said by a run left alone, and by one killed, then asked to stop, then ended."""
    often = ["--config.train.save_every=20", "--config.train.log_every=3"]
    train = ["train", *flags(folder), *README, *often]
    ended(start("data", "prepare", *flags(folder)))
    alone = start(*train, f"--workdir={folder / 'alone'}")

    victim = [*train, f"--workdir={folder / 'victim'}"]
    process = start(*victim)
    wait_for(folder / "victim" / "checkpoints" / "20", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    process = start(*victim)
    wait_for(folder / "victim" / "checkpoints" / "60", process)
    process.send_signal(signal.SIGTERM)
    stopped = ended(process, status=143)
    return {"alone": ended(alone), "stopped": stopped, "resumed": ended(start(*victim))}


def test_the_runs_were_what_they_should_be(runs):
    assert "mesh data 1 x fsdp 1 x expert 2" in runs["alone"]
    assert "step 0 of 120" in runs["alone"]
    began = int(re.search(r"step (\d+) of 120", runs["stopped"])[1])
    saved = int(re.search(r"SIGTERM: stopped and saved at step (\d+)", runs["stopped"])[1])
    assert 20 <= began < 60 <= saved < 120
    assert f"step {saved} of 120" in runs["resumed"]
    assert "step 120: held-out loss" in runs["resumed"] and "step 120" in runs["alone"]


def test_a_killed_run_ends_with_the_same_bits(runs, folder):
    config = read_config(folder / "alone")
    assert config.moe.rule.tau == 0.5 and read_config(folder / "victim") == config
    mesh = mesh_lib.make_mesh(config, jax.devices()[:2])
    states = []
    for name in ("alone", "victim"):
        with Checkpoints(folder / name, keep=2) as checkpoints:
            assert checkpoints.latest_step() == 120
            states.append(checkpoints.restore(120, state_lib.assemble(config, mesh).abstract))
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get(states))
    assert states[0].step == 120


def test_a_killed_run_tells_the_same_story(runs, folder):
    def story(name):
        rows = read_metrics(folder / name)
        timing = {"tokens_per_s", "seconds", "data_wait"}
        return [{k: v for k, v in row.items() if k not in timing} for row in rows]

    saved = int(re.search(r"saved at step (\d+)", runs["stopped"])[1])
    victim = [row for row in story("victim") if row["step"] % 3 == 0 or row["step"] != saved]
    assert victim == story("alone")
    assert [row["step"] for row in victim if "loss" in row] == [*range(3, 121, 3)]


def test_programs_of_several_devices_are_not_read_from_a_cache(runs, folder):
    kept = {entry.name.split("-")[0] for entry in (folder / "cache").glob("*-cache")}
    assert not kept & {"jit_step", "jit_sums"}, kept


def test_evaluate_prints_json(runs, folder):
    workdir = f"--workdir={folder / 'alone'}"
    out = ended(start("evaluate", workdir, f"--json={folder / 'result.json'}"))
    result = json.loads(out)
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["step"] == 120
    dataset = open_dataset(read_config(folder / "alone"))
    assert result["eval_tokens"] == sum(dataset.sources["text"].eval_documents.lengths - 1)
    assert 0 < result["eval_loss"] < 5
    without_ffn = json.loads(ended(start("evaluate", workdir, "--batches=1", "--zero_offset=1e4")))
    assert without_ffn["eval_ffn_experts_per_token"] == 0


def test_generate_continues_prompts_with_the_settings_of_config_and_flags(runs, folder):
    workdir = folder / "alone"
    free = [*README, "--config.generate.max_new_tokens=3", "--temperature=2", "--seed=1"]
    prompts = ["--prompt=The bees", "--prompt=A river"]
    out = ended(start("generate", f"--workdir={workdir}", *flags(folder), *free, *prompts))
    tokenizer = Tokenizer.load(workdir / "tokenizer.model")
    for text, prompt in zip(out.strip("\n").split("\n\n"), ["The bees", "A river"], strict=True):
        assert text.startswith(prompt)
        new = text.removeprefix(prompt).replace("\ufffd", "?")  # a byte that is no character
        assert 1 <= len(tokenizer.encode(new)) <= 3  # not the run's 8


# Errors, each in a process forked from one that has imported everything

FORKS = """
import json, os, signal, sys, traceback
from moepp_jax import cli, main

for name in main.COMMANDS:
    main.load(name)

# What a shell starts in the background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)

def run(arguments, stderr):
    sys.argv, sys.stderr = ["main", *arguments], open(stderr, "w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    interrupt = lambda argv: signal.raise_signal(signal.SIGINT)
    try:
        cli.run(interrupt) if arguments == ["^C"] else main.main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 2

for number, arguments in enumerate(json.load(sys.stdin)):
    child = os.fork()
    if not child:
        os._exit(run(arguments, f"{sys.argv[1]}/{number}"))  # faster than ending in good order
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def run_folder(folder):
    return tiny.run_folder(folder / "run", tiny.config(**{"data.dir": str(folder / "data")}))


# Recipes with a mistake in each, and what is said of it.
OWN = {
    "misnamed": (
        "def get_config():\n    return confg\n",
        "--config=.*misnamed.py, line 2: NameError: name 'confg' is not defined",
    ),
    "no_key": (
        "def get_config():\n    return {}['moe']\n",
        "--config=.*no_key.py, line 2: KeyError: 'moe'$",
    ),
    "at_import": (
        "1 / 0\n",
        "--config=.*at_import.py, line 1: ZeroDivisionError: division",
    ),
    "no_function": ("x = 1\n", "--config=.*no_function.py: a recipe has a function get_config"),
    "no_return": (
        "def get_config():\n    pass\n",
        "--config=.*no_return.py: its get_config returns no configuration",
    ),
}


def cases(folder: Path) -> list[tuple[list[str], str]]:
    """Arguments, and the pattern of the one line that they should give."""
    tiny_flags, run = flags(folder), f"--workdir={folder / 'run'}"
    new, recipe = f"--workdir={folder / 'new'}", "--config=configs/tiny.py"
    generate = ["generate", run, "--prompt=a"]
    analyze = ["analyze", run, f"--out={folder / 'new'}"]
    return [
        ([], "give one command of train, evaluate, analyze, curves, generate, lm_eval"),
        (["fly"], "give one command of train, .*, not 'fly'"),
        (["trian", recipe], "give one command .*, not 'trian'; did you mean train?"),
        (["train", "now", recipe], "'now' is too much: this command takes flags only"),
        (["train"], "no --config was given: write --config=tiny"),
        (["data", "prepare"], "no --config was given"),
        (["data"], "write data followed by one of prepare, verify, batch, benchmarks$"),
        (["data", "prep"], "write data followed .*, not data prep; did you mean prepare[?]$"),
        (["compile", recipe], "no --topology was given: write --topology="),
        (["train", recipe], "no --workdir was given: write --workdir=runs/NAME"),
        (["evaluate"], "no --workdir was given"),
        (
            ["train", "--config=own/no.py", new],
            "--config=own/no.py: there is no such file, and",
        ),
        (
            ["train", "--config=configs/tny.py", new],
            "configs/tny.py: .*; did you mean tiny",
        ),
        (["train", "--config", "no.py", "--config.seed=1"], "--config=no.py: there is no such"),
        (["train", "--config=README.md", new], "--config cannot be read: .*README.md"),
        *(
            (["train", f"--config={folder}/{name}.py", new], said)
            for name, (_, said) in OWN.items()
        ),
        (["train", "--config", f"{folder}/misnamed.py"], OWN["misnamed"][1]),
        (["train", recipe + ":dense", new], "no variant 'dense' .* write :moepp or :moe"),
        (["train", recipe, "--config.moe.tua=1", new], "unknown field config.moe.tua = 1: did you"),
        (["train", recipe, "--config.moe.lr=1", new], "unknown field .*lr = 1: .* mean optim.lr"),
        (
            ["train", recipe, "--config.tau=1", new],
            "unknown field config.tau = 1: .* mean moe.rule.tau",
        ),
        (["train", recipe, f"--config.seed={2**32}", new], "config.seed = 4294967296 must be .*2"),
        (
            ["evaluate", run, "--config.moe.rule.tau=1"],
            f"--config.moe.rule.tau changes .* given: write --config=run:{folder}/run for",
        ),
        (
            ["train", *run.split("="), "--config.seed=1"],
            f"--config.seed changes a field of a recipe.* write --config=run:{folder}/run for",
        ),
        (["train", "--config.seed=1"], "--config.seed changes .* --config=run:WORKDIR for"),
        (["train", recipe, "--config.mo.tau=1", new], ".*there is no group of fields 'mo'"),
        (
            ["train", recipe, "--config.trian.steps=1", new],
            "--config.trian.steps: .* 'trian'; did you mean --config.train.steps[?]$",
        ),
        (
            ["train", recipe, "--config.data.sources.own.path=x", new],
            "--config.data.sources.own.path: the recipe has no source 'own'; .* recipe of your own",
        ),
        (
            ["train", recipe, "--config.moe.rule.tau=x", new],
            "flag --config.moe.rule.tau=x: must be a number$",
        ),
        (
            ["train", recipe, "--config.moe.rule.top_k=1.5", new],
            "flag --config.moe.rule.top_k=1.5: must be an integer, in digits alone$",
        ),
        (
            ["train", recipe, "--config.model.tied_embeddings=maybe", new],
            "flag --config.model.tied_embeddings=maybe: must be true or false$",
        ),
        (["train", recipe, "--config.model.dtype=float16", new], "dtype = 'float16' is for eval"),
        (
            ["train", recipe, "--config.moe.rule.tau=2", new],
            "config.moe.rule.tau = 2.0 must be greater than",
        ),
        (["train", recipe, "--workdr=x"], "there is no flag --workdr; did you mean --workdir[?]$"),
        (["train", recipe, "--init-frm=x"], ".* --init-frm; did you mean --init_from[?]$"),
        (["train", recipe, "--lr=1e-3", new], ".* --lr; did you mean --config.optim.lr[?]$"),
        (["train", recipe, "--zebra=1", new], "no flag --zebra; --help lists those that there are"),
        (
            ["train", "--workdir", "--config.seed=1", recipe],
            "--workdir lacks its value, and --config.seed=1 follows: write --workdir=VALUE",
        ),
        (["train", "--config", new], "--config lacks its value, and --workdir=.*new follows: "),
        (
            ["train", recipe, "--config.data.dir", new],
            "--config.data.dir lacks its value, and --workdir=.* follows: ",
        ),
        (
            ["train", recipe, "--config.seed", new],
            "--config.seed lacks its value, and --workdir=.* follows: ",
        ),
        (
            ["train", *tiny_flags, "--config.mesh.data=3", new],
            "config.mesh: data=3 x fsdp=1 x expert=1 does not multiply to the 1 devices",
        ),
        (
            ["train", *tiny_flags, "--config.mesh.fsdp=-1", new],
            "config.mesh: data=-1 x fsdp=-1 x expert=1 leaves more than one axis open",
        ),
        (
            ["train", *tiny_flags, "--config.data.sources.text.path=/nowhere", new],
            "config.data.sources.text.path = '/nowhere' does not exist",
        ),
        (
            ["train", *tiny_flags, "--config.moe.rule.tau=0.5", run],
            r"workdir .*run holds a run of another configuration:\n"
            r"  config.moe.rule.tau: 0.75 there, 0.5 now\nGive another --workdir, or the old value",
        ),
        (
            ["train", *tiny_flags, "--init_optimizer", new],
            "--init_optimizer takes along .* give --i",
        ),
        (
            ["train", *tiny_flags, "--init_from=", new],
            "--init_from= is empty: give --init_from=WOR",
        ),
        (
            ["train", f"--config={folder}/run", new],
            f"--config={folder}/run is the folder of a run: write --config=run:{folder}/run$",
        ),
        (
            ["train", recipe, "--config.data=x", new],
            "--config.data=x: it is a group of fields: write --config.data.FIELD=VALUE$",
        ),
        (["convert"], "write convert from-hf PATH WORKDIR, .* or convert upcycle PATH WORKDIR$"),
        (["convert", "fly"], "write convert from-hf .*, not convert fly$"),
        (["convert", "upclcye"], "write .*, not convert upclcye; did you mean upcycle[?]$"),
        (
            ["convert", "to-hf", f"{folder}/no", f"{folder}/run"],
            f"{folder}/no holds no run, and {folder}/run is one: write convert to-hf {folder}/run",
        ),
        (["convert", "to-hf", f"{folder}/no", f"{folder}/none"], "workdir .*no is no folder: "),
        (
            ["convert", "upcycle", f"{folder}/run", f"{folder}/new"],
            f"{folder}/run is a run already, no checkpoint of others: ",
        ),
        (["convert", "from-hf", f"{folder}/run", f"{folder}/new"], ".* is a run already, no check"),
        (["convert", "from-hf", f"{folder}/no", f"{folder}/new"], ".*no is no folder: give that"),
        (["train", *tiny_flags, "--init_from=no@3", new], "--init_from=no@3: workdir no is no fol"),
        (
            ["train", *tiny_flags, f"--init_from={folder}/run@4", new],
            "checkpoint 4 .*; steps that may be used instead: 3",
        ),
        (
            ["train", *tiny_flags, f"--init_from={folder}/run", "--config.moe.rule.top_k=1", new],
            r"another model, .* else:\n  config.moe.rule.top_k: 2 there, 1 here\nGive its values; ",
        ),
        (["train", f"--init_from={folder}/run", run], "is the --workdir of the run itself: give a"),
        (
            ["train", f"--init_from={folder}/other", run],
            "holds a run that was not started from another one, so --init_from=.*other cannot be",
        ),
        (
            ["train", *tiny_flags, "--config.train.steps=5", run],
            r"another configuration:\n  config.train.steps: 6 there, 5 now\nGive .* may only grow",
        ),
        (
            ["evaluate", run, *tiny_flags, "--config.train.steps=7"],
            r"another configuration:\n  config.train.steps: 6 there, 7 now\nGive .* or the old val",
        ),
        (["train", *tiny_flags, "--workdir=ftp://a/b"], "ftp://a/b: ftp:// is no known storage"),
        (["train", *tiny_flags, "--profile=9", new], "--profile=9 must be START:STOP, whole num"),
        (["train", *tiny_flags, "--distributed=no", new], "--distributed=no must be one of auto"),
        (
            ["train", *tiny_flags, "--coordinator=a:1", new],
            "--coordinator=a:1 needs --num_processes, --process_id too",
        ),
        (
            ["train", *tiny_flags, "--distributed=off", "--process_id=0", new],
            "--distributed=off contradicts --process_id=0",
        ),
        (["train", *tiny_flags, "--distributed=on", new], "--distributed=on: JAX cannot join .*"),
        (["train", *tiny_flags, "--workdir=/proc/x"], "workdir /proc/x cannot be written: "),
        (["evaluate", f"--workdir={folder}/file"], "workdir .*file is a file: give --workdir the"),
        (
            ["evaluate", f"--workdir={folder}/cut", "--strict"],
            "checkpoint 3 in .* cannot be verified: it has no checksums.json; without --strict it",
        ),
        (["generate", f"--workdir={folder}/mute", "--prompt=a"], ".*tokenizer.model is missing: "),
        (
            ["evaluate", new],
            "workdir .*new is no folder: .*train --config=RECIPE --workdir=.*new. makes",
        ),
        (
            ["evaluate", f"--workdir={folder}"],
            "workdir .* holds no run, as it has no config.json: ",
        ),
        (["train", str(folder / "no_key.py"), new], ".* too much: .*; did you mean --config=.*key"),
        (["train", "tiny", new], "'tiny' is too much: .*; did you mean --config=tiny[?]$"),
        (["evaluate", run, f"--json={folder}/no/x.json"], "--json=.*/no/x.json: there is no such"),
        (
            ["evaluate", run, *tiny_flags, f"--config.data.dir={folder}/elsewhere"],
            "the data that the run .*/run began with is not there: there is no .*--init_from=",
        ),
        (["analyze", "--redraw"], "--redraw of what. Write --out=FOLDER"),
        ([*analyze, "--out=gs://a/b"], "--out=gs://a/b is in a bucket: name a folder"),
        ([*analyze, "--text="], "--text=.: name a file of text"),
        ([*analyze, "--suite=paper", "--benchmarks=hub"], "--benchmarks=hub: analyze reads items"),
        (["analyze", f"--out={folder}/no", "--redraw"], "there is no .*/no/routing.parquet"),
        ([*analyze, "--tokens=0"], "--tokens=0 must be at least 1"),
        ([*analyze, "--source=wiki"], "--source=wiki: the run has the sources text"),
        ([*analyze, f"--text={folder}/no.txt"], "--text=.*no.txt cannot be read: No such file"),
        ([*analyze, f"--text={folder}/file"], "--text=.*file is empty: there is no token"),
        ([*analyze, "--suite=paper", "--benchmarks=no"], "--benchmarks=no has no files of sciq"),
        ([*analyze, f"--against={folder}/no"], "--against=.*no: workdir .*no is no folder"),
        ([*analyze, "--page_tokens=0"], "flag --page_tokens=0: .*"),
        ([*analyze, f"--workdir={folder}/mute"], ".*tokenizer.model is missing: put the token"),
        (["analyze", "--workdir=memory://x", "--config=configs/tiny.py"], "memory:// is no known"),
        (["generate", run], "no --prompt was given: write --prompt='some text'"),
        ([*generate, "--step=4"], "checkpoint 4 .*; steps that may be used instead: 3"),
        ([*generate, "--temperature=-1"], "config.generate.temperature = -1.0 must be at least 0"),
        ([*generate, "--top_p=0"], "config.generate.top_p = 0.0 must be greater than 0 and at"),
        ([*generate, "--top_k=-1"], "config.generate.top_k = -1 must be at least 0"),
        ([*generate, "--max_new_tokens=0"], "config.generate.max_new_tokens = 0 must be at least"),
        ([*generate, "--num_samples=0"], "num_samples = 0 must be at least 1"),
        ([*generate, "--stop="], "stop = '' must be a text of at least one character"),
        (["generate", run, f"--prompts_file={folder}/file"], "--prompts_file=.* holds no prompt"),
        (["generate", run, "--prompts_file=no.txt"], "--prompts_file=no.txt cannot be read: .*No"),
        ([*generate, "--top_k=few"], "flag --top_k=few: must be an integer"),
    ]


def test_a_device_that_is_too_small_is_told_with_what_needs_less(monkeypatch):
    def main(argv):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(sys, "argv", ["main"])
    monkeypatch.setattr(signal, "signal", lambda *handler: None)
    with pytest.raises(SystemExit, match=r"too small: RES.* 9 bytes.\nLess .*--all_devices"):
        cli.run(main)


def spoil(folder: Path) -> None:
    """A file, and copies of the run with something wrong in each."""
    (folder / "file").write_text("\n")
    for name, (recipe, _) in OWN.items():
        (folder / f"{name}.py").write_text(recipe)
    for name in ("cut", "mute"):
        shutil.copytree(folder / "run", folder / name)
    (folder / "cut" / "checkpoints" / "3" / "checksums.json").unlink()
    (folder / "mute" / "tokenizer.model").unlink()


@pytest.mark.parametrize("words", (["generate", "--help"], ["help", "generate"]), ids=" ".join)
def test_help_is_of_the_command_and_no_error(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["main", *words])
    monkeypatch.setattr(signal, "signal", lambda *handler: None)  # pytest's own handler stays
    monkeypatch.setattr(main.beginning, "begin", lambda: None)
    with pytest.raises(SystemExit) as end:
        main.main()
    assert not end.value.code
    said = capsys.readouterr()
    assert not said.err
    for flag in ("--workdir", "--prompt", "--temperature"):
        assert f"  {flag}: " in said.out
    assert (
        "moepp_jax.commands" not in said.out
        and "--topology" not in said.out
        and "--pdb" not in said.out
    )


def test_every_error_is_one_line_and_leaves_nothing(run_folder, folder):
    spoil(folder)
    listed = cases(folder)
    said = folder / "said"
    said.mkdir()
    forks = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS, said],
        cwd=ROOT,
        env=ENVIRONMENT,
        input=json.dumps([*(arguments for arguments, _ in listed), ["^C"]]),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert forks.returncode == 0, forks.stderr
    for number, (arguments, pattern) in enumerate(listed):
        error = (said / str(number)).read_text()
        assert re.fullmatch(rf"error: .*?{pattern}.*\n", error), (arguments, error)
    assert forks.stdout.split() == ["1"] * len(listed) + ["130"]
    assert (said / str(len(listed))).read_text() == "\ninterrupted\n"
    assert not (folder / "new").exists() and not (folder / "elsewhere").exists()


@pytest.mark.parametrize(
    "file, raised, level, said",
    [
        (f"{orbax.__path__[0]}/_src/multihost/multihost.py", True, "ERROR", False),
        (f"{orbax.__path__[0]}/_src/metadata/checkpoint.py", False, "WARNING", False),
        (f"{orbax.__path__[0]}/_src/serialization/ocdbt_utils.py", False, "WARNING", False),
        (f"{orbax.__path__[0]}/checkpoint_manager.py", False, "WARNING", True),
        (str(ROOT / "moepp_jax" / "checkpoint.py"), True, "ERROR", True),
        ("/home/me/metadata/mine.py", False, "WARNING", True),
    ],
)
def test_of_orbax_what_an_error_says_already_is_not_logged(file, raised, level, said):
    error = (OSError, OSError("full"), None) if raised else None
    record = logging.LogRecord("absl", getattr(logging, level), file, 1, "a line", (), error)
    assert cli._but_of_orbax(record) == said
