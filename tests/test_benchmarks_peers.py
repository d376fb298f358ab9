"""The comparison with others' layers in small: that all compute the same, not how fast."""

import json

import numpy as np
import pytest

from moepp_jax.analysis import drawing
from moepp_jax.benchmarks import timing
from moepp_jax.benchmarks.peers import __main__ as peers
from moepp_jax.benchmarks.peers import inputs, jax_layers, torch_layers, writing
from tests import authors

SIZES = inputs.Sizes(tokens=64, width=16, ffn_size=24, n_ffn=4)


def test_routers_are_at_balance():
    sizes = SIZES._replace(tokens=4096)
    made = inputs.make(sizes)
    best = np.argsort(-(made.x @ made.routers["moepp"].T), axis=-1)[..., :2]
    assert (best < 4).sum(axis=-1).mean() == pytest.approx(sizes.ffn_experts, rel=0.01)
    assert sizes.ffn_experts == pytest.approx(2 * 3 / 7)


def test_no_choice_hangs_on_rounding():
    """What sets routers to balance stops where a token is about to choose another expert."""
    for tokens in (64, 4096):
        made = inputs.make(SIZES._replace(tokens=tokens))
        for router in made.routers.values():
            best = np.sort(made.x @ router.T, axis=-1)
            assert (best[..., -2] - best[..., -3]).min() > 5e-5


@pytest.mark.parametrize("way", peers.PASSES)
def test_layers_in_jax_are_equal_by_kind(way):
    made = inputs.make(SIZES)
    named = {
        key: jax_layers.case(layer, jax_layers.params_of(key[0], made), made, way)
        for key, layer in (jax_layers.layers(SIZES) | jax_layers.alone(SIZES)).items()
    }
    errors = peers.require_equal(named, way)
    assert [kind for kind, _ in errors].count("vanilla") == 2
    assert [kind for kind, _ in errors].count("vanilla, capacity") == 2


def test_capacity_drops_here():
    """Or one-hot dispatch would only be compared where nothing finds its slot taken."""
    made = inputs.make(SIZES)
    outs = {}
    for kind in ("vanilla", "vanilla, capacity"):
        (layer,) = (
            layer
            for (of, name), layer in jax_layers.layers(SIZES).items()
            if of == kind and name.startswith("moepp_jax")
        )
        case = jax_layers.case(layer, jax_layers.params_of(kind, made), made, "forward")
        outs[kind] = np.asarray(case.function(*case.arguments))
    differ = np.abs(outs["vanilla"] - outs["vanilla, capacity"]).max(axis=-1) > 1e-3
    assert 0 < differ.mean() < 1


def test_unequal_layers_are_not_timed():
    named = {
        ("vanilla", name): timing.Case(lambda y=y: np.array([1.0, y]), ())
        for name, y in (("moepp_jax", 2.0), ("theirs", 2.1))
    }
    with pytest.raises(peers.UnequalError, match=r"theirs \(vanilla, forward\) is 5.0e-02"):
        peers.require_equal(named, "forward")
    named["vanilla", "theirs"] = timing.Case(lambda: np.array([1.0, np.nan]), ())
    with pytest.raises(peers.UnequalError):
        peers.require_equal(named, "forward")


def test_the_command(tmp_path, monkeypatch, capsys):
    """Without PyTorch one line says so, and the others are measured."""
    monkeypatch.setattr(torch_layers.importlib.util, "find_spec", lambda name: None)
    out, stem = tmp_path / "peers.json", tmp_path / "peers"
    given = "--tokens=64 --width=16 --ffn_size=24 --n_ffn=4 --rounds=1"
    monkeypatch.setattr("sys.argv", f"peers {given} --json {out} --figure {stem}".split())
    peers.main()
    said = capsys.readouterr()
    assert said.err == (
        "without torch and transformers: no layers in PyTorch (pip install 'moepp_jax[hf]')\n"
    )
    assert "one-hot einsum, JAX" in said.out
    report = json.loads(out.read_text())
    assert report["threads"] and report["machine"] and report["sizes"]["tokens"] == 64
    rows = report["rows"]
    assert {row["pass"] for row in rows} == set(peers.PASSES) and len(rows) == 14
    own = {
        (row["pass"], row["kind"]): row["seconds"]
        for row in rows
        if row["layer"].startswith("moepp_jax")
    }
    for row in rows:
        assert row["over_own"] == row["seconds"] / own[row["pass"], row["kind"]]
        assert row["over_moepp"] == row["seconds"] / own[row["pass"], "moepp"]
        assert row["relative_error"] <= peers.TOLERANCE
    assert stem.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    svg = stem.with_suffix(".svg").read_text()
    assert "ragged_dot, JAX (vanilla)" in svg
    drawing.write(writing.figure(report), tmp_path / "again")
    assert (tmp_path / "again.svg").read_text() == svg


@pytest.mark.torch
@pytest.mark.parametrize("way", peers.PASSES)
def test_layers_in_pytorch_are_equal_too(way):
    rows = peers.measure(SIZES, way, rounds=1)
    names = {row["layer"] for row in rows}
    assert {"Mixtral, eager", "OLMoE, grouped_mm", "LongCat-Flash"} <= names
    assert len(rows) == 13
    assert all(row["relative_error"] <= peers.TOLERANCE for row in rows)


@pytest.mark.torch
def test_the_authors_layer_is_theirs():
    """Against the float64 model that converted checkpoints are held to."""
    made = inputs.make(SIZES)
    layer = torch_layers.layers(SIZES, made)["moepp", "the authors' arithmetic, PyTorch"]
    case = torch_layers.case(layer, made, "forward")
    tensors = {"moe.gate.wg.weight": made.routers["moepp"]}
    for i, (w_in, w_out) in enumerate(zip(*made.ffn.values(), strict=True)):
        expert = f"moe.experts.experts.{i}."
        tensors |= {f"{expert}up_proj.weight": w_in.reshape(-1, SIZES.width)}
        tensors |= {f"{expert}down_proj.weight": w_out}
    for i, (w, v) in enumerate(zip(*made.const.values(), strict=True), SIZES.n_ffn):
        expert = f"moe.experts.experts.{i}."
        tensors |= {f"{expert}wg.weight": w, f"{expert}constant": v}
    fields = {"moe_2layer_gate": False, "moe_feature_no_mul_topk": True}
    want, *_ = authors.Model(fields, tensors)._moe(np.float64(made.x), None, "moe.")
    got = case.function(*case.arguments).numpy()
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
