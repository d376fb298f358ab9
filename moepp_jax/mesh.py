"""The mesh of devices, and one table that says how every parameter lies on it.

Axes: `data` (replicas), `fsdp` (parameters and optimizer state sharded) and `expert` (FFN experts
sharded). Sequences of a batch are split over all three.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moepp_jax.config import Config, ConfigError

AXES = ("data", "fsdp", "expert")
BATCH = P(AXES)

# Regular expression on the parameter's path -> spec of its last axes; the axis of a layer stack
# in front of them is never sharded. Optimizer moments have their parameter's path as a suffix.
TABLE: tuple[tuple[str, P], ...] = (
    (r"embedding$|output$", P(None, "fsdp")),  # (V, D)
    (r"attention/(q|k|v)$", P(None, None, "fsdp")),  # (H, width, D)
    (r"attention/o$", P("fsdp", None, None)),  # (D, H, width)
    (r"moe/ffn/w_in$", P("expert", None, None, "fsdp")),  # (E, 2, F, D)
    (r"moe/ffn/w_out$", P("expert", "fsdp", None)),  # (E, D, F)
    (r"dense/w_in$", P(None, None, None, "fsdp")),  # (1, 2, F, D)
    (r"dense/w_out$", P(None, "fsdp", None)),  # (1, D, F)
    (r"moe/router/|moe/const/|norm$", P()),  # small: replicated
)


def mesh_shape(config: Config, num_devices: int) -> tuple[int, int, int]:
    """Sizes of the axes, with -1 resolved.

    Raises:
      ConfigError: the axes do not multiply to the devices, the batch does not divide by them, the
        fsdp axis does not divide the width, or the expert axis the FFN experts.
    """
    sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.expert]
    written = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1:
        raise ConfigError(f"config.mesh: {written} leaves more than one axis open; -1 can be one")
    fixed = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and num_devices % fixed == 0:
        sizes[sizes.index(-1)] = num_devices // fixed
    if math.prod(sizes) != num_devices:
        raise ConfigError(
            f"config.mesh: {written} does not multiply to the {num_devices} devices there are; "
            "set one axis to -1 for the rest, or choose sizes whose product is that number"
        )
    if config.model.hidden_size % sizes[1]:
        raise ConfigError(
            f"config.mesh.fsdp = {sizes[1]} must divide the width that it shards, "
            f"config.model.hidden_size = {config.model.hidden_size}"
        )
    if config.moe.n_ffn % sizes[2]:
        raise ConfigError(
            f"config.mesh.expert = {sizes[2]} must divide the FFN experts, "
            f"config.moe.n_ffn = {config.moe.n_ffn}"
        )
    part = config.train.batch_size // config.train.accumulate
    if part % num_devices:
        raise ConfigError(
            f"config.train.batch_size = {config.train.batch_size} in "
            f"config.train.accumulate = {config.train.accumulate} parts gives {part} sequences, "
            f"which must be a multiple of the {num_devices} devices"
        )
    return tuple(sizes)


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a configuration over all devices, or over those given."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def virtual_cpu_devices(config: Config) -> int:
    """How many CPU devices a mesh that leaves the number open (an axis is -1) asks for."""
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.expert)
    return math.prod(s for s in sizes if s != -1) if -1 in sizes else 1


def spec_of(path: str, ndim: int) -> P:
    """The row of TABLE for a parameter.

    Raises:
      KeyError: no row, or more than one, matches; the message names the parameter.
    """
    rows = [spec for pattern, spec in TABLE if re.search(pattern, path)]
    if len(rows) != 1:
        raise KeyError(f"parameter {path} matches {len(rows)} rows of mesh.TABLE; one must")
    return P(*(None,) * (ndim - len(rows[0])), *rows[0]) if rows[0] else P()


def path_of(key_path: tuple) -> str:
    """A pytree key path as names joined by slashes."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings of a tree of parameters, or of optimizer state; scalars are replicated."""

    def sharding(key_path, leaf):
        spec = spec_of(path_of(key_path), leaf.ndim) if leaf.ndim else P()
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)
