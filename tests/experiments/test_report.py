"""Reports: made of rows alone, the same bytes every time, with verdicts that can go either way."""

import dataclasses
import math

import pytest

from moepp_jax.analysis import drawing
from moepp_jax.experiments import gain, report, run, stats, study
from moepp_jax.experiments.results import DIVERGED, file_of, write
from moepp_jax.experiments.scale import VANILLA
from moepp_jax.experiments.studies import scaling
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
    assert said[:2] == (OPEN, "MoE++ ends -1.1000 [-2.3706, +0.1706] (2 seeds) nats from vanilla")
    assert verdict([4.0, 3.99], [5.0, 5.0]).outcome == HOLDS
    assert verdict([5.0, 5.01], [4.0, 4.0]).outcome == FAILS


def test_nothing_is_decided_while_seeds_are_missing():
    one = verdict([4.0, 3.99], [5.0])
    assert one[:2] == (MISSING, "MoE++ ends -1.0000 (one seed) nats from vanilla")
    assert verdict([4.0], [5.0]).outcome == MISSING
    none = verdict([], [5.0, 5.0])
    assert none[:2] == (MISSING, "MoE++ and vanilla have no seed in common")


def test_a_claim_does_not_hold_by_the_survivors_alone():
    gone = NOTHING | {"status": DIVERGED, "eval_loss": None}

    class Three(small.Twins):
        def variants(self, scale):
            return [v._replace(seeds=3) for v in super().variants(scale)]

    def of(ours, theirs):
        rows = [
            row(variant, seed, loss, **({} if loss is not None else gone))
            for variant, losses in ((MOEPP, ours), (VANILLA_, theirs))
            for seed, loss in enumerate(losses)
        ]
        return small.results(rows, Three()).below("MoE++", "vanilla")

    lower, higher = [4.0, 4.001, None], [5.0, 5.0, 5.0]
    assert of(lower, higher)[:2] == (
        OPEN,
        "MoE++ ends -0.9995 [-1.0059, -0.9931] (2 seeds) nats from vanilla; 1 of MoE++ diverged",
    )
    assert of([5.0, 5.0, 5.0], [4.0, 4.001, None]).outcome == FAILS  # the survivors are enough
    assert of([None] * 3, higher)[:2] == (
        OPEN,
        "MoE++ and vanilla have no seed in common; 3 of MoE++ diverged",
    )
    assert of([None, None], higher).outcome == MISSING


def test_within_a_margin():
    def within(ours, theirs=(5.0, 5.0)):
        found = small.results([*rows_of(MOEPP, ours), *rows_of(VANILLA_, theirs)])
        return found.within("MoE++", "vanilla", 0.02).outcome

    assert within([5.001, 5.002]) == HOLDS and within([4.999, 4.998]) == HOLDS
    assert within([5.1, 5.101]) == FAILS and within([4.9, 4.899]) == FAILS
    assert within([5.019, 5.022]) == OPEN and within([]) == MISSING


def test_below_a_bound():
    """1.4 and 1.6: mean 1.5, half an interval 12.706 * 0.1."""
    found = small.results([*rows_of(MOEPP, [4.0, 4.0])])

    def below(values):
        return found.measured_below(values, 1.5, "ratio", "MoE++")

    said = below({0: 1.4, 1: 1.6})
    assert said[:2] == (OPEN, "ratio: 1.500 [0.229, 2.771] (2 seeds), wanted below 1.5")
    assert below({0: 1.4, 1: 1.401}).outcome == HOLDS
    assert below({0: 1.6, 1: 1.601}).outcome == FAILS
    assert below({0: 1.4}).outcome == MISSING and below({}).outcome == MISSING
    near = found.measured_within({0: -0.1, 1: -0.102}, 0.25, "off", "MoE++")
    assert near[:2] == (HOLDS, "off: -0.101 [-0.114, -0.088] (2 seeds), wanted within 0.25")
    assert found.measured_within({0: 0.3, 1: 0.301}, 0.25, "off", "MoE++").outcome == FAILS
    assert study.is_above(stats.mean([1.6, 1.601]), 1.5)[0] == HOLDS
    assert study.is_above(stats.mean([1.4, 1.401]), 1.5)[0] == FAILS


def test_of_many_parts_none_fails_by_chance():
    """Three parts fail at 5 / 3 %: what no seeds say is not one of them."""
    parts = [Verdict(HOLDS, "", 0.5), Verdict(OPEN, "", 0.2), Verdict(FAILS, "")]
    for p, outcome in ((0.016, FAILS), (0.017, OPEN)):
        said = study.corrected([*parts, Verdict(FAILS, "", p)])
        assert [v.outcome for v in said] == [HOLDS, OPEN, FAILS, outcome]
    assert study.corrected([Verdict(FAILS, "", 0.049)])[0].outcome == FAILS


def test_outcomes_together():
    h, f, o, m = (Verdict(kind, "") for kind in (HOLDS, FAILS, OPEN, MISSING))
    assert study.outcome([h, h]) == HOLDS
    assert study.outcome([h, o]) == OPEN
    assert study.outcome([o, f, h, m]) == FAILS
    assert study.outcome([o, m, h]) == MISSING


def test_rows_are_paired_with_their_variants():
    rows = [*rows_of(MOEPP, [4.0, 4.2, 9.0]), row("00000000", 0, 1.0)]
    found = small.results(rows)
    assert [r.seed for r in small.results(rows[1:]).rows("MoE++")] == [1]  # not 1 and 2
    assert small.results(rows[1:]).lacking("MoE++") == [0]
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
    page = written.read_text()
    assert "3 of 3 |" in page and "experiments.run twins --scale=small --seeds=3" in page


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


STEPS = (1, 2, 3, 4)  # half the shortest length, and the scale's
FLOPS = (1e9, 2e9, 4e9, 8e9)


def curve_rows(losses, seeds=(0, 1, 2), factor=1.0):
    """Of the vanilla MoE of the usual size; each seed needs `factor` times the last one's FLOPs."""
    return [
        row(gain.of_length(SCALE, steps, VANILLA), seed, loss, realised_flops=flops * factor**seed)
        for steps, flops, loss in zip(STEPS, FLOPS, losses, strict=True)
        for seed in seeds
    ]


def gain_of(curve, losses, flops=1e9):
    return gain.gain(curve, [row(MOEPP, s, y, realised_flops=flops) for s, y in losses.items()])


def test_compute_equivalent_gain():
    """Losses 8, 4, 2 and 1 for FLOPs of 1, 2, 4 and 8: at sqrt 8 it is sqrt 8."""
    assert gain.lengths(SCALE) == STEPS
    curve = gain.curve(SCALE, curve_rows([8.0, 4.0, 2.0, 1.0], seeds=(0,)))
    assert gain_of(curve, {0: 4.0}).value == pytest.approx(2)
    between = gain_of(curve, {0: 8**0.5})
    assert between.value == pytest.approx(8**0.5) and between.bound == ""
    assert str(between) == "2.83"  # of one seed nobody knows how far it is off
    # What no run of the curve has reached is not read off it.
    assert str(gain_of(curve, {0: 0.5}, 4e9)) == "at least 2.00"
    assert str(gain_of(curve, {0: 9.0}, 5e8)) == "at most 2.00"
    assert gain_of(curve, {1: 4.0}) is None  # another seed


def test_a_gain_is_paired_by_seed():
    """Seeds whose curves lie far apart, and a variant that goes with them."""
    curve = gain.curve(SCALE, curve_rows([8.0, 4.0, 2.0, 1.0], factor=3.0))
    rows = [row(MOEPP, s, 4.0, realised_flops=1e9 * 3.0**s) for s in (0, 1, 2, 3)]
    found = gain.gain(curve, rows)
    assert str(found) == "2.00 [2.00, 2.00]" and found.logs.count == 3
    low, high = gain_of(curve, dict.fromkeys((0, 1, 2), 4.0)).interval
    half = 4.302653 * math.log(3) / math.sqrt(3)
    assert low == pytest.approx(6 / math.exp(half)) and high == pytest.approx(6 * math.exp(half))
    assert str(gain_of(curve, {0: 9.0, 1: 0.5})) == "beyond the curve"


@pytest.mark.parametrize(
    ("bound", "above", "below"),
    [("", HOLDS, FAILS), ("at least", HOLDS, OPEN), ("at most", OPEN, FAILS)],
)
def test_a_bound_of_a_gain_decides_on_its_side_alone(bound, above, below):
    more = stats.mean([0.2, 0.21, 0.22])
    less, open_ = more._replace(value=-more.value), stats.mean([-0.2, 0.2])
    judged = [scaling.is_gained(gain.Gain(logs, bound))[0] for logs in (more, less, open_)]
    assert judged == [above, below, OPEN]
    assert scaling.is_gained(gain.Gain(more, "beyond the curve"))[0] == OPEN


def test_a_curve_is_of_seeds_that_have_all_lengths():
    rows = curve_rows([8.0, 4.0, 2.0, 1.0])
    assert sorted(gain.curve(SCALE, rows[:-1]).seeds) == [0, 1]
    assert gain.curve(SCALE, rows[3:]) is None and gain.curve(SCALE, []) is None
    # A longer run that ended worse does not make the loss of a shorter one dearer.
    bent = gain.curve(SCALE, curve_rows([8.0, 4.0, 5.0, 1.0], seeds=(0,)))
    assert bent.needed(0, 4.5) < 2e9
    # 3 lies between 4, which the run of 4e9 could have had, and 1.
    assert bent.needed(0, 3.0) == pytest.approx(4e9 * 2 ** (math.log(4 / 3) / math.log(4)))


@pytest.mark.parametrize(
    ("field", "value", "has_one"),
    [("model.const_std", 0.01, 1), ("model.hidden_size", 64, 0), ("moe.ffn_size", 48, 1)],
)
def test_a_gain_is_of_models_as_deep_and_wide_as_the_curves(field, value, has_one):
    class One(small.Twins):
        def variants(self, scale):
            return [scale.variant("changed", fields={field: value})]

    made = [*curve_rows([8.0, 4.0, 2.0, 1.0]), *rows_of(*One().variants(SCALE), [4.0])]
    line = next(line for line in report.table(small.results(made, One())) if "changed" in line)
    assert ("| 2.00 |" in line) == has_one


def test_what_seeds_tell_apart_is_listed_though_no_claim_is_of_it():
    """tau .25 by -1 nat, MoE++ not; and, scattering alike, what is too small to tell."""
    rows = [
        *rows_of(VANILLA_, [5.0, 5.5]),
        *rows_of(MOEPP, [5.01, 5.49]),
        *rows_of(TAU, [4.0, 4.501]),
    ]
    page = report.page(small.Twins(), small.results(rows))
    assert "Of the 2 differences in the table these leave out 0," in page
    assert "by chance: tau .25 -0.999" in page
    assert "If the 3 variants of one size and length scatter alike" in page
    assert "with 2 degrees of freedom" in page and "Beyond that: tau .25 -0.999" in page
    short = report.page(small.Twins(), small.results(rows[:-1]))
    assert "scatter alike" not in short  # a run is missing: two variants are left


def test_an_answer_names_what_decides_it():
    parts = [Verdict(HOLDS, "a"), Verdict(OPEN, "b"), Verdict(FAILS, "c"), Verdict(OPEN, "d")]
    assert report.answer(parts) == "**does not hold** (1 of 4 parts hold): c"
    without = [part for part in parts if part.outcome != FAILS]
    assert report.answer(without) == (
        "**cannot be told at this scale** (1 of 3 parts hold): among others, b"
    )
    assert report.answer(parts[:1]) == "**holds**: a"
    assert report.answer(parts[:1] * 2) == "**holds** (2 parts): among others, a"


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
