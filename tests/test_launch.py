"""What is launched: every command line written in launch/ and in the guide, and the image."""

import itertools
import json
import re
import shlex
import subprocess
import sys

import pytest

from moepp_jax import main
from tests.launching import (
    MAIN,
    MANIFESTS,
    ROOT,
    SHELL,
    Stage,
    container,
    devices,
    sbatch,
    slurm_command,
    succeed,
    tpu_vm_command,
    xpk_command,
)

GUIDE = ROOT / "docs" / "PODS.md"
_COMMAND = "|".join(main.COMMANDS)


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


PARSE = """
import json, os, sys
from absl import flags
from moepp_jax import distributed, main, mesh, profiling, recipes
from moepp_jax.commands import compile
from moepp_jax.config import Config
from moepp_jax.compile.topology import Topology

for name in main.COMMANDS:
    main.load(name)

def found(word):
    before, given, named = word.partition("--config=")
    return given + recipes.with_file(named) if given and not before else word

def check(arguments, devices):
    arguments = [found(word) for word in arguments]
    sys.argv = ["main", *arguments]  # where the flag of a recipe looks for those of its fields
    _, command, *_ = flags.FLAGS(sys.argv)
    assert command in main.COMMANDS, f"{command} is no command"
    given = flags.FLAGS
    processes = given.coordinator, given.num_processes, given.process_id
    distributed.settings({}, given.distributed, *processes)
    if given.profile is not None:
        {"train": profiling.parse, "compile": compile.profiled}[command](given.profile)
    if given.topology is not None:
        devices = Topology.parse(given.topology).num_devices
    if given.config is not None:
        config = Config.parse(given.config)
        if devices:
            mesh.mesh_shape(config, devices)

for arguments, devices in json.load(sys.stdin):
    if not os.fork():
        try:
            check(arguments, devices)
        except BaseException as error:
            print(f"{' '.join(arguments)} on {devices}: {error!r}", flush=True)
        os._exit(0)
    os.wait()
"""


def errors_of(commands: list[tuple[list[str], int | None]]) -> list[str]:
    """What the command line says of arguments and the number of devices they are for."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PARSE],
        cwd=ROOT,
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def in_guide() -> list[tuple[list[str], int | None]]:
    text = re.sub(r"\\\n\s*", "", GUIDE.read_text())
    found = []
    for line in re.findall(rf"\bmoepp ((?:{_COMMAND})\b[^`\n]*)", text):
        found.append((shlex.split(line, comments=True), None))
    for line in re.findall(r"launch/(?:\w+\.sh run|slurm_gpu\.sh) (--[^`\n]+)", text):
        recipe = ["train", "--config=moepp_7b", "--workdir=x"]
        found.append((recipe + shlex.split(line, comments=True), None))
    return found


def launched(stage, tmp_path) -> dict[str, tuple[list[str], int]]:
    """Training commands by the file that launches them, with the devices that it asks for."""
    asked = sbatch()
    return {
        "tpu_vm.sh": (tpu_vm_command(stage), 64),
        "tpu_vm.sh, 4 slices": (tpu_vm_command(stage, SLICES="4"), 256),
        "xpk.sh": (xpk_command(stage, SLICES="2"), 128),
        "slurm_gpu.sh": (
            slurm_command(stage, tmp_path),
            int(asked["nodes"]) * int(asked["gpus-per-node"]),
        ),
    } | {file.name: (container(file)["args"], devices(file)) for file in MANIFESTS}


def test_every_command_line_is_one(stage, tmp_path):
    commands = launched(stage, tmp_path)
    assert len(in_guide()) > 5 and len(commands) == 7
    assert errors_of([*commands.values(), *in_guide()]) == []
    broken = [["train", "--config=moepp_7b", flag] for flag in ("--profil=1:2", "--x=1")]
    broken += [["train", "--config=moepp_7b", "--config.mesh.fdsp=1"], ["fly"]]
    broken += [["train", "--distributed=yes"], ["train", "--profile=3:2"]]
    broken += [["train", "--profile"], ["compile", "--profile=3:5"]]
    sizes = ["train", "--config=moepp_7b", "--config.mesh.data=3"]
    assert len(errors_of([*((one, None) for one in broken), (sizes, 64)])) == 9


def test_all_launch_the_same_run(stage, tmp_path):
    place = (
        "--workdir=",
        "--config.data.sources.text.path=",
        "--config.data.dir=",
        "--config.mesh.",
    )
    for name, (arguments, _) in launched(stage, tmp_path).items():
        rest = [argument for argument in arguments if not argument.startswith(place)]
        # A card has less memory than the chips of the recipe; those are in pods that come back.
        own = ["--config.model.remat=exchanged"] if "gpu" in name else []
        own += ["--config.train.local_dir=/local"] * name.startswith("jobset_v5p")
        assert rest == ["train", "--config=moepp_7b", "--distributed=on", *own], name
        assert len(arguments) - len(rest) == 6


# The image and the guide


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def test_the_image_runs_the_command_line_and_not_as_root():
    told = dict(instructions())
    assert json.loads(told["ENTRYPOINT"]) == MAIN
    assert told["USER"] == "${RUN_AS}" and ("ARG", "RUN_AS=1000") in instructions()
    assert told["FROM"].startswith("python:3.11-")


def test_the_image_has_what_it_copies():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    for copied in (text for name, text in instructions() if name == "COPY"):
        for source in copied.split()[:-1]:
            assert f"!{source}" in ignored, source
            assert list(ROOT.glob(source)), source


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_the_image_installs_what_is_pinned_by_hash(platform, stage):
    (install,) = [text for name, text in instructions() if name == "RUN" and "pip" in text]
    calls = succeed(stage, "sh", "-c", install, PLATFORM=platform)
    files = [
        [after for before, after in itertools.pairwise(call) if before == "-r"] for call in calls
    ]
    extra = [] if platform == "cpu" else [f"requirements/image/{platform}.txt"]
    assert files == [["requirements/image/build.txt"], ["requirements/image/cpu.txt", *extra]]
    assert all("--require-hashes" in call for call in calls)
    assert "--no-build-isolation" in calls[1]  # which would fetch what is not pinned
    wrong = stage.run("sh", "-c", install, PLATFORM="gpu")
    assert wrong.returncode == 1 and "PLATFORM=gpu must be cpu, tpu or cuda" in wrong.stderr


def test_requirements_agree():
    """pip installs several of these files at once."""
    versions = {}
    for file in [ROOT / "requirements.txt", *sorted(ROOT.glob("requirements/*.txt"))]:
        for line in file.read_text().splitlines():
            name, _, version = line.partition("==")
            name = re.sub(r"\[.*\]", "", name).lower().replace("_", "-")
            assert versions.setdefault(name, version) == version, (file.name, line)


def test_files_that_the_guide_names_are_there():
    named = re.findall(r"\b(?:launch|docs|configs)/[\w./]+\w", GUIDE.read_text())
    assert {f"launch/{file.name}" for file in SHELL + MANIFESTS} <= set(named)
    assert [name for name in named if not (ROOT / name).exists()] == []
