"""The shell files of launch/, run with stand-ins for gcloud, xpk, docker and SLURM."""

import os
import subprocess

import pytest

from moepp_jax.watch import STATUS
from tests.launching import (
    EVERYWHERE,
    PLACE,
    SETTINGS,
    SHELL,
    SHELLCHECK,
    Stage,
    on_hosts,
    sbatch,
    slurm,
    slurm_command,
    succeed,
    tpu_vm_command,
    xpk_command,
)


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


@pytest.mark.parametrize("file", SHELL, ids=lambda file: file.name)
def test_shell_files_are_sound(file):
    text = file.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert os.access(file, os.X_OK)
    for check in (["bash", "-n"], SHELLCHECK):
        done = subprocess.run([*check, file], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", ["tpu_vm.sh", "xpk.sh"])
def test_what_is_missing_is_named_before_anything_is_done(script, stage):
    for name in SETTINGS:
        settings = SETTINGS | {name: ""}
        done = stage.run(f"launch/{script}", "run", **settings)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {name} is not set: write {name}=")
        assert f"usage: launch/{script}" in done.stderr
    for arguments in ([], ["fly"]):
        done = stage.run(f"launch/{script}", *arguments, **SETTINGS)
        assert done.returncode == 2 and "error: give one of" in done.stderr
    assert f"usage: launch/{script}" in stage.run(f"launch/{script}", "--help").stdout
    assert stage.calls == []


def test_tpu_vms_are_asked_for_and_given_back(stage):
    def gcloud(verb, **settings):
        (call,) = succeed(stage, "launch/tpu_vm.sh", verb, **(SETTINGS | settings))
        assert call[:4] == ["gcloud", "compute", "tpus", "queued-resources"]
        return call[4:]

    common = ["--runtime-version=v2-alpha-tpuv5"]
    common += ["--scopes=https://www.googleapis.com/auth/cloud-platform"]
    one = ["create", "moepp-7b", *PLACE, "--node-id=moepp-7b", "--accelerator-type=v5p-128"]
    assert gcloud("create") == one + common
    two = ["create", "x", *PLACE, "--node-count=2", "--node-prefix=x", "--accelerator-type=v5p-64"]
    settings = {"SLICES": "2", "NAME": "x", "TPU_TYPE": "v5p-64", "CAPACITY": "--spot"}
    assert gcloud("create", **settings) == [*two, *common, "--spot"]
    assert gcloud("status") == ["describe", "moepp-7b", *PLACE, "--format=value(state.state)"]
    assert gcloud("delete") == ["delete", "moepp-7b", *PLACE, "--force"]
    stop = "--command=sudo docker stop moepp"
    assert gcloud("stop") == ["ssh", "moepp-7b", *PLACE, *EVERYWHERE, stop]
    logs = ["--node=0", "--worker=0", "--command=sudo docker logs --follow --tail=100 moepp"]
    assert gcloud("logs") == ["ssh", "moepp-7b", *PLACE, *logs]


def test_tpu_hosts_get_bucket_and_image(stage):
    calls = on_hosts(stage, "install")
    assert ["sudo", "docker", "pull", "--quiet", "r.dev/x/moepp:tpu"] in calls
    assert ["sudo", "gcloud", "auth", "configure-docker", "r.dev", "--quiet"] in calls
    mount = ["gcsfuse", "-o", "ro", "-o", "allow_other", "--implicit-dirs", "my bucket"]
    assert ["sudo", *mount, "/mnt/moepp"] in calls


def test_xpk_is_called_as_it_asks(stage):
    def xpk(verb, **settings):
        (call,) = succeed(stage, "launch/xpk.sh", verb, **(SETTINGS | settings))
        return call[1:]

    place = [*PLACE, "--cluster=moepp"]
    tpus = ["--tpu-type=v5p-128", "--num-slices=1"]
    assert xpk("cluster") == ["cluster", "create", *place, *tpus, "--on-demand"]
    assert xpk("cluster", CAPACITY="--reservation=r")[-1] == "--reservation=r"
    assert "--bucket=my bucket" in xpk("storage")
    assert xpk("list") == ["workload", "list", *place]
    assert xpk("stop") == ["workload", "delete", *place, "--workload=moepp-7b"]
    assert xpk("delete") == ["cluster", "delete", *place]


@pytest.mark.parametrize("status", [0, 1, 75, 137, 143])
def test_slurm_requeues_what_was_saved_or_hangs_and_nothing_else(status, stage, tmp_path):
    done = slurm(stage, tmp_path, STATUS_srun=str(status))
    assert done.returncode == status
    assert stage.calls[0][:3] == ["srun", "--kill-on-bad-exit=0", "--gpu-bind=none"]
    asked = [call for call in stage.calls if call[0] == "scontrol"]
    assert asked == ([["scontrol", "requeue", "7"]] if status in (75, 143) else [])


def test_slurm_requeues_what_hangs_in_each_start_only_so_often(stage, tmp_path):
    for count, asked in ((19, 1), (20, 0)):
        before = len(stage.calls)
        slurm(stage, tmp_path, STATUS_srun=str(STATUS), SLURM_RESTART_COUNT=str(count))
        assert len([c for c in stage.calls[before:] if c[0] == "scontrol"]) == asked


def test_slurm_errors_are_told(stage, tmp_path):
    refused = slurm(stage, tmp_path, STATUS_srun="143", STATUS_scontrol="1")
    assert refused.returncode == 143 and "not requeued here (status 143)" in refused.stderr
    for change, said in [
        ({"SHARED": ""}, "error: SHARED is not set"),
        ({"SLURM_JOB_ID": ""}, "error: this is a job script: sbatch launch/slurm_gpu.sh"),
        ({"VENV": "/nowhere"}, "error: there is no /nowhere/bin/python"),
    ]:
        done = slurm(stage, tmp_path, **change)
        assert done.returncode == 2 and done.stderr.startswith(said)


def test_slurm_gives_each_gpu_a_process_and_each_process_a_warning():
    asked = sbatch()
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert asked["signal"] == "TERM@120" and "requeue" in asked
    assert asked["open-mode"] == "append"  # a requeued job goes on in its log


def test_flags_of_the_user_reach_the_command(stage, tmp_path):
    flags = ["--profile=10:13", "--config.data.sources.text.path=/my 'own' $text"]
    assert tpu_vm_command(stage, *flags)[-2:] == flags
    assert xpk_command(stage, *flags)[-2:] == flags
    assert slurm_command(stage, tmp_path, *flags)[-2:] == flags
