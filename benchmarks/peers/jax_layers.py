"""Layers in JAX: this package's, and the two ways of dispatch that others use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moepp_jax import moe
from moepp_jax.benchmarks import timing
from moepp_jax.benchmarks.peers.inputs import GAMMA, SCALE, TOP_K, Inputs, Sizes
from moepp_jax.moe import kernels

Params = dict[str, Any]


def layers(sizes: Sizes) -> dict[tuple[str, str], Callable]:
    """(kind, name) -> (params, x (G, S, D)) -> y."""
    E, J = sizes.n_ffn, sum(sizes.others)
    dropless = moe.dropless(kernels.grouped_function(jax.default_backend()))
    slots = _with_capacity()
    vanilla = moe.rules.make("vanilla", moe.Pool(E), top_k=TOP_K)
    ours = moe.rules.make("moepp", sizes.pool, top_k=TOP_K, tau=sizes.tau, residual="none")
    identity = moe.rules.make(
        "longcat",
        moe.Pool(E, n_copy=J),
        top_k=TOP_K,
        ffn_experts=sizes.ffn_experts,
        scale=SCALE,
    )
    return {
        ("vanilla", "moepp_jax, dropless"): _own(vanilla, dropless),
        ("vanilla", "ragged_dot, JAX"): ragged,
        ("vanilla, capacity", "moepp_jax, capacity"): _own(vanilla, slots),
        ("vanilla, capacity", "one-hot einsum, JAX"): one_hot,
        ("moepp", "moepp_jax, dropless"): _own(ours, dropless),
        ("identity", "moepp_jax, dropless"): _own(identity, dropless),
    }


def alone(sizes: Sizes) -> dict[tuple[str, str], Callable]:
    """As `layers`: MoE++ with capacity, which drops what no one else's layer drops."""
    rule = moe.rules.make("moepp", sizes.pool, top_k=TOP_K, tau=sizes.tau, residual="none")
    return {("moepp, capacity", "moepp_jax, capacity"): _own(rule, _with_capacity())}


def _with_capacity():
    return moe.with_capacity(GAMMA, kernels.experts_function(jax.default_backend()))


def params_of(kind: str, inputs: Inputs) -> Params:
    kind = kind.removesuffix(", capacity")
    router = {"w": inputs.routers[kind]}
    if kind == "identity":
        router |= {"bias": jnp.zeros(len(router["w"])), "rate": jnp.zeros(())}
    const = {"const": inputs.const} if kind == "moepp" else {}
    return jax.tree.map(jnp.asarray, {"router": router, "ffn": inputs.ffn} | const)


def case(layer: Callable, params: Params, inputs: Inputs, way: str) -> timing.Case:
    """Forward -> y; with backward -> (y, gradient of x, gradients of the weights)."""
    x, dy = jnp.asarray(inputs.x), jnp.asarray(inputs.dy)
    if way == "forward":
        return timing.Case(jax.jit(layer), (params, x))

    def both(params, x, dy):
        y, pullback = jax.vjp(layer, params, x)
        d_params, d_x = pullback(dy)
        return y, d_x, d_params

    return timing.Case(jax.jit(both), (params, x, dy))


def _own(rule: moe.Rule, path: Callable) -> Callable:
    built = moe.MoE(rule, path)

    def layer(params: Params, x: Float[Array, "G S D"]) -> Float[Array, "G S D"]:
        return moe.local(x, jnp.zeros((*x.shape[:2], rule.pool.size)), params, built)[0]

    return layer


def ragged(params: Params, x_GSD: Float[Array, "G S D"]) -> Float[Array, "G S D"]:
    """Rows sorted by expert, `jax.lax.ragged_dot` with JAX's own gradient, rows scattered back."""
    x = x_GSD.reshape(-1, x_GSD.shape[-1])
    E, _, F, D = params["ffn"]["w_in"].shape
    gates, experts = _chosen(params, x)
    order = jnp.argsort(experts.reshape(-1), stable=True)
    counts = jnp.bincount(experts.reshape(-1), length=E)
    rows = x[order // TOP_K]
    w_in = params["ffn"]["w_in"].reshape(E, 2 * F, D)
    h = jax.lax.ragged_dot(rows, w_in.swapaxes(1, 2), counts)
    a = jax.nn.silu(h[:, :F]) * h[:, F:]
    y = jax.lax.ragged_dot(a, params["ffn"]["w_out"].swapaxes(1, 2), counts)
    y *= gates.reshape(-1)[order, None]
    return jnp.zeros_like(x).at[order // TOP_K].add(y).reshape(x_GSD.shape)


def one_hot(params: Params, x_GSD: Float[Array, "G S D"]) -> Float[Array, "G S D"]:
    """GShard's: tokens to slots and back by products with (S, E, C) arrays of zeros and gates."""
    E, S = len(params["ffn"]["w_in"]), x_GSD.shape[1]
    (slots, *_) = moe.capacity((TOP_K / E,) * E, GAMMA, S)
    gates, experts = _chosen(params, x_GSD)
    chosen = jax.nn.one_hot(experts, E)  # (G, S, K, E)
    any_of = chosen.sum(axis=2)
    place = jnp.cumsum(any_of, axis=1) - any_of
    slot = jax.nn.one_hot(place.astype(int), slots) * any_of[..., None]  # 0 past the last one
    combine = jnp.einsum("gsk,gske->gse", gates, chosen)[..., None] * slot
    rows = jnp.einsum("gsec,gsd->egcd", slot, x_GSD)
    gate, linear = jnp.moveaxis(jnp.einsum("egcd,ehfd->egchf", rows, params["ffn"]["w_in"]), 3, 0)
    y = jnp.einsum("egcf,edf->egcd", jax.nn.silu(gate) * linear, params["ffn"]["w_out"])
    return jnp.einsum("gsec,egcd->gsd", combine, y)


def _chosen(params: Params, x):
    """Gates over their sum and numbers of the most probable experts."""
    probs = jax.nn.softmax(x @ params["router"]["w"].T, axis=-1)
    gates, experts = jax.lax.top_k(probs, TOP_K)
    return gates / gates.sum(axis=-1, keepdims=True), experts
