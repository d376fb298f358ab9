"""Rows of runs: written, read, added by several, and what is wrong with them."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepp_jax.errors import ConfigError
from moepp_jax.experiments import results
from moepp_jax.experiments.results import DIVERGED
from tests.experiments.small import row

NOTHING = dict.fromkeys(("eval_loss", "bits_per_byte", "ffn_experts", "experts")) | {"held_out": ""}
LOSS = st.floats(min_value=0, max_value=1e300)


@given(st.lists(st.tuples(LOSS, st.integers(0, 5)), unique_by=lambda pair: pair[1], max_size=5))
def test_rows_are_read_to_the_last_digit(tmp_path_factory, pairs):
    file = tmp_path_factory.mktemp("rows") / "tiny" / "runs.csv"
    rows = [row("0a1b2c3d", seed, loss) for loss, seed in pairs]
    results.write(file, rows)
    assert results.read(file) == sorted(rows, key=lambda r: r.seed)


def test_the_order_does_not_hang_on_who_came_first(tmp_path):
    rows = [row("b", 0), row("a", 1), row("a", 0), row("c", 0, changes="")]
    results.write(tmp_path / "1.csv", rows)
    results.write(tmp_path / "2.csv", rows[::-1])
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "2.csv").read_bytes()
    assert results.read(tmp_path / "1.csv")[0].key == ("c", 0)


def test_a_run_that_diverged_has_no_loss(tmp_path):
    diverged = row("a", status=DIVERGED, **NOTHING, loss=None)
    results.write(tmp_path / "runs.csv", [diverged])
    assert results.read(tmp_path / "runs.csv") == [diverged]
    assert not diverged.done and diverged.by_source == {}


def test_losses_by_source():
    assert row("a", held_out="king_james=4.5 wiki=5.25").by_source == {
        "king_james": 4.5,
        "wiki": 5.25,
    }


def test_a_row_is_added_or_replaced(tmp_path):
    file, lock = tmp_path / "runs.csv", tmp_path / "lock"
    results.add(file, row("a", 0, 5.0), lock)
    results.add(file, row("a", 1, 6.0), lock)
    results.add(file, row("a", 0, 4.0), lock)
    assert [(r.seed, r.eval_loss) for r in results.read(file)] == [(0, 4.0), (1, 6.0)]


def damaged(tmp_path, column, cell):
    file = tmp_path / "runs.csv"
    results.write(file, [row("a", 0), row("a", 1)])
    header, first, second = file.read_text().splitlines()
    cells = second.split(",")
    # The machine's name has a comma in it, at the end.
    cells[results.COLUMNS.index(column)] = cell
    file.write_text("\n".join([header, first, ",".join(cells)]) + "\n")
    return file


@pytest.mark.parametrize(
    "column, cell, said",
    [
        ("eval_loss", "5,0", "cells for 18 columns"),
        ("eval_loss", "five", "eval_loss = 'five' is no float"),
        ("eval_loss", "nan", "eval_loss = 'nan' must be finite"),
        ("eval_loss", "", "eval_loss = '' of a run that is done"),
        ("status", "fine", "status = 'fine' must be done or diverged"),
        ("status", "diverged", "eval_loss = '5.0' of a run that is diverged"),
        ("seed", "1.5", "seed = '1.5' is no int"),
        ("seed", "0", "another line is of the same run"),
        ("held_out", "text:5", "held_out = 'text:5' is not NAME=nats"),
        ("changes", '"open', "expected after"),
    ],
)
def test_a_damaged_row_is_named(tmp_path, column, cell, said):
    with pytest.raises(ConfigError, match=r"runs.csv, line 3: .*mend that line") as error:
        results.read(damaged(tmp_path, column, cell))
    assert said in str(error.value)


def test_other_columns(tmp_path):
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"line 1: the columns are 'a,b', not 'fingerprint,seed"):
        results.read(tmp_path / "runs.csv")
    assert results.read(tmp_path / "none.csv") == []


def test_a_row_survives_json():
    import json

    one = row("a", 3, math.pi)
    assert results.Row(**json.loads(json.dumps(dataclasses.asdict(one)))) == one
