"""What is measured beside training: made once, kept, read, and refused where it is damaged."""

import json

import pytest

from moepp_jax.errors import ConfigError
from moepp_jax.experiments import measure, run, runs, study
from moepp_jax.experiments.measure import NO_RUN, Measured, Measurement
from tests.experiments import small

RUN = runs.Run(small.scale().variant("x").config)


def take(value):
    return lambda folder: {"loss": value, "named": float(folder is not None)}


def test_measurements_are_made_once(tmp_path):
    file, said = tmp_path / "tiny" / "x" / "measured.csv", []
    wanted = [Measurement("b", RUN, take(2.0)), Measurement("a", None, take(1 / 3))]

    def make(wanted, trained=lambda run: tmp_path):
        measure.take_missing(wanted, file, trained, tmp_path / "lock", "CPU", said.append)

    make(wanted)
    a, b = measure.read(file)
    assert a == Measured("a", NO_RUN, 0, "CPU", {"loss": 1 / 3, "named": 0.0})
    assert b == Measured("b", *RUN.key, "CPU", {"loss": 2.0, "named": 1.0})
    assert said == ["b, seed 0: loss 2, named 1", "a, seed 0: loss 0.3333, named 0"]
    before = file.read_bytes()
    make(wanted, trained=lambda run: pytest.fail("it is there"))
    assert file.read_bytes() == before and len(said) == 2
    make([*wanted, Measurement("c", None, lambda folder: {"other": 5.0})])
    assert [row.values for row in measure.read(file)][2] == {"other": 5.0}
    assert measure.missing(wanted, measure.read(file)) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a,f,0,CPU", "there are 4 cells for 5 columns"),
        ("a,f,zero,CPU,1", "invalid literal for int"),
        ("a,f,0,CPU,inf", "must be finite"),
        ("a,f,0,CPU,x", "could not convert string to float: 'x'"),
        ("a,f,1,CPU,2", "another line is of the same measurement"),
    ],
)
def test_a_damaged_row_is_named(tmp_path, line, said):
    file = tmp_path / "measured.csv"
    file.write_text(f"name,fingerprint,seed,machine,loss\na,f,1,CPU,1.5\n{line}\n")
    with pytest.raises(ConfigError, match=r"measured.csv, line 3: .*mend that line") as error:
        measure.read(file)
    assert said in str(error.value)
    file.write_text("a,b\n")
    with pytest.raises(ConfigError, match="line 1: the first columns are 'a,b'"):
        measure.read(file)
    assert measure.read(tmp_path / "none.csv") == []


def test_other_measurements_are_in_no_report():
    class Measuring(small.Twins):
        def measurements(self, scale):
            return [Measurement("a", RUN, take(1.0))]

    rows = [
        Measured("a", *RUN.key, "CPU", {}),
        Measured("a", "00000000", 0, "CPU", {}),
        Measured("b", *RUN.key, "CPU", {}),
    ]
    assert study.results_of(Measuring(), small.scale(), [], rows).measured == rows[:1]


def test_a_run_is_trained_for_a_measurement(tmp_path, monkeypatch):
    """Once, and also if its row is of another machine, whose checkpoints are not here."""

    class Measuring(small.Twins):
        def measurements(self, scale):
            (one, *_) = run.plan([small.Twins()], scale)
            return [Measurement("a", one, take(1.0)), Measurement("b", one, take(2.0))]

    scale, trained = small.scale(), []

    def in_child(one, folder, scale):
        trained.append(one.key)
        (folder / "row.json").write_text(json.dumps(vars(small.row("x"))))
        yield 4

    monkeypatch.setattr(run.sweep, "in_child", in_child)
    run.measure_missing([Measuring()], scale, tmp_path / "results", tmp_path / "runs")
    assert len(trained) == 1
    rows = measure.read(measure.file_of("small", "twins", tmp_path / "results"))
    assert [row.name for row in rows] == ["a", "b"]
