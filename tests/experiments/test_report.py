"""Reports: made of rows alone, the same bytes every time, with verdicts that can go either way."""

import dataclasses

import pytest

from moepp_jax.analysis import drawing
from moepp_jax.experiments import gain, report, run, stats, study
from moepp_jax.experiments.results import DIVERGED, file_of, write
from moepp_jax.experiments.scale import VANILLA
from moepp_jax.experiments.study import FAILS, HOLDS, MISSING, OPEN, Verdict
from tests.experiments import small
from tests.experiments.small import row
from tests.experiments.test_results import NOTHING

SCALE = small.scale()
VANILLA_, MOEPP, TAU = small.Twins().variants(SCALE)


def rows_of(variant, losses, **changes):
    return [row(variant, seed, loss, **changes) for seed, loss in enumerate(losses)]


def verdict(ours, theirs):
    found = small.results([*rows_of(MOEPP, ours), *rows_of(VANILLA_, theirs)])
    return found.below("MoE++", "vanilla")


def test_verdicts_by_hand():
    """Differences of -1.0 and -1.2: mean -1.1, half an interval 12.706 * 0.1."""
    said = verdict([4.0, 3.8], [5.0, 5.0])
    assert said == (OPEN, "MoE++ ends -1.1000 [-2.3706, +0.1706] (2 seeds) nats from vanilla")
    assert verdict([4.0, 3.99], [5.0, 5.0]).outcome == HOLDS
    assert verdict([5.0, 5.01], [4.0, 4.0]).outcome == FAILS
    assert verdict([4.0], [5.0]).outcome == OPEN  # one seed says nothing
    assert verdict([], [5.0]).outcome == MISSING


def test_within_a_margin():
    def within(ours):
        found = small.results([*rows_of(MOEPP, ours), *rows_of(VANILLA_, [5.0, 5.0])])
        return found.within("MoE++", "vanilla", 0.02).outcome

    assert within([5.001, 5.002]) == HOLDS and within([4.999, 4.998]) == HOLDS
    assert within([5.1, 5.101]) == FAILS and within([4.9, 4.899]) == FAILS
    assert within([5.019, 5.022]) == OPEN and within([5.0]) == OPEN and within([]) == MISSING


def test_below_a_bound():
    """1.4 and 1.6: mean 1.5, half an interval 12.706 * 0.1."""
    said = study.below_bound({0: 1.4, 1: 1.6}, 1.5, "ratio")
    assert said == (OPEN, "ratio: 1.500 [0.229, 2.771] (2 seeds), wanted below 1.5")
    assert study.below_bound({0: 1.4, 1: 1.401}, 1.5, "ratio").outcome == HOLDS
    assert study.below_bound({0: 1.6, 1: 1.601}, 1.5, "ratio").outcome == FAILS
    assert study.below_bound({}, 1.5, "ratio").outcome == MISSING


def test_outcomes_together():
    h, f, o, m = (Verdict(kind, "") for kind in (HOLDS, FAILS, OPEN, MISSING))
    assert study.outcome([h, h]) == HOLDS
    assert study.outcome([h, o]) == OPEN
    assert study.outcome([o, f, h, m]) == FAILS
    assert study.outcome([o, m, h]) == MISSING


def test_rows_are_paired_with_their_variants():
    rows = [*rows_of(MOEPP, [4.0, 4.2, 9.0]), row("00000000", 0, 1.0)]
    found = small.results(rows)
    assert [r.eval_loss for r in found.rows("MoE++")] == [4.0, 4.2]  # it has two seeds
    assert found.mean("MoE++").value == pytest.approx(4.1) and found.mean("vanilla") is None
    assert found.difference("vanilla") is None and found.difference("MoE++") is None
    assert found.against("MoE++") == "vanilla" and found.against("vanilla") == ""


def test_more_seeds_are_shown_if_they_are_asked_for(tmp_path):
    rows = rows_of(MOEPP, [4.0, 4.2, 9.0])
    found = study.results_of(small.Twins(), SCALE, rows, seeds=3)
    assert found.mean("MoE++").count == 3
    write(file_of("small", tmp_path), rows)
    (written,) = run.write_reports([small.Twins()], SCALE, tmp_path, seeds=3)
    assert "3 of 3 |" in written.read_text()


def reported(rows, folder):
    write(file_of("small", folder), rows)
    (written,) = run.write_reports([small.Twins()], SCALE, folder)
    there = written.parent
    return [written.read_text()] + [
        (there / f"figure.{kind}").read_bytes() for kind in drawing.FORMATS
    ]


def test_a_report(tmp_path):
    rows = [
        *rows_of(VANILLA_, [5.0, 5.2], ffn_experts=2.0),
        *rows_of(MOEPP, [4.0, 4.19]),
        row(TAU, 0, **NOTHING | {"status": DIVERGED, "eval_loss": None, "tokens": 2048}),
        row("00000000", 3),
    ]
    first = reported(rows, tmp_path / "a")
    assert first == reported(rows[::-1], tmp_path / "b")
    page, png, svg = first
    assert png.startswith(b"\x89PNG") and svg.startswith(b"<?xml")
    for line in (
        "# Are twins alike?",
        "    python -m experiments.run twins --scale=small",
        "**Question.** one question.",
        "**Claim.** a claim.",
        "**Verdict: the claim holds.**",
        "- tau .25: seed 1",
        "- tau .25, seed 0, after 2,048 tokens",
    ):
        assert line in page.splitlines(), line
    assert (
        "| vanilla | 5.1000 ± 0.1000 |  | 2.0000 | 2.000 | 1e+09 |  | 1.0% | 0.25 | 2 of 2 |"
        in page
    )
    assert "| MoE++ | 4.0950 ± 0.0950 | -1.0050 [-1.0685, -0.9415] |" in page
    assert "| tau .25 |" in page and "0 of 2 |" in page
    assert "Machine: CPU, 2 cores, jax 0. Numerics 1. These 5 runs took 0.04 hours." in page
    overview = (tmp_path / "a" / "small" / "README.md").read_text()
    assert "| [tau](tau/REPORT.md) |" in overview
    assert "Rows of other code or configurations, which no table has:" in overview
    assert "- 00000000, seed 3: moe.rule.tau=0.25" in overview and "00000000" not in page


def test_a_report_without_rows(tmp_path):
    write(file_of("small", tmp_path), [])
    (written,) = run.write_reports([small.Twins()], SCALE, tmp_path)
    page = written.read_text()
    assert "**Verdict: the claim is open, as runs are missing.**" in page
    assert "- MoE++: seed 0, 1" in page and "figure.png" not in page
    assert [file.name for file in written.parent.iterdir()] == ["REPORT.md"]


def test_a_picture_of_one_variant_alone_is_none(tmp_path):
    """And one that was there goes when its rows do."""
    both = [*rows_of(VANILLA_, [5.0]), *rows_of(MOEPP, [4.0])]
    write(file_of("small", tmp_path), both)
    (written,) = run.write_reports([small.Twins()], SCALE, tmp_path)
    assert (written.parent / "figure.png").exists()
    write(file_of("small", tmp_path), both[:1])
    run.write_reports([small.Twins()], SCALE, tmp_path)
    assert [file.name for file in written.parent.iterdir()] == ["REPORT.md"]
    assert "figure.png" not in written.read_text()


def test_losses_of_each_source():
    rows = [
        row(VANILLA_, 0, held_out="a=4.0 b=5.0"),
        row(VANILLA_, 1, held_out="a=4.5 b=5.5"),
        row(MOEPP, 0, held_out="a=3.0 b=2.0"),
    ]
    lines = report.table(small.results(rows))
    at = lines.index("| held-out loss of | a | b |")
    assert lines[at + 2 :] == ["| vanilla | 4.2500 | 5.2500 |", "| MoE++ | 3.0000 | 2.0000 |"]


def curve_rows(losses, seeds=(0, 1, 2)):
    """Of the vanilla MoE of the usual size, for the scale's lengths."""
    return [
        row(gain.of_length(SCALE, steps, VANILLA), seed, loss + 0.001 * seed, realised_flops=flops)
        for (steps, flops), loss in zip(((2, 1e9), (3, 2e9), (4, 4e9)), losses, strict=True)
        for seed in seeds
    ]


def test_compute_equivalent_gain():
    """loss = 2 + 2 (C / 1e9)^-1: at 3 it is 2e9, and what took half of that has a gain of 2."""
    rows = curve_rows([4.0, 3.0, 2.5], seeds=(0,))
    curve = gain.curve(SCALE, rows)
    assert (curve.least, curve.most) == (1e9, 4e9)
    assert curve.misfits == pytest.approx([1, 1, 1], rel=0.01)
    of = gain.gain(curve, stats.mean([3.0]), 1e9)
    assert of.value == pytest.approx(2, rel=0.01) and of.inside
    assert str(of) == "2.00"  # of one seed nobody knows how far it is off
    assert str(gain.gain(curve, stats.mean([2.1]), 1e9)).endswith(" (extrapolated)")
    assert gain.curve(SCALE, rows[:-1]) is None
    page = "\n".join(report.table(small.results([*rows, *rows_of(MOEPP, [3.0])])))
    assert "| 2.00 |" in page


@pytest.mark.parametrize(
    ("field", "value", "has_one"),
    [("model.const_std", 0.01, 1), ("model.hidden_size", 64, 0), ("moe.ffn_size", 48, 0)],
)
def test_a_gain_is_of_models_as_large_as_the_curves(field, value, has_one):
    class One(small.Twins):
        def variants(self, scale):
            return [scale.variant("changed", fields={field: value})]

    made = [*curve_rows([4.0, 3.0, 2.5]), *rows_of(*One().variants(SCALE), [3.0])]
    line = next(line for line in report.table(small.results(made, One())) if "changed" in line)
    assert ("| 2.00 |" in line) == has_one


def width_of_gain(curve: gain.Curve, losses: list[float]) -> float:
    of = gain.gain(curve, stats.mean(losses), 1e9)
    assert of.low < of.value < of.high
    return of.high - of.low


def test_the_interval_of_a_gain_knows_the_seeds_of_both_and_how_far_the_curve_is_off():
    curve = gain.curve(SCALE, curve_rows([4.0, 3.0, 2.5]))
    alike, apart = [2.999, 3.0, 3.001], [2.9, 3.0, 3.1]
    assert width_of_gain(curve, alike) < 0.05
    # 0.058 of a standard error, 4.3 of them at two degrees of freedom, and a loss that falls by
    # one nat over 2e9.
    assert width_of_gain(curve, apart) == pytest.approx(2 * 4.3 * 0.058 * 2, rel=0.4)
    off = gain.curve(SCALE, curve_rows([4.0, 3.0, 2.5]))._replace(misfits=[0.9, 1.0, 1.1])
    assert width_of_gain(off, alike) == pytest.approx(2 / 0.9 - 2 / 1.1, rel=0.1)
    seeds = gain.curve(SCALE, curve_rows([4.0, 3.0, 2.5], seeds=(0, 30, 60)))
    assert width_of_gain(seeds, alike) > 0.05


def test_a_length_has_its_warm_up():
    usual = SCALE.recipe().optim.warmup_steps
    assert gain.of_length(SCALE, 4, VANILLA).config.optim.warmup_steps == min(usual, 1)
    assert gain.of_length(SCALE, 4000, VANILLA).config.optim.warmup_steps == usual


def test_a_docstring_without_its_sections():
    class Careless(small.Twins):
        def _doc(self):
            return "Title.\n\nQuestion  what?"

    with pytest.raises(ValueError, match=r"must have .*'Claim', 'Refuted'.* and has .'Question'."):
        Careless().sections()


def test_a_changed_row_changes_the_report(tmp_path):
    rows = [*rows_of(VANILLA_, [5.0, 5.2]), *rows_of(MOEPP, [4.0, 4.19])]
    worse = [dataclasses.replace(r, eval_loss=r.eval_loss + 2) for r in rows[2:]]
    before = reported(rows, tmp_path)
    after = reported([*rows[:2], *worse], tmp_path)
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert "the claim does not hold" in after[0]
