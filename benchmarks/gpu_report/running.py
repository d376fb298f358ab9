"""A configuration's loss, gradients and batches on devices, for equality and for steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from moepp_jax import mesh as mesh_lib
from moepp_jax import state
from moepp_jax.config import Config
from moepp_jax.mesh import AXES


def batch_of(config: Config) -> dict[str, np.ndarray]:
    """Random tokens, two documents in every sequence."""
    rng = np.random.default_rng(0)
    shape = (config.train.batch_size, config.data.seq_len)
    tokens = rng.integers(3, config.model.vocab_size, shape).astype(np.int32)
    half = shape[1] // 2
    places = np.arange(shape[1], dtype=np.int32)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segments": np.broadcast_to(1 + places // half, shape).astype(np.int32),
        "positions": np.broadcast_to(places % half, shape).astype(np.int32),
        "loss_mask": np.broadcast_to(places % half < half - 1, shape).astype(np.float32),
    }


def assembled(config: Config, devices: Sequence[jax.Device]) -> state.Assembly:
    return state.assemble(config, mesh_lib.make_mesh(config, devices))


def placed(parts: state.Assembly, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return jax.device_put(batch, mesh_lib.batch_sharding(parts.mesh))


def loss_and_gradients(config: Config, devices: Sequence[jax.Device]) -> tuple[float, Any]:
    """Of the fresh parameters and `batch_of`, on the host; float32 products are exact."""
    parts = assembled(config, devices)
    gradient = jax.grad(state.loss_function(parts), has_aux=True)

    def on_device(params, batch):
        total = jax.lax.psum(jnp.sum(batch["loss_mask"]), AXES)
        grads, (metrics, _) = gradient(params, batch, total)
        return metrics["loss"], grads

    on_mesh = jax.shard_map(
        on_device,
        mesh=parts.mesh,
        in_specs=(parts.specs, mesh_lib.BATCH),
        out_specs=(P(), parts.specs),
    )
    params = state.init_state(parts).params
    with jax.default_matmul_precision("highest"):
        loss, grads = jax.jit(on_mesh)(params, placed(parts, batch_of(config)))
    return float(loss), jax.device_get(grads)


def distance(got: Any, wanted: Any) -> float:
    """Of two trees, relative: the largest of their leaves' in the Euclidean norm."""

    def of(a, b):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        scale = np.linalg.norm(b)
        return float(np.linalg.norm(a - b) / scale) if scale else float(np.linalg.norm(a))

    return max(jax.tree.leaves(jax.tree.map(of, got, wanted)))
