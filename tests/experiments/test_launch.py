"""launch/sweeps: a run to each job, with stand-ins for SLURM and by the fields of the APIs."""

import re
import shlex
import subprocess
import time

import pytest

from moepp_jax.experiments import run
from moepp_jax.experiments import scale as scales
from tests import manifests
from tests.launching import LAUNCH, SHELLCHECK, Stage

SLURM, JOBSET = LAUNCH / "sweeps" / "slurm.sh", LAUNCH / "sweeps" / "jobset.yaml"
TASK = {"SHARED": "/s", "SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}


def runs_of(words):
    """How many runs an experiment has at a scale, and those that are chosen."""
    names = [word for word in words if not word.startswith("--")]
    flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--"))
    scale = scales.find(flags.get("scale", "tiny"))
    planned = run.plan(run.experiments(names, scale), scale)
    return planned, run.chosen(planned, flags.get("only"))


@pytest.fixture
def python(tmp_path):
    """A stand-in for Python, which writes down its arguments, and lives until SIGTERM if asked."""
    file = tmp_path / "venv" / "bin" / "python"
    file.parent.mkdir(parents=True)
    said = tmp_path / "said"
    file.write_text(
        "#!/usr/bin/env bash\n"
        'trap "echo saved >> ' + str(said) + '; exit 143" TERM\n'
        f'printf "%s\\n" "$@" > {said}.new; mv {said}.new {said}\n'
        '[[ -z "${LIVE:-}" ]] || while true; do sleep 0.05; done\n'
        "exit ${STATUS_python:-0}\n"
    )
    file.chmod(0o755)
    return tmp_path / "venv", said


def slurm(tmp_path, venv, **settings):
    stage = Stage(tmp_path / "stage")
    for name in ("mv", "sleep", "env"):  # of the stand-in
        (tmp_path / "stage" / "bin" / name).symlink_to(f"/usr/bin/{name}")
    settings = TASK | {"VENV": str(venv)} | settings
    return stage, stage.run(str(SLURM), "tau", "--scale=small", **settings)


def test_the_script_is_sound():
    for check in (["bash", "-n"], SHELLCHECK):
        done = subprocess.run([*check, SLURM], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_task_of_the_array_has_the_run_of_its_number(tmp_path, python):
    venv, said = python
    stage, done = slurm(tmp_path, venv)
    assert done.returncode == 0, done.stderr
    words = said.read_text().split()
    assert words[:2] == ["-m", "experiments.run"] and words[-1] == "--workdir=/s/experiments"
    planned, (chosen,) = runs_of(words[2:-1])
    assert chosen == planned[3]
    assert stage.calls == []


@pytest.mark.parametrize("status", [0, 1, 143])
def test_a_task_that_was_stopped_is_asked_for_again(tmp_path, python, status):
    stage, done = slurm(tmp_path, python[0], STATUS_python=str(status))
    assert done.returncode == status
    assert stage.calls == ([["scontrol", "requeue", "7_3"]] if status == 143 else [])


def test_sigterm_reaches_the_run(tmp_path, python):
    venv, said = python
    Stage(tmp_path / "stage")
    path = f"{tmp_path / 'stage' / 'bin'}:/usr/bin:/bin"
    env = TASK | {"VENV": str(venv), "LIVE": "1", "PATH": path}
    process = subprocess.Popen([str(SLURM), "tau"], env=env, stderr=subprocess.PIPE)
    while not said.exists():
        time.sleep(0.05)
    time.sleep(0.3)  # the script goes on to wait for it
    process.terminate()
    assert process.wait(20) == 143
    assert said.read_text().splitlines()[-1] == "saved"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"SHARED": ""}, "error: SHARED is not set"),
        ({"SLURM_ARRAY_TASK_ID": ""}, "error: this is a job array's script: sbatch --array"),
        ({"VENV": "/nowhere"}, "error: there is no /nowhere/bin/python"),
    ],
)
def test_what_is_missing_is_told(tmp_path, python, change, said):
    _, done = slurm(tmp_path, python[0], **change)
    assert done.returncode == 2 and done.stderr.startswith(said)


def test_the_numbers_in_the_comments_are_those_of_the_experiment():
    for file in (SLURM, JOBSET):
        found = re.search(r"moepp experiments (.*) --list +# .*: (\d+)", file.read_text())
        assert len(runs_of(shlex.split(found[1]))[0]) == int(found[2])
    last = int(found[2]) - 1
    assert f"--array=0-{last} " in SLURM.read_text()


def test_each_pod_has_a_run():
    manifest = manifests.load_file(JOBSET)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "experiments.run"]
    assert spec["completionMode"] == "Indexed"
    only = "--only=$(JOB_COMPLETION_INDEX)"
    assert only in container["args"]
    rest = [word for word in container["args"] if word != only]
    assert spec["completions"] == len(runs_of(rest)[0]) >= spec["parallelism"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert {w for w in rest if "/shared/" in w} == {
        "--workdir=/shared/experiments",
        "--results=/shared/results",
    }
