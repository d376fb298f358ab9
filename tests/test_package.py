"""The package as it is installed: a wheel of all that the command needs, used elsewhere."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import moepp_jax
from tests import hurry

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that the wheel lies unpacked in; what it depends on is this environment's."""
    made = tmp_path_factory.mktemp("wheel")
    source = made / "source"
    kept = shutil.ignore_patterns("__pycache__", "results")
    for name in ("moepp_jax", "configs", "experiments", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=kept)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(made / done.stdout.split()[-1]) as wheel:
        wheel.extractall(made / "site")
    return made / "site"


def moepp(installed: Path, folder: Path, *arguments: str) -> str:
    """What the command prints in a folder that is not the repository."""
    done = subprocess.run(
        # A script on PATH has not the current folder among its modules, and so has -P.
        [sys.executable, "-P", "-c", "from moepp_jax.main import main; main()", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed), "XLA_FLAGS": hurry.XLA_FLAGS},
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


def test_the_wheel_holds_recipes_experiments_and_the_page(installed):
    assert {path.name for path in installed.iterdir()} == {
        "moepp_jax",
        f"moepp_jax-{moepp_jax.__version__}.dist-info",
    }
    for name in ("configs/routing/zeda.py", "experiments/studies/tau.py", "benchmarks/layer.py"):
        assert (installed / "moepp_jax" / name).is_file()
    assert (installed / "moepp_jax" / "analysis" / "page" / "page.html").is_file()
    assert not list(installed.rglob("*.csv")) and not (installed / "tests").exists()
    (scripts,) = installed.glob("*.dist-info/entry_points.txt")
    assert "moepp = moepp_jax.main:main" in scripts.read_text()


def test_it_runs_from_another_folder(installed, tmp_path):
    assert moepp(installed, tmp_path, "--version") == f"moepp_jax {moepp_jax.__version__}\n"
    said = moepp(installed, tmp_path, "recipes")
    assert "routing/zeda" in said and str(installed) in said.replace("\n", "")
    small = "num_layers=1 hidden_size=16 num_heads=1 num_kv_heads=1 vocab_size=300 dense_ffn_size=8"
    fields = [f"--config.model.{field}" for field in small.split()]
    fields += ["--config.moe.ffn_size=8", "--config.moe.group_size=32", "--config.data.seq_len=32"]
    (tmp_path / "text.txt").write_text("\n\n".join(f"the {n} bees fly home" for n in range(400)))
    fields += ["--config.data.sources.text.path=text.txt", "--config.train.steps=2"]
    fields += ["--config.train.batch_size=2", "--config.train.eval_batches=1"]
    said = moepp(installed, tmp_path, "train", "--config=tiny", *fields, "--workdir=runs/x")
    assert "step 2: held-out loss" in said, said
    said = moepp(installed, tmp_path, "generate", "--workdir=runs/x", "--prompt=the", "--seed=1")
    assert said.startswith("the") and "tokens/s" in said
    said = moepp(installed, tmp_path, "experiments", "tau", "--list", "--seeds=2")
    assert said.count("tau 0.25") == 2, said
    said = moepp(installed, tmp_path, "experiments", "reference")
    assert "error: the reference checkpoints are in tests/data of the repository" in said


def test_a_rule_in_the_current_folder_is_found(installed, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from moepp_jax.moe.rules import find\nclass Mine(find('vanilla')):\n    pass\n"
    )
    (tmp_path / "broken.py").write_text("def f(:\n")
    own = ["train", "--config=routing/vanilla", "--workdir=x", "--config.train.steps=0"]
    said = moepp(installed, tmp_path, *own, "--config.moe.rule.type=mine:Mine")
    assert said == "error: config.train.steps = 0 must be at least 1\n"
    said = moepp(installed, tmp_path, *own, "--config.moe.rule.type=broken:Mine")
    assert "type = 'broken:Mine' cannot be imported: SyntaxError: " in said
    assert said.count("\n") == 1


def test_help_waits_for_no_jax():
    asked = "import sys; sys.argv = ['moepp', '--help']; from moepp_jax.main import main; main()"
    asked += "; print({'jax', 'numpy', 'absl'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("moepp: ") and done.stdout.endswith("set()\n")


def imported(folder: Path) -> set[str]:
    """The packages that a folder's modules import, anywhere in them."""
    found = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.partition(".")[0])
    newer = {"compression"}  # Python's own from 3.14 on
    return found - set(sys.stdlib_module_names) - newer - {"moepp_jax", "__future__"}


def test_what_is_imported_is_declared_and_the_other_way_round():
    distributions = importlib.metadata.packages_distributions()
    used = set().union(
        *(imported(ROOT / name) for name in ("moepp_jax", "configs", "experiments", "benchmarks"))
    )

    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()

    needed = {normal(line) for line in PROJECT["dependencies"]}
    extras = PROJECT["optional-dependencies"]
    optional = {normal(line) for name in extras for line in extras[name]}
    for name in used:
        provided = {normal(d) for d in distributions.get(name, [name])}
        assert provided & (needed | optional), f"{name} is imported and not declared"
    imported_names = {normal(d) for name in used for d in distributions.get(name, [name])}
    silent = {"importlib-resources"}
    assert needed - imported_names == silent
