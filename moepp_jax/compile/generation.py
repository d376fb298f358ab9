"""Generation compiled for devices that are not there: on one of them, or over all of a host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from moepp_jax import api, model
from moepp_jax import mesh as mesh_lib
from moepp_jax.compile import findings, memory
from moepp_jax.config import Config
from moepp_jax.generation import decode as device
from moepp_jax.generation import programs, sampling
from moepp_jax.generation.layers import Layers, described

TEXTS = 16  # that `generate` continues together
_ENDS = 4


def examine(config: Config, there: Sequence[jax.Device], limit: int | None) -> list[dict[str, Any]]:
    """What texts as long as those of training need, half of each a prompt, as JSON has it.

    Args:
      there: the devices of a run. `generate` runs in one process, and so on one host's.
      limit: bytes of a device.

    Returns:
      For one device, and for all of a host that has several (--all_devices): devices, texts, places
      of each, parameter_bytes, cache_bytes, of its programs prefill and decode what `memory.of`
      says, and whether both fit.
    """
    host = [d for d in there if d.process_index == there[0].process_index]
    meshes = [None, api.over_all_devices(config, host)] if len(host) > 1 else [None]
    return [_examine(config, host[0], mesh, limit) for mesh in meshes]


def _examine(
    config: Config, first: jax.Device, mesh: Mesh | None, limit: int | None
) -> dict[str, Any]:
    network = model.build(config, mesh, "dropless", first.platform)
    layers, devices = Layers(network, first.platform), 1 if mesh is None else mesh.size
    texts, places = -(-TEXTS // devices) * devices, config.data.seq_len

    def lying(spec: P) -> jax.sharding.Sharding:
        return SingleDeviceSharding(first) if mesh is None else NamedSharding(mesh, spec)

    def array(shape: tuple[int, ...], dtype: Any, spec: P = mesh_lib.BATCH):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=lying(spec))

    dtype = jnp.dtype(config.model.dtype)
    params = jax.tree.map(
        lambda p: array(p.shape, jnp.float32 if p.float32 else dtype, mesh_lib.spec_of(p)),
        described(network, layers.experts_apart),
    )
    prompts = array((texts, places // 2), jnp.int32)
    rows = device.Rows(
        first=array((texts,), jnp.int32),
        limit=array((texts,), jnp.int32),
        seed=array((texts,), jnp.uint32),
        prompt=array((texts,), jnp.uint32),
        sample=array((texts,), jnp.int32),
    )
    ends, settings = array((_ENDS,), jnp.int32, P()), sampling.rules(config.generate)
    settings = jax.tree.map(lambda a: array(a.shape, a.dtype, P()), settings)

    prefill = programs.prefill(layers, places).lower(
        layers, mesh, (params, prompts, rows, ends, settings)
    )
    state = jax.tree.map(
        lambda spec, part: jax.tree.map(lambda a: array(a.shape, a.dtype, spec), part),
        programs.state_specs(),
        prefill.out_info,
    )
    count = array((), jnp.int32, P())
    decode = programs.decode(layers).lower(
        layers, mesh, (params, state, rows, ends, settings, count)
    )
    compiled = {
        "prefill": memory.of(prefill, first.platform, limit),
        "decode": memory.of(decode, first.platform, limit),
    }
    return compiled | {
        "fits": all(program["fits"] for program in compiled.values()),
        "devices": devices,
        "texts": texts,
        "places": places,
        "parameter_bytes": findings.bytes_of(params),
        "cache_bytes": findings.bytes_of(state.caches),
    }
