"""The command: from a run to files; and from the files alone, without JAX, the same again."""

import re
import subprocess
import sys

import pytest

from moepp_jax.analysis import draw, record
from tests import tiny
from tests.test_main import ENVIRONMENT, ROOT


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of an analysis of two runs, and what the command said."""
    folder = tmp_path_factory.mktemp("analyze")
    c = tiny.config(**{"data.dir": str(folder / "data"), "mesh.data": 1})
    for name in ("a", "b"):
        tiny.run_folder(folder / name, c if name == "a" else c.replace("moe.rule", tau=0.5))
    (folder / "note.txt").write_text("In the beginning <script>alert(1)</script> \u202e end")
    words = [f"--workdir={folder / 'a'}", f"--against={folder / 'b'}", f"--out={folder / 'out'}"]
    words += ["--source=text", f"--text={folder / 'note.txt'}", "--tokens=300", "--page"]
    return folder / "out", run("moepp_jax.main", "analyze", *words)


def run(module: str, *words: str, before: str = "pass") -> str:
    program = f"import sys, runpy; {before}; runpy.run_module({module!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *words],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_is_written(made):
    out, said = made
    assert re.findall(r"written \S*/(\S+)", said) == ["REPORT.md", "page.html"]
    a, b = record.read(out / draw.RECORD), record.read(out / draw.AGAINST)
    assert list(a.meta.sources.items()) == [("note.txt", "file"), ("text", "source")]
    assert (a.meta.name, b.meta.name) == ("a", "b")
    assert (a.rows.token == b.rows.token).all() and 100 < a.num_tokens <= 320
    report = (out / "REPORT.md").read_text()
    assert f"--out={out}" in report and "<script>alert" not in report
    assert "<script>alert(1)" not in (out / "page.html").read_text()


def test_it_is_drawn_again_without_jax(made):
    """The same bytes, with the command that made the record."""
    out, _ = made
    there = {f.name: f.read_bytes() for f in out.iterdir()}
    for file in out.iterdir():
        if file.suffix != ".parquet":
            file.unlink()
    words = (str(out), "--page")
    said = run("moepp_jax.analysis", *words, before="sys.modules['jax'] = None")
    assert re.findall(r"written \S*/(\S+)", said) == ["REPORT.md", "page.html"]
    again = {f.name: f.read_bytes() for f in out.iterdir()}
    assert again.keys() == there.keys()
    assert [name for name in there if again[name] != there[name]] == []
