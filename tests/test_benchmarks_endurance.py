"""What commands leave behind is counted as they go; not how much it is."""

import json
import sys

import pytest

from moepp_jax.benchmarks.endurance import __main__ as endurance
from moepp_jax.benchmarks.endurance import jobs, watching
from moepp_jax.benchmarks.endurance.watching import Sample

# Keeps 2 MB, a file and a thread of every tenth step; a bar as tqdm draws it, and other numbers.
LEAKS = """
import sys, threading, time
kept = []
for step in range(1, 101):
    print(f"\\rprepares: {step}/100", end="", flush=True)
    time.sleep(0.01)
for step in range(1, 101):
    if step % 10 == 0:
        kept += [bytearray(b"1" * 2_000_000), open("/dev/null")]
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    print(f"\\r{step:3}%|###  | {step}/100 [00:01<00:02, 3/7 a second]", end="", flush=True)
    time.sleep(0.04)
sys.exit(int(sys.argv[1]))
"""


def samples(memory=lambda i: 500.0, handles=lambda i: 14, threads=lambda i: 90):
    return [Sample(i / 50, memory(i), handles(i), threads(i)) for i in range(1, 51)]


def test_growth_by_hand():
    """Over the last four fifths, whatever came before, and whatever one sample says."""
    found = endurance.growth(
        samples(
            memory=lambda i: 1200.0 if i < 10 else 600.0 + i,
            handles=lambda i: 30 if i % 9 == 0 else 14,
            threads=lambda i: 90 + (i > 30),
        )
    )
    assert found["memory"] == pytest.approx({"warm": 610, "growth": 40, "low": 40, "high": 40})
    assert found["handles"] == {"warm": 14, "growth": 0, "low": 0, "high": 0}
    assert found["threads"]["growth"] > 0.5
    with pytest.raises(ValueError, match="9 samples are too few"):
        endurance.growth(samples()[-9:])


def test_what_grows_too_much_is_told():
    def lines(**kinds):
        return endurance.grown({"job": "train", "numbers": endurance.growth(samples(**kinds))})

    assert not lines() and not lines(memory=lambda i: 500 + i / 10)
    (line,) = lines(memory=lambda i: 500.0 + i)
    assert line == "train: memory (MB) grew by 40 (40 to 40) from 510"
    (line,) = lines(handles=lambda i: 14 + i)
    assert line.startswith("train: open files grew by 40 ")


def test_a_command_is_watched_by_its_last_bar():
    seen = []
    for sample in watching.watch((sys.executable, "-c", LEAKS, "0"), 100, 0.05):
        seen = endurance._of_last_bar([*seen, sample])
    assert len(seen) > 15 and seen[-1].done > 0.8
    assert [s.done for s in seen] == sorted(s.done for s in seen)
    row = {"job": "leaks", "numbers": endurance.growth(seen)}
    numbers = row["numbers"]
    assert 10 < numbers["memory"]["growth"] < 25
    assert 5 < numbers["handles"]["growth"] < 11 and 5 < numbers["threads"]["growth"] < 11
    assert len(endurance.grown(row)) == 3


def test_a_command_that_fails_is_an_error_with_its_last_words():
    with pytest.raises(watching.Ended, match=r"ended with 3: .*100/100"):
        list(watching.watch((sys.executable, "-c", LEAKS, "3"), 100, 0.2))


def test_the_report_and_its_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "room", lambda *given: jobs.Room(given[0], *given))
    leaks = jobs.Job((sys.executable, "-c", LEAKS, "0"), 100, "step")
    monkeypatch.setattr(jobs, "JOBS", {"leaks": lambda room: leaks})
    stem = tmp_path / "figure"
    with pytest.raises(SystemExit, match="leaks: threads grew by"):
        endurance.main(["--every=0.05", f"--json={tmp_path / 'a.json'}", f"--figure={stem}"])
    assert "100 steps" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["job"] == "leaks" and len(row["samples"][0]) == len(Sample._fields)
    assert all(stem.with_suffix(f".{kind}").stat().st_size > 5000 for kind in ("png", "svg"))


def test_jobs_are_commands_with_work_of_their_count(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs.subprocess, "run", lambda *_, **__: None)
    room = jobs.room(tmp_path, steps=30, items=7)
    made = {name: job(room) for name, job in jobs.JOBS.items()}
    assert {name: (job.count, job.unit) for name, job in made.items()} == {
        "train": (30, "step"),
        "generate": (7, "text"),
        "lm_eval": (7, "question"),
    }
    assert "--config.train.steps=30" in made["train"].command
    assert len((tmp_path / "prompts.txt").read_text().splitlines()) == 7
    (questions,) = (tmp_path / "benchmarks").rglob("*.jsonl")
    assert all(json.loads(line)["label"] in (0, 1) for line in questions.read_text().splitlines())
