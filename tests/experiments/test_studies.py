"""Every experiment at every scale; and what is committed of them is up to date."""

import re

import pytest

from moepp_jax.configs import tiny as tiny_recipe
from moepp_jax.experiments import report, results, run, runs, study
from moepp_jax.experiments.measure import Measured
from moepp_jax.experiments.scale import SCALES, TINY
from moepp_jax.metrics import read_metrics
from moepp_jax.train import train
from tests import tiny

AT = [(one.name, scale) for scale in SCALES for one in study.at(SCALES[scale])]
FIRST = [(name, next(scale for at, scale in AT if at == name)) for name in study.names()]


@pytest.mark.parametrize(("name", "scale"), AT)
def test_an_experiment(name, scale):
    of, scale = study.find(name), SCALES[scale]
    variants = of.variants(scale)
    names = [v.name for v in variants]
    measurements = of.measurements(scale)
    assert len({one.key for one in measurements}) == len(measurements)
    assert len(names) > 1 or (measurements and not names)
    assert len(set(names)) == len(names)
    assert all(v.against in ("", *names) and v.against != v.name for v in variants)
    assert any(v.against for v in variants) or not names
    trained = {run.key for run in runs.plan(variants)}
    assert all(one.run is None or one.run.key in trained for one in measurements)
    assert all(v.seeds >= 1 for v in variants)
    assert len({runs.fingerprint(v.config) for v in variants}) == len(variants)
    assert list(of.sections()) == list(study.SECTIONS) and of.title.endswith("?")
    # With no rows it says what is missing, and nothing of the claim.
    found = study.results_of(of, scale, [])
    assert {v.outcome for v in of.verdicts(found)} == {study.MISSING}
    page = report.page(of, found)
    assert all(f"- {name}: seed 0" in page for name in names)
    assert all(one.name in page for one in measurements)


class Numbers(dict):
    """Whatever is asked for has been measured."""

    def __init__(self, number):
        self._number = number

    def __missing__(self, column):
        return 1.0 + 0.01 * self._number

    def keys(self):  # those that a sentence or a table asks for all of
        return [f"{part}_ms" for part in ("router", "copy", "constant", "all", "layer")]

    def __iter__(self):
        return iter(self.keys())

    def __len__(self):
        return len(self.keys())

    def values(self):
        return [self[name] for name in self.keys()]


@pytest.mark.parametrize(("name", "scale"), FIRST)
def test_a_report_of_made_up_rows(name, scale):
    """Figures are drawn and claims judged whatever the numbers are."""
    of, scale = study.find(name), SCALES[scale]
    rows = []
    from tests.experiments.small import row

    for number, v in enumerate(of.variants(scale)):
        for seed in range(v.seeds):
            loss = 5.0 + 0.01 * number + 0.001 * seed * (number % 3)
            changed = {"realised_flops": 1e12 * (1 + number), "tokens": 1000 * (1 + number)}
            rows.append(row(v, seed, loss, **changed))
    measured = [
        Measured(*one.key, "CPU", Numbers(number))
        for number, one in enumerate(of.measurements(scale))
    ]
    found = study.results_of(of, scale, rows, measured)
    of.figure(found)
    page = report.page(of, found)
    assert "No row" not in page and "have no row yet" not in page
    assert study.outcome(of.verdicts(found)) in (study.HOLDS, study.FAILS, study.OPEN)


def test_the_baseline_is_trained_once_for_all():
    """The twins of the default pool are the same runs in every experiment that has them."""
    usual = runs.fingerprint(TINY.variant("MoE++").config)
    of = ("moe_vs_moepp", "tau", "expert_kinds", "n_const", "gating_residual", "capacity")
    of += ("paper_vs_code", "routing_rules", "dense_equivalent", "scaling")
    for name in of:
        there = {runs.fingerprint(v.config) for v in study.find(name).variants(TINY)}
        assert usual in there, name


def test_tiny_is_the_default_jobs_model():
    """On the same text, whose parts are told apart."""
    own, default = TINY.recipe(), tiny_recipe.get_config()
    assert own.model == default.model and own.moe == default.moe and own.optim == default.optim


def test_the_arithmetic_is_of_the_number_that_rows_have(tmp_path):
    """Whoever changes what a configuration computes raises runs.NUMERICS, and these losses."""
    config = tiny.config(
        **{"data.dir": str(tmp_path / "data"), "moe.dispatch": "dropless", "mesh.data": 1}
    ).replace("mesh", data=8)
    train(config, tmp_path / "run", lambda line: None)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert runs.NUMERICS == 1
    assert losses == pytest.approx(LOSSES_OF_1, rel=2e-4)


LOSSES_OF_1 = [6.57717, 6.59056, 6.38572, 6.33525, 6.4543, 6.29743]


@pytest.mark.parametrize("scale", SCALES)
def test_what_is_committed_is_up_to_date(scale, tmp_path):
    """Reports and figures are what the committed rows give; `--report` writes them anew."""
    there = results.RESULTS / scale
    if not there.is_dir():
        assert scale != "tiny"
        return
    for file in there.rglob("*.csv"):
        copy = tmp_path / file.relative_to(results.RESULTS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    rows = results.read(results.file_of(scale))
    results.write(tmp_path / "again.csv", rows)
    if rows:
        assert (tmp_path / "again.csv").read_bytes() == results.file_of(scale).read_bytes()
    run.write_reports(study.at(SCALES[scale]), SCALES[scale], tmp_path)
    readme = results.RESULTS.parents[1] / "README.md"
    if scale == "tiny":
        fresh = report.in_readme(readme.read_text(), TINY, rows)
        assert fresh == readme.read_text(), "README.md is stale"
    for file in sorted(tmp_path.rglob("*.md")):
        committed = there / file.relative_to(tmp_path / scale)
        assert same_page(file.read_text(), committed.read_text()), f"{committed} is stale"
    for file in sorted(tmp_path.rglob("*.svg")):
        committed = there / file.relative_to(tmp_path / scale)
        assert same_drawing(file.read_text(), committed.read_text()), f"{committed} is stale"


def same_page(one: str, other: str) -> bool:
    """Whether two reports say the same: a fit on another CPU may round the other way, by one in
    the last digit of a number that has a fraction."""
    number = re.compile(r"\d+\.\d+")
    if number.sub("", one) != number.sub("", other):
        return False
    pairs = zip(number.findall(one), number.findall(other), strict=True)
    return all(
        len(a.partition(".")[2]) == len(b.partition(".")[2])
        and abs(int(a.replace(".", "")) - int(b.replace(".", ""))) <= 1
        for a, b in pairs
    )


def test_a_report_of_other_rows_is_noticed():
    line = "| MoE++ | 2 x 64 | 2.033 | 0.266 [0.216, 0.312] | 9.999 |"
    assert same_page(line, line)
    assert same_page(line, line.replace("2.033", "2.034"))
    assert same_page(line, line.replace("9.999", "10.000"))
    assert not same_page(line, line.replace("2.033", "2.035"))
    assert not same_page(line, line.replace("2.033", "2.03"))
    assert not same_page(line, line.replace("2 x 64", "2 x 65"))
    assert not same_page(line, line.replace("[0", "[-0"))


def same_drawing(one: str, other: str, points: float = 0.01) -> bool:
    """Whether two SVG files draw the same; a fit on another CPU differs in the last digits."""
    number = re.compile(r"-?\d+\.\d+")
    if number.sub("", one) != number.sub("", other):
        return False
    pairs = zip(number.findall(one), number.findall(other), strict=True)
    return all(abs(float(a) - float(b)) < points for a, b in pairs)


def test_a_figure_of_other_rows_is_noticed():
    line = '<path d="M 463.16815 33.356973 L 465.306411 37.871134">'
    assert same_drawing(line, line.replace("37.871134", "37.871135"))
    assert not same_drawing(line, line.replace("37.871134", "38.071134"))
    assert not same_drawing(line, line.replace("L", "M"))
