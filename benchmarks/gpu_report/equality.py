"""The layer and the model on the accelerator against the CPU of the same machine, in float32.

Parameters, tokens and routing start alike; what differs is the order of sums.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from moepp_jax import moe
from moepp_jax.benchmarks import layer as layers
from moepp_jax.benchmarks.gpu_report import running
from moepp_jax.benchmarks.gpu_report.sizes import Sizes
from moepp_jax.moe import kernels

LIMITS = {"layer": 1e-5, "loss": 1e-5, "gradients": 1e-3}


def measure(sizes: Sizes, rounds: int) -> list[dict[str, Any]]:
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    rows = []
    for mode in layers.MODES:
        outputs = [layer_on(one, sizes, mode) for one in (device, cpu)]
        for name, got, wanted in zip(("forward", "backward"), *outputs, strict=True):
            far = running.distance(got, wanted)
            rows.append(row(f"layer, {mode}, {name}", far, LIMITS["layer"]))
    for mode in layers.MODES:
        config = sizes.equal.replace("moe", dispatch=mode)
        rows += compared(f"model, {mode}", config, [device], config, cpu)
    return rows


def compared(name, config, devices, alone, reference) -> list[dict[str, Any]]:
    """A model on devices against the same on one: `alone` is its configuration there."""
    loss, grads = running.loss_and_gradients(config, devices)
    loss_there, grads_there = running.loss_and_gradients(alone, [reference])
    far = {
        "loss": running.distance(loss, loss_there),
        "gradients": running.distance(grads, grads_there),
    }
    return [row(f"{name}, {what}", far[what], LIMITS[what]) for what in far]


def row(name: str, far: float, limit: float) -> dict[str, Any]:
    """`holds` is false where something is no number too."""
    return {"what": name, "relative_error": far, "limit": limit, "holds": bool(far <= limit)}


def layer_on(device: jax.Device, sizes: Sizes, mode: str) -> tuple[Any, Any]:
    """A layer's output and its gradients to tokens and parameters, on the host."""
    c = sizes.equal
    paths = {
        "capacity": moe.with_capacity(1.1),
        "dropless": moe.dropless(kernels.grouped_function(device.platform)),
    }
    built = moe.MoE(c.moe.rule, paths[mode])
    described = moe.describe(built.rule, c.model.hidden_size, c.moe.ffn_size)
    with jax.default_device(jax.devices("cpu")[0]):  # random numbers of one device
        params = moe.init(jax.random.key(0), described)
        shape = (4, c.moe.group_size, c.model.hidden_size)
        x = jax.random.normal(jax.random.key(1), shape)
        previous = jax.random.normal(jax.random.key(2), (*shape[:2], built.rule.pool.size))
        cotangent = jax.random.normal(jax.random.key(3), shape)

    def both(x, params, previous, cotangent):
        y, back = jax.vjp(lambda x, p: moe.local(x, previous, p, built)[0], x, params)
        return y, back(cotangent)

    arguments = jax.device_put((x, params, previous, cotangent), device)
    with jax.default_matmul_precision("highest"):
        y, grads = jax.device_get(jax.jit(both)(*arguments))
    return y, jax.tree.map(jnp.asarray, grads)
