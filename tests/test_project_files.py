"""What the project says of itself to tools agrees with what it is."""

import os
import re
import tomllib
from pathlib import Path

import yaml

import moepp_jax

ROOT = Path(__file__).parents[1]


def read(name: str):
    return yaml.safe_load((ROOT / name).read_text())


def test_the_version_is_one():
    citation = read("CITATION.cff")
    assert citation["version"] == moepp_jax.__version__ and citation["license"] == "Apache-2.0"
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"]
    assert citation["preferred-citation"]["url"].endswith("2410.07348")
    versions = re.findall(r"^## \[(.*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[:2] == ["Unreleased", moepp_jax.__version__]


def test_the_readme_has_every_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    table = (ROOT / "README.md").read_text().partition("| extra | adds |\n")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sorted(extras)


def test_hooks_have_the_pinned_ruff():
    pinned = re.findall(r"^ruff==.*$", (ROOT / "requirements/dev.txt").read_text(), re.MULTILINE)
    (local,) = read(".pre-commit-config.yaml")["repos"]
    assert [hook["additional_dependencies"] for hook in local["hooks"]] == [pinned, pinned]


def test_public_ci_does_what_ours_does():
    jobs = read(".github/workflows/ci.yml")["jobs"]
    commands = {name: [s["run"] for s in job["steps"] if "run" in s] for name, job in jobs.items()}
    assert commands == {"check": [".ci/run"], "newest": ["make test-newest"]}
    assert os.access(ROOT / ".ci/run", os.X_OK)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "test-newest" in targets
    for job in jobs.values():
        (python,) = [s["with"] for s in job["steps"] if s.get("uses", "").startswith("actions/set")]
        assert python["python-version"] == "3.11"


def test_files_that_contributors_are_sent_to_are_there():
    """Those of the worked examples are to be written."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    new = r"sigmoid|warmup|tsv|\*"
    named = re.findall(r"\b(?:moepp_jax|tests|configs|docs|experiments)/[\w/.]+\w", text)
    assert len(named) > 10
    gone = {name for name in named if not (ROOT / name).exists()}
    assert all(re.search(new, name) for name in gone), gone


def pins(name: str) -> set[str]:
    """`package==version` of a list of requirements, without markers and hashes."""
    return set(re.findall(r"^[\w.-]+==[^\s;]+", (ROOT / name).read_text(), re.MULTILINE))


def test_every_list_of_requirements_agrees_with_the_first():
    extras = sorted((ROOT / "requirements").glob("*.txt"))
    assert len(extras) == 8
    for extra in extras:
        missing = pins("requirements.txt") - pins(str(extra))
        assert not missing, f"{extra.name} lacks {missing}: make lock"


def test_the_image_has_the_pinned_versions_and_their_hashes():
    cpu = pins("requirements/image/cpu.txt")
    assert cpu == pins("requirements.txt") | pins("requirements/cloud.txt"), "make hashes"
    for platform in "cuda", "tpu":
        added = pins(f"requirements/image/{platform}.txt")
        assert added == pins(f"requirements/{platform}.txt") - cpu, "make hashes"
    for file in (ROOT / "requirements/image").iterdir():
        for pin in re.split(r"\n(?=\w)", file.read_text()):
            assert re.search(r"--hash=sha256:[0-9a-f]{64}", pin), f"{file.name}: {pin}"


def test_what_builds_in_the_image_is_whole():
    """pip, held to hashes, takes nothing that is not in the list: `wheel` needs `packaging`."""
    names = {pin.partition("==")[0] for pin in pins("requirements/image/build.txt")}
    assert names == {"packaging", "setuptools", "wheel"}
    assert pins("requirements/image/build.txt") <= pins("requirements/dev.txt"), "make hashes"
