"""The attention kernels: each as plain products compute it, and which one a model gets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax import attend, run
from moepp_jax import mesh as mesh_lib
from moepp_jax import model as model_lib
from moepp_jax import state as state_lib
from moepp_jax.errors import ConfigError
from tests import tiny


def of_model(**changes):
    return tiny.config(**{f"model.{name}": value for name, value in changes.items()}).model


def close(actual, expected, tolerance=2e-5):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def documents(length: int, rows: int = 2):
    """Segments of rows that begin and end at other places, and have padding in the end."""
    cuts = np.array([[length // 5, length // 2 + 7], [3, length - 9]])[:rows]
    return 1 + jnp.sum(jnp.arange(length) >= cuts[..., None], axis=1, dtype=jnp.int32)


def answers_and_gradients(packed, c, segments):
    """Of one attention, with the gradients of queries, keys and values."""
    rng = np.random.default_rng(0)
    heads = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
    shapes = [(*segments.shape, n, c.head_width) for n in (*heads, c.num_heads)]
    *given, weights = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)

    @jax.jit
    def both(*given):
        y, pullback = jax.vjp(lambda *given: packed(segments)(*given)[0], *given)
        return y, *pullback(weights)

    return both(*given)


# width, query heads, key heads, tokens, window: tokens in blocks of 128, at most 4 of them or more;
# or in none of them.
SHAPES = [(64, 2, 2, 384, 0), (96, 4, 2, 200, 0), (128, 2, 1, 640, 150), (96, 2, 2, 256, 30)]


@pytest.mark.parametrize(("width", "heads", "kv_heads", "length", "window"), SHAPES)
def test_splash_is_attention(width, heads, kv_heads, length, window):
    c = of_model(num_heads=heads, num_kv_heads=kv_heads, head_dim=width, sliding_window=window)
    segments = documents(length)
    expected = answers_and_gradients(attend.xla(c), c, segments)
    actual = answers_and_gradients(attend.splash(c, interpret=True), c, segments)
    for a, b in zip(actual, expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("window", [0, 30])
def test_cudnn_is_given_documents_and_windows(window, monkeypatch):
    """What it is asked for, computed by XLA: there is no GPU here."""
    plain = jax.nn.dot_product_attention

    def asked(*heads, is_causal, implementation, **options):
        assert is_causal and implementation == "cudnn"  # else it computes what no token sees
        return plain(*heads, is_causal=True, **options)

    c = of_model(num_kv_heads=2, sliding_window=window)
    segments = documents(96)
    expected = answers_and_gradients(attend.xla(c), c, segments)
    monkeypatch.setattr(jax.nn, "dot_product_attention", asked)
    for a, b in zip(answers_and_gradients(attend.cudnn(c), c, segments), expected, strict=True):
        close(a, b)


# In the training step


def stepped(axes, splash: bool, **changes):
    """State and metrics after one step on a mesh."""
    changes |= dict(zip(("mesh.data", "mesh.fsdp", "mesh.expert"), axes, strict=True))
    c = tiny.config(**{"optim.eps": 1e-3, "optim.warmup_steps": 0}, **changes)
    mesh = mesh_lib.make_mesh(c, jax.devices()[: np.prod(axes)])
    parts = state_lib.assemble(c, mesh)
    if splash:
        kernel = attend.splash(c.model, mesh_lib.AXES, interpret=True)
        parts = dataclasses.replace(parts, model=dataclasses.replace(parts.model, attend=kernel))
    batch = jax.device_put(tiny.batch(c), mesh_lib.batch_sharding(mesh))
    return jax.device_get(state_lib.make_train_step(parts)(state_lib.init_state(parts), batch))


def test_a_step_with_splash_is_the_same_on_a_mesh():
    few = {"model.num_kv_heads": 2, "model.remat": "exchanged"}
    state, metrics = stepped((1, 2, 2), splash=True, **few)
    expected, expected_metrics = stepped((1, 2, 2), splash=False, **few)
    for a, b in ((metrics, expected_metrics), (state.opt_state, expected.opt_state)):
        jax.tree.map(lambda x, y: close(x, y, 3e-5) if np.any(y) else None, a, b)


# Which one


def test_each_platform_has_its_own(monkeypatch):
    made = {name: lambda c, axes, name=name: lambda _: name for name in attend._KERNELS}
    monkeypatch.setattr(attend, "_KERNELS", made)
    monkeypatch.setitem(attend._OBSTACLE, "cudnn", lambda c: "")

    def chosen(name):
        platforms = ("cpu", "tpu", "gpu")
        return [attend.kernel(of_model(attention=name), p)(None) for p in platforms]

    assert chosen("auto") == ["xla", "splash", "cudnn"]
    assert chosen("xla") == ["xla", "xla", "xla"]


@pytest.mark.parametrize(
    ("name", "platform", "own"),
    [("splash", "cpu", "xla"), ("splash", "gpu", "cudnn"), ("cudnn", "tpu", "splash")],
)
def test_a_kernel_of_another_platform_is_refused(name, platform, own):
    with pytest.raises(ConfigError) as error:
        attend.kernel(of_model(attention=name), platform)
    assert str(error.value) == (
        f"config.model.attention = {name!r} is no kernel of this platform, {platform}: "
        f"choose 'auto', here {own!r}, or 'xla'"
    )


OBSTACLES = [
    ("tpu", "splash", {"dtype": "float16"}, "config.model.dtype = 'float16' is no type of a TPU"),
    ("gpu", "cudnn", {"dtype": "float32"}, "'float32' is none of 'bfloat16' and 'float16'"),
    ("gpu", "cudnn", {"dtype": "bfloat16", "head_dim": 20}, "must be a multiple of 8, but got 20"),
]


@pytest.mark.parametrize(("platform", "name", "changes", "why"), OBSTACLES)
def test_what_a_kernel_cannot_compute(platform, name, changes, why, monkeypatch, capsys):
    """XLA does, and that is said once; unless the kernel was asked for by name."""

    def refuse(q, *_, **__):
        raise NotImplementedError(f"The head dim must be a multiple of 8, but got {q.shape[-1]}.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", refuse)
    attend._say.cache_clear()
    for _ in range(2):
        attend.kernel(of_model(**changes), platform)
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith(f"attention is computed by XLA, not by {name}, which cannot: ")
    assert said.endswith(why)
    with pytest.raises(ConfigError, match=f"'{name}' cannot compute this model: .*{why}; choose"):
        attend.kernel(of_model(attention=name, **changes), platform)


def test_a_model_trained_elsewhere_is_described_and_opened_here(tmp_path):
    """By another platform's kernel, which this one need not have."""
    c = tiny.config(**{"model.attention": "splash"})
    described = model_lib.describe(c)
    assert described.keys() == model_lib.describe(tiny.config()).keys()
    with pytest.raises(ConfigError, match="is no kernel of this platform, cpu"):
        model_lib.build(c)
    (tmp_path / "config.json").write_text(c.to_json())
    opened = run.open_run(tmp_path).config
    assert opened.model.attention == "auto"
    model_lib.build(opened)
