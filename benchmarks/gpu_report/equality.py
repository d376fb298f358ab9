"""The layer and the model on the accelerator against the CPU of the same machine, in float32.

Parameters, tokens and routing start alike; what differs is the order of sums. Attention by the
kernels that the timed model may have is compared too, in the type that they are timed in: what
differs is its rounding.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from moepp_jax import moe
from moepp_jax.benchmarks import layer as layers
from moepp_jax.benchmarks.gpu_report import attention, running
from moepp_jax.benchmarks.gpu_report.sizes import Sizes
from moepp_jax.moe import kernels

LIMITS = {"layer": 1e-5, "loss": 1e-5, "gradients": 1e-3, "attention": 2e-2}


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
    return rows + attentions(sizes, device, cpu)


def attentions(sizes: Sizes, device: jax.Device, cpu: jax.Device) -> list[dict[str, Any]]:
    """Each kernel of the device, of one document and of several, against plain float32 products."""
    rows = []
    sizes = sizes._replace(attention=sizes.attention._replace(batch=1))  # a CPU is slow
    for documents in attention.DOCUMENTS:
        with jax.default_device(cpu):  # random numbers of one device
            rounded = attention.arguments(sizes, documents)
            *exact, segments = rounded
            exact = [x.astype(jnp.float32) for x in exact]
            wanted = jax.device_get(jax.jit(attention.both("xla", sizes))(*exact, segments))
        for name in attention.KERNELS[device.platform]:
            given = jax.device_put(rounded, device)
            got = jax.device_get(jax.jit(attention.both(name, sizes))(*given))
            for part, a, b in zip(("forward", "backward"), got, wanted, strict=True):
                what = f"attention, {name}, documents: {documents}, {part}"
                rows.append(row(what, running.distance(a, b), LIMITS["attention"]))
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
