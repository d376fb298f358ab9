"""The language model: what tokens may see, its losses, its variants, its types and its memory."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax import block, moe, optim, rotary, vocabulary
from moepp_jax import mesh as mesh_lib
from moepp_jax import model as model_lib
from moepp_jax import state as state_lib
from moepp_jax.errors import ConfigError
from moepp_jax.moe import kernels
from moepp_jax.moe.param import path_of
from moepp_jax.moe.rules.moepp import MoEPPRule
from tests import tiny


@functools.cache
def parameters(**changes):
    model = model_lib.build(tiny.config(**changes))
    return jax.jit(model.init)(jax.random.key(0))


@functools.cache
def fresh(**changes):
    """A configuration, parameters and a compiled forward pass of packed rows."""
    c = tiny.config(**changes)
    model = model_lib.build(c)
    same_shapes = {"moe.dispatch", "model.dtype"}
    params = parameters(**{k: v for k, v in changes.items() if k not in same_shapes})

    @jax.jit
    def run(params, tokens, segments, positions):
        return model(params, tokens, positions, segments)

    return c, params, run


def rows(c, batch=2, seed=0):
    """Random tokens, each row one document."""
    shape = (batch, c.data.seq_len)
    tokens = np.random.default_rng(seed).integers(3, c.model.vocab_size, shape)
    positions = np.broadcast_to(np.arange(c.data.seq_len), shape)
    return tokens, np.ones(shape, np.int32), positions


def close(actual, expected, tolerance=2e-5):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


CAPACITY, DROPLESS = {"moe.dispatch": "capacity"}, {"moe.dispatch": "dropless"}


# What tokens may see


@pytest.mark.parametrize("place", [5, 16, 23])
def test_the_past_does_not_see_the_future_even_when_tokens_are_dropped(place):
    """Place 23 is inside a group, whose earlier tokens share slots with the edited ones."""
    c, params, run = fresh(**CAPACITY)
    tokens, *rest = rows(c)
    before = run(params, tokens, *rest)
    dropped = before.statistics.load.sum() - before.statistics.kept.sum()
    assert dropped > 0.1
    edited = tokens.copy()
    edited[:, place:] = rows(c, seed=1)[0][:, place:]
    after = run(params, edited, *rest)
    np.testing.assert_array_equal(before.hidden[:, :place], after.hidden[:, :place])
    assert (before.hidden[:, place] != after.hidden[:, place]).any()


def two_documents(c, cut=13):
    tokens, segments, positions = rows(c)
    segments = np.where(np.arange(c.data.seq_len) < cut, 1, 2) * segments
    positions = np.where(segments == 1, positions, positions - cut)
    return tokens, segments, positions


def test_documents_of_a_row_do_not_see_each_other_when_nothing_is_dropped():
    c, params, run = fresh(**DROPLESS)
    tokens, *rest = two_documents(c)
    edited = tokens.copy()
    edited[:, :13] = rows(c, seed=1)[0][:, :13]
    before, after = (run(params, t, *rest).hidden for t in (tokens, edited))
    close(after[:, 13:], before[:, 13:])
    assert np.abs(before[:, :13] - after[:, :13]).max() > 0.1


def test_documents_of_a_row_share_slots_under_capacity():
    """They do influence each other there, by what they leave free in a group they have a part of:
    evaluation is dropless, so that a document's loss is its own."""
    c, params, run = fresh(**CAPACITY)
    tokens, *rest = two_documents(c)
    edited = tokens.copy()
    edited[:, :13] = tokens[:, :1]  # all of them want the same experts
    before, after = (run(params, t, *rest).hidden for t in (tokens, edited))
    assert np.abs(before[:, 13:16] - after[:, 13:16]).max() > 0.1


def test_a_packed_row_is_its_documents():
    c, params, run = fresh(**DROPLESS)
    tokens, segments, positions = two_documents(c)
    packed = run(params, tokens, segments, positions).hidden
    second = np.zeros_like(tokens)
    second[:, : c.data.seq_len - 13] = tokens[:, 13:]
    alone = [run(params, t, *rows(c)[1:]).hidden for t in (tokens, second)]
    close(packed[:, :13], alone[0][:, :13])
    close(packed[:, 13:], alone[1][:, : c.data.seq_len - 13])


# Losses


def test_losses_of_chunks_are_the_cross_entropy():
    c, params, _ = fresh()
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 32, c.model.hidden_size)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, c.model.vocab_size, (2, 32)))
    weights = jnp.asarray(rng.random((2, 32)), jnp.float32)

    def plain(output, hidden):
        logp = jax.nn.log_softmax(hidden @ output.T)
        return -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]

    def of(losses):
        def weighted(output, hidden):
            value = losses(output, hidden)
            return jnp.sum(value * weights), value

        (_, value), grads = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))(
            params["output"], hidden
        )
        return value, *grads

    expected = of(plain)
    given = (params["output"], hidden, targets)
    for chunk in (1, 8, 32, 256):
        close(vocabulary.token_losses(*given, chunk), expected[0], 1e-6)
        loss = functools.partial(vocabulary.weighted_loss, chunk=chunk)
        close(loss(*given, weights), jnp.sum(expected[0] * weights), 1e-6)
        # A factor that the loss has later is one of the gradients.
        both = jax.jit(jax.value_and_grad(lambda *of, loss=loss: 3 * loss(*of), argnums=(0, 1)))
        value, grads = both(*given, weights)
        close(value, 3 * jnp.sum(expected[0] * weights), 1e-6)
        for got, wanted in zip(grads, expected[1:], strict=True):
            close(got, 3 * wanted, 1e-6)


def losses_at_random(dtype):
    """Of two sequences, summed: a function of the output matrix and the hidden states, and both."""
    rng = np.random.default_rng(0)
    output = jnp.asarray(rng.normal(size=(512, 48)) * 0.1, jnp.float32)
    hidden = jnp.asarray(rng.normal(size=(2, 32, 48)), jnp.float32).astype(dtype)
    targets = jnp.asarray(rng.integers(0, 512, (2, 32)))

    def summed(output, hidden):
        return vocabulary.weighted_loss(output, hidden, targets, jnp.ones(targets.shape), 8)

    return summed, (output, hidden)


def products(jaxpr) -> list:
    """The types of the factors and of the result of every product in a program, loops included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append([v.aval.dtype.name for v in (*equation.invars, *equation.outvars)])
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            found += products(inner) if hasattr(inner, "eqns") else []
    return found


def test_the_vocabularys_products_are_all_in_the_models_type_and_sum_in_float32():
    summed, arguments = losses_at_random(jnp.bfloat16)
    traced = jax.make_jaxpr(jax.grad(summed, (0, 1)))(*arguments)
    found = products(traced.jaxpr)
    # The logits, once, and the gradients of both factors.
    assert found == 3 * [["bfloat16", "bfloat16", "float32"]]


def test_the_vocabularys_gradients_are_as_exact_as_the_models_type():
    summed, (output, hidden) = losses_at_random(jnp.bfloat16)
    rounded = output.astype(jnp.bfloat16).astype(jnp.float32)
    exact = jax.grad(summed, (0, 1))(rounded, hidden.astype(jnp.float32))
    for got, wanted in zip(jax.grad(summed, (0, 1))(output, hidden), exact, strict=True):
        error = jnp.linalg.norm(got.astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted)
        assert error < 2**-8  # half of a bfloat16's last digit


def test_logits_of_the_whole_vocabulary_are_never_held():
    def temporary(chunk):
        c = tiny.config(
            **{"model.vocab_size": 65536, "model.loss_chunk": chunk, "model.remat": "full"},
            **{"data.seq_len": 128, "model.num_layers": 1},
        )
        mesh = mesh_lib.make_mesh(c, jax.devices()[:1])
        batch = {
            name: jax.ShapeDtypeStruct((8, 128), jnp.float32 if "mask" in name else jnp.int32)
            for name in ("tokens", "targets", "segments", "positions", "loss_mask")
        }
        step = state_lib.make_train_step(state_lib.assemble(c, mesh))
        lowered = step.lower(state_lib.assemble(c, mesh).abstract, batch)
        compiled = lowered.compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 8 * 128 * 65536 * 4
    assert temporary(chunk=4) < logits / 3
    assert temporary(chunk=128) > logits  # so the number measures what it should


@functools.cache
def gradient(**changes):
    """A compiled function: parameters -> (loss of the batch, gradients)."""
    c = tiny.config(**changes)
    model = model_lib.build(c)
    batch = jax.tree.map(jnp.asarray, tiny.batch(c))

    def loss(params):
        _, nll = model.of_batch(params, batch)
        return jnp.sum(nll * batch["loss_mask"]) / jnp.sum(batch["loss_mask"])

    return jax.jit(jax.value_and_grad(loss))


def test_what_backward_recomputes_does_not_change_it():
    params = parameters()
    expected = gradient()(params)
    for remat in ("dots", "full"):
        actual = gradient(**{"model.remat": remat})(params)
        jax.tree.map(lambda a, b: close(a, b), actual, expected)


# Variants


def test_tied_embeddings_learn_at_both_ends():
    tying = {"model.tied_embeddings": True}
    c, params, run = fresh(**tying)
    assert "output" not in params
    tokens, *rest = rows(c)
    out = run(params, tokens, *rest)
    np.testing.assert_array_equal(out.matrix, params["embedding"])
    close(vocabulary.logits(out.matrix, out.hidden), out.hidden @ params["embedding"].T)
    _, tied = gradient(**tying)(params)
    untied = params | {"output": params["embedding"]}
    _, apart = gradient()(untied)
    close(tied["embedding"], apart["embedding"] + apart["output"])


def test_grouped_queries_are_heads_that_share_keys_and_values():
    c, params, run = fresh(**{"model.num_kv_heads": 2})
    attention = params["layers"]["attention"]
    assert attention["k"].shape == attention["v"].shape == (2, 2 * 8, 32)
    heads = {name: attention[name].reshape(2, 2, 8, 32) for name in ("k", "v")}
    shared = {n: jnp.repeat(h, 2, axis=1).reshape(2, 32, 32) for n, h in heads.items()}
    whole = params | {"layers": params["layers"] | {"attention": attention | shared}}
    tokens, *rest = rows(c)
    close(run(params, tokens, *rest).hidden, fresh()[2](whole, tokens, *rest).hidden)


def test_linear_scaling_divides_positions():
    c, params, run = fresh(**{"model.rope_scaling": 4.0})
    tokens, segments, positions = rows(c)
    plain = fresh()[2](params, tokens, segments, positions).hidden
    close(run(params, tokens, segments, 4 * positions).hidden, plain)
    assert np.abs(run(params, tokens, segments, positions).hidden - plain).max() > 1e-3


def test_llama3_scaling_turns_slow_pairs_less():
    """By the wavelengths, as Llama 3.1's authors have it."""
    c = tiny.config(
        **{
            "model.head_dim": 128,
            "model.rope_theta": 500_000.0,
            "model.rope_type": "llama3",
            "model.rope_scaling": 8.0,
        }
    ).model
    want = []
    for i in range(64):
        frequency = 500_000.0 ** (-i / 64)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            want.append(frequency)
        elif wavelength > 8192 / 1:
            want.append(frequency / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            want.append((1 - smooth) * frequency / 8 + smooth * frequency)
    # By hand: pair 0 turns by 1, pair 63 by 500000^(-63/64) / 8; pair 30's wavelength is 2948.4,
    # of which 8192 tokens have 2.7785.
    assert (want[0], want[63]) == (1.0, pytest.approx(3.0688e-7, rel=1e-4))
    assert want[30] == pytest.approx((0.59283 * 0.875 + 0.125) * 2 * math.pi / 2948.4, rel=1e-4)
    angles = rotary.llama3_angles(c, jnp.array([0.0, 1.0, 1000.0]))
    np.testing.assert_allclose(angles, np.outer([0, 1, 1000], want), rtol=2e-6)


def test_a_window_hides_what_is_further_back():
    """Of 2 layers with a window of 4, each carries what it sees 3 places on."""
    c, params, run = fresh(**{"model.sliding_window": 4} | DROPLESS)
    tokens, *rest = rows(c)
    edited = tokens.copy()
    edited[:, 0] += 1
    a, b = (np.asarray(run(params, t, *rest).hidden) for t in (tokens, edited))
    changed = np.abs(a - b).max(axis=(0, 2)) > 0
    assert changed[:7].all() and not changed[7:].any()
    whole = fresh(**{"model.sliding_window": c.data.seq_len} | DROPLESS)[2](params, tokens, *rest)
    plain = fresh(**DROPLESS)[2](params, tokens, *rest)
    np.testing.assert_array_equal(whole.hidden, plain.hidden)


def test_a_window_is_of_a_document():
    c, params, run = fresh(**{"model.sliding_window": 4} | DROPLESS)
    tokens, segments, positions = rows(c)
    alone = run(params, tokens, segments, positions).hidden[:, :20]
    shifted = np.roll(tokens, 12, axis=1)  # the same text behind another document
    split = np.where(np.arange(32) < 12, 1, 2) * segments
    packed = run(params, shifted, split, np.where(split == 2, positions - 12, positions))
    close(packed.hidden[:, 12:], alone)


def test_dense_layers_stand_between():
    """With what they add set to zero, the MoE++ layers that are left are a model of their own."""
    c, params, run = fresh(**{"model.num_layers": 4, "model.moe_every": 2})
    layers = params["layers"]
    dense = {name for name in layers if name.startswith("dense_0_")}
    assert {name.removeprefix("dense_0_") for name in dense} == {
        *{"attention", "attention_norm", "ffn_norm", "dense"}
    }
    tokens, *rest = rows(c)
    out = run(params, tokens, *rest)
    assert out.states.shape[0] == 4
    assert out.router_logits.shape[0] == out.statistics.load.shape[0] == 2

    silent = layers | {
        "dense_0_attention": layers["dense_0_attention"] | {"o": jnp.zeros((2, 32, 32))},
        "dense_0_dense": layers["dense_0_dense"] | {"w_out": jnp.zeros((2, 32, 48))},
    }
    few = {name: value for name, value in layers.items() if name not in dense}
    alone = fresh()[2](params | {"layers": few}, tokens, *rest)
    out = run(params | {"layers": silent}, tokens, *rest)
    close(out.hidden, alone.hidden)
    close(out.states[::2], alone.states)
    close(out.states[1::2], alone.states)


def test_a_dense_layer_is_one_swiglu():
    c = tiny.config()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 32)), jnp.float32)
    params = moe.init(jax.random.key(0), block.describe_dense(c.model))
    y = block.dense(params, x)
    (w_gate, w_up), w_out = params["w_in"], params["w_out"]
    close(y, (jax.nn.silu(x @ w_gate.T) * (x @ w_up.T)) @ w_out.T, 1e-5)


def test_a_platform_has_its_own_arithmetic():
    by = {name: model_lib.build(tiny.config(), platform=name).block.by for name in ("cpu", "tpu")}
    assert by == {"cpu": block.PLAIN, "tpu": block.ON_TPU}
    assert kernels.taking("tpu") != kernels.taking("cpu") == kernels.taking("gpu")


# Types


def test_bfloat16_computes_but_float32_routes_and_remembers():
    rounding = {"model.dtype": "bfloat16"}
    c, params, run = fresh(**rounding)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    tokens, *rest = rows(c)
    out = run(params, tokens, *rest)
    assert out.hidden.dtype == out.states.dtype == jnp.bfloat16
    assert out.router_logits.dtype == out.statistics.prob.dtype == jnp.float32
    assert vocabulary.logits(out.matrix, out.hidden).dtype == jnp.float32
    exact = fresh()[2](params, tokens, *rest)
    # Rounded values would be multiples of 2^-8 of their size.
    rounded = out.router_logits.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.mean(out.router_logits == rounded) < 0.1
    close(out.router_logits[0], exact.router_logits[0], 0.05)

    loss, grads = gradient(**rounding)(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert float(loss) == pytest.approx(float(gradient()(params)[0]), rel=0.02)


def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
    """4096 equal parts in bfloat16 would stay at 256 of them."""
    tokens = jnp.full((8, 4096), 7)

    def loss(embedding):
        return jnp.sum(vocabulary.look_up(embedding, tokens, jnp.bfloat16).astype("float32"))

    grads = jax.jit(jax.grad(loss))(jnp.ones((16, 4)))
    np.testing.assert_array_equal(grads[7], 8 * 4096)


# The optimizer


def test_decay_shrinks_matrices_only():
    few = {"model.num_layers": 4, "model.moe_every": 2}
    c, params = tiny.config(**few, **{"optim.warmup_steps": 0}), parameters(**few)
    described = model_lib.describe(c)
    paths = jax.tree_util.tree_leaves_with_path(described)
    kept = {path_of(path) for path, p in paths if not p.decay}
    parts = ("attention", "ffn", "dense_0_attention", "dense_0_ffn")
    norms = {f"layers/{part}_norm/norm" for part in parts}
    assert kept == norms | {"final/norm", "layers/moe/const/v"}

    optimizer = optim.make_optimizer(c, described)

    @jax.jit
    def stand_still(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optimizer.update(zeros, optimizer.init(params), params)[0]

    updates = stand_still(params)
    shrunk = c.optim.lr * c.optim.weight_decay
    expected = jax.tree.map(lambda p, d: -shrunk * p * d.decay, params, described)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, expected)


def test_the_schedule_by_hand():
    c = tiny.config(
        **{"optim.lr": 1e-3, "optim.initial_lr": 1e-4, "optim.final_lr_ratio": 0.1},
        **{"optim.warmup_steps": 10, "train.steps": 110},
    )
    rate = optim.schedule(c)
    by_hand = {
        0: 1e-4,
        5: 5.5e-4,
        10: 1e-3,
        60: 0.1e-3 + 0.9e-3 * 0.5,  # half of the cosine
        85: 0.1e-3 + 0.9e-3 * (1 - 2**-0.5) / 2,
        109: 0.1e-3 + 0.9e-3 * (1 + np.cos(np.pi * 0.99)) / 2,  # the last step
        110: 1e-4,
    }
    for step, expected in by_hand.items():
        assert float(rate(step)) == pytest.approx(expected, rel=1e-5), step


def rates_of(steps, **changes):
    """Of these steps, of a run of 110 with 10 of warm-up from 1e-4 to 1e-3, which ends at 1e-4."""
    c = tiny.config(
        **{"optim.lr": 1e-3, "optim.initial_lr": 1e-4, "optim.final_lr_ratio": 0.1},
        **({"optim.warmup_steps": 10, "train.steps": 110} | changes),
    )
    return [float(optim.schedule(c)(step)) for step in steps]


def test_the_linear_schedule_by_hand():
    by_hand = {0: 1e-4, 5: 5.5e-4, 10: 1e-3, 60: 5.5e-4, 109: 1.09e-4, 110: 1e-4}
    rates = rates_of(by_hand, **{"optim.schedule": "linear"})
    assert rates == pytest.approx([*by_hand.values()], rel=1e-5)


def test_the_constant_schedule_by_hand():
    constant = {"optim.schedule": "constant"}
    assert rates_of((0, 5, 10, 109, 110, 999), **constant) == pytest.approx(
        [1e-4, 5.5e-4, 1e-3, 1e-3, 1e-3, 1e-3], rel=1e-5
    )
    by_hand = {0: 1e-4, 10: 1e-3, 89: 1e-3, 90: 1e-3, 91: 9.55e-4, 100: 5.5e-4, 109: 1.45e-4}
    by_hand[110] = 1e-4
    rates = rates_of(by_hand, **constant, **{"optim.decay_steps": 20})
    assert rates == pytest.approx([*by_hand.values()], rel=1e-5)
    # Nothing but the decay, as in a branch of a longer run.
    alone = {"optim.warmup_steps": 0, "train.steps": 20, "optim.decay_steps": 20}
    assert rates_of((0, 1, 10, 19), **constant, **alone) == pytest.approx(
        [1e-3, 9.55e-4, 5.5e-4, 1.45e-4], rel=1e-5
    )


def test_the_end_of_a_constant_run_has_no_part_in_its_beginning():
    steps = (0, 3, 10, 50, 109)
    of_two = [
        rates_of(steps, **{"optim.schedule": "constant", "train.steps": n}) for n in (110, 9999)
    ]
    assert of_two[0] == of_two[1]


def test_a_run_shorter_than_its_warmup_ends_inside_it():
    c = tiny.config(**{"optim.warmup_steps": 10, "train.steps": 4, "optim.initial_lr": 0.0})
    assert float(optim.schedule(c)(3)) == pytest.approx(0.3 * c.optim.lr)
    no_warmup = optim.schedule(tiny.config(**{"optim.warmup_steps": 0}))
    assert float(no_warmup(0)) == pytest.approx(2e-3)
    assert rates_of((3,), **{"optim.schedule": "linear", "train.steps": 4}) == pytest.approx(
        [3.7e-4], rel=1e-5
    )


class GatesUnused(MoEPPRule):
    def route(self, *args):
        r = super().route(*args)
        return r._replace(experts=r.experts.at[..., 1].set(self.pool.size))


def test_a_rule_that_breaks_the_contract_is_a_named_error_when_it_is_built():
    c = tiny.config()
    rule = GatesUnused(pool=c.moe.pool)
    broken = dataclasses.replace(c, moe=dataclasses.replace(c.moe, rule=rule))
    with pytest.raises(ConfigError, match=r"config.moe.rule: GatesUnused.*unused choices .* gates"):
        model_lib.build(broken)
