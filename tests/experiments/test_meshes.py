"""Rules on meshes, in small: what is compared, kept, written and refused."""

import pytest

from moepp_jax.errors import ConfigError
from moepp_jax.experiments import meshes
from moepp_jax.experiments import rows as rows_lib
from tests import tiny

STEPS = 2


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    config = tiny.config(**{"data.dir": str(data), "moe.dispatch": "dropless"})
    return meshes.compared("moepp", config, STEPS)


def test_a_row(row):
    assert (row["rule"], row["steps"]) == ("moepp", STEPS)
    assert set(row) == set(meshes.COLUMNS)
    for name in meshes.COLUMNS[4:]:
        assert 0 <= row[name] < 3e-5, name


def test_another_start_is_noticed(row, monkeypatch):
    """What is compared can differ: here the mesh is given another seed."""
    config = tiny.config(**{"moe.dispatch": "dropless"})
    original = meshes.losses

    def disturbed(config, steps, data, expert):
        training, held_out = original(config, steps, 1, 1)
        return ([loss * 1.01 for loss in training], held_out) if data > 1 else (training, held_out)

    monkeypatch.setattr(meshes, "losses", disturbed)
    found = meshes.compared("moepp", config, 1)
    assert found["8x1 training"] == pytest.approx(0.01) and found["8x1 held-out"] == 0


def test_the_page(row, tmp_path):
    file = tmp_path / "meshes.csv"
    rows_lib.write(file, meshes.COLUMNS, [row])
    (read,) = meshes.read(file)
    text = meshes.page([read])
    assert f"| moepp | {row['8x1 training']:.1e} |" in text
    assert "is open: no row yet of adamoe" in text
    every = [read | {"rule": name} for name in meshes.rules.names()]
    assert "(the same to 0.1%) holds:" in meshes.page(every)
    every[3] = every[3] | {"2x4 held-out": "0.01"}
    assert "does not hold: 1.0e-02 at most" in meshes.page(every)
    assert meshes.read(tmp_path / "none.csv") == [] and "is open" in meshes.page([])


def test_recipes():
    for name in meshes.rules.names():
        assert type(meshes.recipe(name).moe.rule).__module__.endswith(f".{name}")
    with pytest.raises(ConfigError, match="--only=depseek: there is no such rule, but adamoe"):
        meshes.recipe("depseek")
