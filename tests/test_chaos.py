"""Broken runs are counted honestly; two real ones are broken, which survive."""

import shutil
from pathlib import Path

import pytest

from tests.chaos import __main__ as chaos
from tests.chaos import recipe, trial
from tests.chaos.room import Room, Said, ended, require_ended, require_one_line
from tests.chaos.trial import Lost, Missed, Result, Trial

ROOT = Path(__file__).parents[1]


def survives(folder: Path) -> None:
    assert not any(folder.iterdir())


def misses(folder: Path) -> None:
    raise Missed("had ended")


def loses(folder: Path) -> None:
    raise Lost("other bits")


def is_wrong(folder: Path) -> None:
    raise ValueError("unforeseen")


FAKE = [
    Trial("a", "0", survives),
    Trial("a", "1", misses),
    Trial("a", "2", survives),
    Trial("b", "0", loses),
    Trial("b", "1", is_wrong),
]
TABLE = """\
| fault |    tried | survived |     lost |
|-------|---------:|---------:|---------:|
| a     |        2 |        2 |        0 |
| b     |        2 |        0 |        2 |
| all   |        4 |        2 |        2 |"""


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(chaos, "every", lambda room, kills, seed: FAKE)
    monkeypatch.setattr(Room, "begin", lambda room: None)


def test_what_was_tried_survived_or_lost_is_counted_and_a_lost_run_can_be_repeated(
    fake, tmp_path, capsys, monkeypatch
):
    file, page = tmp_path / "results.json", tmp_path / "page.md"
    page.write_text("before\n\n| fault |\n|-|\n| old |\n\nafter\n")
    assert chaos.main(["--json", str(file), "--page", str(page), "--seed", "3"]) == 1
    assert page.read_text() == f"before\n\n{TABLE}\n\nafter\n"
    said = capsys.readouterr().out
    assert said.endswith(f"{TABLE}\n")
    assert (
        "lost: b: 0: other bits\n  python -m tests.chaos --seed 3 --kills 20 --only 'b: 0'" in said
    )
    assert "lost: b: 1: ValueError('unforeseen') unforeseen" in said
    results = trial.read(file)
    assert trial.table(results) == TABLE
    assert [(r.fault, r.case, r.verdict) for r in results[:3]] == [
        ("a", "0", "survived"),
        ("a", "1", "missed"),
        ("a", "2", "survived"),
    ]
    monkeypatch.setattr(
        chaos, "every", lambda *_: [Trial("b", "0", survives), Trial("c", "0", survives)]
    )
    assert chaos.main(["--json", str(file)]) == 0
    assert [(r.fault, r.case, r.verdict) for r in trial.read(file)[3:]] == [
        ("b", "0", "survived"),
        ("b", "1", "lost"),
        ("c", "0", "survived"),
    ]


def test_trials_can_be_chosen_and_without_time_none_begins(fake, tmp_path, capsys):
    assert chaos.main(["--only", "a: "]) == 0
    assert "| b " not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--only=c is in the name of no trial"):
        chaos.main(["--only", "c"])
    file = tmp_path / "results.json"
    assert chaos.main(["--seconds", "0", "--json", str(file)]) == 0
    assert "5 of 5 were not tried within 0 s" in capsys.readouterr().out
    assert trial.read(file) == []


def test_what_has_survived_is_not_tried_again(fake, tmp_path, capsys):
    file = tmp_path / "results.json"
    assert chaos.main(["--json", str(file), "--only", "a: "]) == 0
    capsys.readouterr()
    assert chaos.main(["--json", str(file), "--rest", "--only", "a: "]) == 0
    assert "| a     |        0 |" in capsys.readouterr().out  # the one that had ended before
    assert chaos.main(["--json", str(file), "--rest"]) == 1
    assert trial.table(trial.read(file)) == TABLE
    with pytest.raises(SystemExit):
        chaos.main(["--rest"])
    assert "--rest goes on from the results of --json=FILE" in capsys.readouterr().err


def test_trials_have_names_of_their_own_and_the_same_chance_for_the_same_seed():
    room = Room(Path("nowhere"))
    names = [t.name for t in chaos.every(room, kills=8, seed=0)]
    assert len(set(names)) == len(names) > 300
    assert names == [t.name for t in chaos.every(room, kills=8, seed=1)]
    assert names[0] == "SIGKILL at start: 0" and names[1] == "SIGKILL in steps: 1"  # in turns
    chances = [trial.dice(seed, "SIGKILL", 1).random() for seed in (0, 0, 1)]
    assert chances[0] == chances[1] != chances[2]


FIELDS = """error: workdir run holds a run of another configuration:
  config.seed: 1 there, 2 now
Give another --workdir, or the old values.
"""


@pytest.mark.parametrize(
    "said, wrong",
    [
        (Said(1, "", "error: a is b\n"), None),
        (Said(1, "", FIELDS), None),
        (Said(0, "", "error: a is b\n"), "status 0, not 1"),
        (Said(1, "", "warning: c\nerror: a is b\n"), "not one line"),
        (Said(1, "", "Traceback (most recent call last):\nValueError: a\n"), "not one line"),
        (Said(1, "", ""), "not one line"),
    ],
)
def test_one_line_is_one_line(said, wrong):
    if wrong is None:
        require_one_line(said)
        return
    with pytest.raises(Lost, match=wrong):
        require_one_line(said)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    room = Room(tmp_path_factory.mktemp("chaos"))
    require_ended(ended(room.start(room.whole)))
    return room


@pytest.mark.parametrize(
    "name", ["SIGKILL in a save: 2", "damaged: manifest.json of tokens: cut short"]
)
def test_a_run_survives(room, name, tmp_path):
    (one,) = [t for t in chaos.every(room, kills=4, seed=0) if t.name == name]
    assert one.result(tmp_path / "trial") == Result(
        one.fault, one.case, "survived", "", pytest.approx(30, abs=30)
    )


def test_a_run_with_another_end_is_lost(room, tmp_path):
    run = tmp_path / "run"
    room.interrupted(run)
    checkpoints = run / "checkpoints"
    last, before = str(recipe.STEPS), str(recipe.STEPS - recipe.SAVE_EVERY)
    shutil.copytree(checkpoints / before, checkpoints / last)
    with pytest.raises(Lost, match="is not what it is in the undisturbed run"):
        room.require_whole(run)
    shutil.rmtree(checkpoints / last)
    shutil.copytree(room.whole / "checkpoints" / last, checkpoints / last)
    room.require_whole(run)
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*rows, rows[-2]]))
    with pytest.raises(Lost, match="steps are not logged once each"):
        room.require_whole(run)


def test_the_page_has_the_table_of_the_results():
    page = (ROOT / "docs/FAULTS.md").read_text()
    assert trial.table(trial.read(ROOT / "tests/chaos/results.json")) in page
