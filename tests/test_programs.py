"""What was won stays won: the compiler's numbers of fixed layers are those written down, or better.

No clock is read. `python -m tests.programs` writes them down anew.
"""

import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

from moepp_jax import moe
from moepp_jax.benchmarks import layer, needed
from moepp_jax.benchmarks import programs as reading
from moepp_jax.compile import hlo
from moepp_jax.moe import dispatch, experts, grouped, transfer
from tests import programs
from tests.programs import CASES, Case

WRITTEN = programs.written()
# Another compiler makes other programs.
ours = pytest.mark.skipif(
    jaxlib.__version__ != WRITTEN["jaxlib"],
    reason=f"numbers of jaxlib {WRITTEN['jaxlib']}, and this is {jaxlib.__version__}",
)


def losses(case: Case) -> list[str]:
    return programs.losses(case, programs.measured(case), WRITTEN["cases"][str(case)])


def test_numbers_are_of_the_pinned_compiler():
    pinned = (Path(__file__).parents[1] / "requirements.txt").read_text()
    assert re.search(r"^jaxlib==(.*)$", pinned, re.M)[1] == WRITTEN["jaxlib"]
    assert list(WRITTEN["cases"]) == [str(case) for case in CASES]


@ours
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_that_was_won_is_lost(case):
    assert not losses(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_written_down_is_near_the_ideal(case):
    """Slots are whole ones. Dropless backward computes the products of x once more, 22 for 18, and
    an expert's last block is filled up to eight rows.
    """
    S = programs.SHAPE.tokens // programs.SHAPE.groups
    n_ffn, groups = programs.SHAPE.n_ffn, programs.SHAPE.groups // case.devices
    tau, others = (1, 0) if case.tau is None else (case.tau, 4)
    rows = S * groups * layer.TOP_K * tau / (tau * n_ffn + others)  # of an expert
    if case.mode == "capacity":
        bound = math.ceil(layer.GAMMA * rows / groups) * groups / (layer.GAMMA * rows)
    else:
        bound = (rows * case.devices + 8) / (rows * case.devices)
        bound *= 1 if case.way == "forward" else 22 / 18
    assert 1 <= WRITTEN["cases"][str(case)]["flops_over_ideal"] <= bound + 1e-9


def _twice_the_slots(monkeypatch):
    capacity = dispatch.capacity
    monkeypatch.setattr(dispatch, "capacity", lambda *a: tuple(2 * slots for slots in capacity(*a)))


def _branch_of_no_experts(monkeypatch):
    monkeypatch.setattr(experts, "adding_others", lambda pool: experts._with_zero_computation)


def _blocks_of_one_size(monkeypatch):
    monkeypatch.setattr(grouped, "_sizes", lambda block: (block,))


def _rows_move_twice(monkeypatch):
    move = transfer.move

    def twice(how, rows, *others):
        return 0.5 * move(how, 3 * rows, *others) - 0.5 * move(how, rows, *others)

    monkeypatch.setattr(transfer, "move", twice)


@ours
@pytest.mark.parametrize(
    ("planted", "case", "names"),
    [
        (
            _twice_the_slots,
            Case(0.75, "capacity", "forward_backward", 8),
            {"flops_over_ideal", "accessed", "temp_bytes", "all-to-all, bytes"},
        ),
        (_branch_of_no_experts, Case(None, "dropless", "forward", 1), {"accessed"}),
        (_blocks_of_one_size, Case(0.1, "dropless", "forward", 1), {"flops_over_ideal"}),
        (
            _rows_move_twice,
            Case(0.75, "dropless", "forward", 8),
            {"all-to-all, count", "all-to-all, bytes"},
        ),
    ],
)
def test_planted_losses_are_found(monkeypatch, planted, case, names):
    planted(monkeypatch)
    said = " ".join(losses(case))
    assert all(f"{case}: {name} is " in said for name in names), said


def test_gains_are_to_be_written_down():
    case, then = CASES[0], {"temp_bytes": 100, "all-gather, count": 1}
    assert programs.losses(case, {"temp_bytes": 102, "all-gather, count": 1}, then) == []
    (gain,) = programs.losses(case, {"temp_bytes": 80, "all-gather, count": 1}, then)
    assert "a gain" in gain and "python -m tests.programs" in gain
    (gone,) = programs.losses(case, {"temp_bytes": 100}, then)
    assert "all-gather, count is 0" in gone
    new = {"temp_bytes": 100, "all-gather, count": 1, "all-reduce, count": 1}
    (added,) = programs.losses(case, new, then)
    assert "all-reduce, count is 1, and was 0" in added


def test_blocks_are_counted_by_hand():
    """Blocks of at most 16 rows, so of 8 or 16: 0 rows are none, 3 are 8, 20 are 8 and 16."""
    found = reading.blocks(moe.Blocked(moe.swiglu, block=16), np.array([0, 3, 20]), 32)
    assert found == reading.Blocks(8 + 16 + 16, 8 + 8 + 16)


@pytest.mark.parametrize("counts", [(40, 0, 3), (8, 16, 24)])
def test_products_of_blocks_are_counted_as_they_run(counts):
    D, F = 16, 24
    experts = moe.Blocked(moe.swiglu, block=16)
    params = {"w_in": jnp.ones((3, 2, F, D)), "w_out": jnp.ones((3, D, F))}
    run = jax.jit(experts).lower(params, jnp.ones((64, D)), jnp.array(counts)).compile()
    blocks = reading.blocks(experts, np.array(counts), 64)
    rows = sum(-(-count // 8) * 8 for count in counts)
    assert reading.product_flops(hlo.parse(run.as_text()), blocks) == 6 * rows * D * F


def test_needed_by_hand():
    """3 FFN experts and a constant, so N = 4; D = 5, F = 7."""
    rule = moe.rules.make("moepp", moe.Pool(3, 1), top_k=2, tau=0.5)
    router, constant, expert = 4 * 5 + 4 * 4, 3 * 5, 3 * 5 * 7
    forward = 2 * 10 * (router + constant) + 2 * 12 * expert
    assert needed.flops(rule, 5, 7, 10, 12.0, "forward") == forward
    assert needed.flops(rule, 5, 7, 10, 12.0, "forward_backward") == 3 * forward
    params = router + constant + 3 * expert
    read = params + 10 * 5 + 10 * 5
    assert needed.bytes_moved(rule, 5, 7, 10, "forward") == 4 * read
    backward = 2 * params + 3 * 10 * 5
    assert needed.bytes_moved(rule, 5, 7, 10, "forward_backward", 2) == 2 * (read + backward)


def test_the_file_is_what_one_command_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "FILE", tmp_path / "programs.json")
    monkeypatch.setattr(programs, "CASES", CASES[:1])
    programs.main()
    found = json.loads((tmp_path / "programs.json").read_text())
    assert found["jaxlib"] == jaxlib.__version__ and list(found["cases"]) == [str(CASES[0])]
