"""Running the files of launch/ without a cloud, and reading what they ask for."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tests import manifests

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SHELL = sorted(LAUNCH.glob("*.sh"))
MANIFESTS = sorted(LAUNCH.glob("*.yaml"))
SHELLCHECK = [str(Path(sys.executable).with_name("shellcheck")), "--norc", "--severity=style"]
SETTINGS = {"PROJECT": "p", "ZONE": "z", "BUCKET": "my bucket", "IMAGE": "r.dev/x/moepp:tpu"}
MAIN = ["python", "-m", "moepp_jax.main"]
PLACE = ["--project=p", "--zone=z"]
EVERYWHERE = ["--node=all", "--worker=all"]

_REAL = ("bash", "sh", "cat")
_STANDS_IN = (
    "gcloud",
    "xpk",
    "srun",
    "scontrol",
    "sudo",
    "mountpoint",
    "curl",
    "lsb_release",
    "pip",
)


class Stage:
    """A PATH with nothing on it but a shell and stand-ins, which write down how they are called.

    A stand-in ends with the status in the variable STATUS_name, or 0.
    """

    def __init__(self, folder: Path):
        self._log = folder / "calls"
        self._bin = folder / "bin"
        self._bin.mkdir(parents=True)
        for name in _REAL:
            (self._bin / name).symlink_to(shutil.which(name))
        for name in _STANDS_IN:
            program = self._bin / name
            program.write_text(
                f"#!{sys.executable} -IS\n"
                "import json, os, sys\n"
                "sys.stdin.read()\n"
                f"call = [{name!r}, *sys.argv[1:]]\n"
                f"open({str(self._log)!r}, 'a').write(json.dumps(call) + '\\n')\n"
                f"sys.exit(int(os.environ.get('STATUS_{name}', 0)))\n"
            )
            program.chmod(0o755)

    def run(self, *command: str, **settings: str) -> subprocess.CompletedProcess:
        """Runs a command in the project's folder, with no other variables than these."""
        environment = settings | {"PATH": str(self._bin)}
        program = shutil.which(command[0], path=self._bin) or ROOT / command[0]
        return subprocess.run(
            [program, *command[1:]],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    @property
    def calls(self) -> list[list[str]]:
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return [json.loads(line) for line in lines]


def succeed(stage: Stage, *command: str, **settings: str) -> list[list[str]]:
    """What was called by a command that succeeded."""
    before = len(stage.calls)
    done = stage.run(*command, **settings)
    assert done.returncode == 0, done.stderr
    return stage.calls[before:]


def on_hosts(stage: Stage, *arguments: str, **settings: str) -> list[list[str]]:
    """What tpu_vm.sh has every host do: checked, and done by a shell as theirs."""
    (call,) = succeed(stage, "launch/tpu_vm.sh", *arguments, **(SETTINGS | settings))
    assert call[:5] == ["gcloud", "compute", "tpus", "queued-resources", "ssh"]
    assert call[5:-1] == ["moepp-7b", *PLACE, *EVERYWHERE]
    script = call[-1].removeprefix("--command=")
    check = [*SHELLCHECK, "--shell=bash", "-"]
    checked = subprocess.run(check, input=script, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    return succeed(stage, "bash", "-c", script, STATUS_mountpoint="1")


def tpu_vm_command(stage: Stage, *flags: str, **settings: str) -> list[str]:
    """The arguments of moepp_jax.main in launch/tpu_vm.sh, as of those below in the others."""
    prune, run = on_hosts(stage, "run", *flags, **settings)
    assert prune == ["sudo", "docker", "container", "prune", "--force"]
    image = run.index(SETTINGS["IMAGE"])
    assert run[:3] == ["sudo", "docker", "run"]
    assert {"--detach", "--privileged", "--net=host", "--restart=on-failure:20"} < set(run[:image])
    return run[image + 1 :]


def xpk_command(stage: Stage, *flags: str, **settings: str) -> list[str]:
    (call,) = succeed(stage, "launch/xpk.sh", "run", *flags, **(SETTINGS | settings))
    assert call[:4] == ["xpk", "workload", "create", "--project=p"]
    assert "--docker-image=r.dev/x/moepp:tpu" in call and "--restart-on-user-code-failure" in call
    command = shlex.split(call[-1].removeprefix("--command="))
    assert command[:3] == MAIN
    return command[3:]


def slurm(stage: Stage, tmp_path: Path, *flags: str, **settings: str):
    """Runs the job script as SLURM would."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.touch(mode=0o755)
    settings = {"SHARED": "/s", "SLURM_JOB_ID": "7", "VENV": str(tmp_path / "venv")} | settings
    return stage.run("launch/slurm_gpu.sh", *flags, **settings)


def slurm_command(stage: Stage, tmp_path: Path, *flags: str) -> list[str]:
    before = len(stage.calls)
    done = slurm(stage, tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    (call,) = stage.calls[before:]
    assert call[0] == "srun" and call[3].endswith("venv/bin/python") and call[4:6] == MAIN[1:]
    return call[6:]


def sbatch() -> dict[str, str]:
    """The options that the job script gives to sbatch."""
    lines = re.findall(r"^#SBATCH --(\S+)$", (LAUNCH / "slurm_gpu.sh").read_text(), re.MULTILINE)
    return dict(line.partition("=")[::2] for line in lines)


def job(file: Path) -> dict:
    """The only replicated job of a manifest."""
    (replicated,) = manifests.load_file(file)["spec"]["replicatedJobs"]
    return replicated


def container(file: Path) -> dict:
    (only,) = job(file)["template"]["spec"]["template"]["spec"]["containers"]
    return only


def devices(file: Path) -> int:
    """That all pods of a manifest ask for."""
    (count,) = container(file)["resources"]["limits"].values()
    return job(file)["replicas"] * job(file)["template"]["spec"]["parallelism"] * count
