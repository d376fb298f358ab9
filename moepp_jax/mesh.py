"""The mesh of devices, and how parameters lie on it by their descriptions.

Axes: `data` (replicas), `fsdp` (parameters and optimizer state sharded) and `expert` (FFN experts
sharded). Sequences of a batch are split over all three. FFN experts lie on the devices of `expert`,
cut over `fsdp`; everything else is cut over both. Where parameters are used they are put together
again by `whole`, in a shard_map, so that each byte that moves is written down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moepp_jax.config import Config
from moepp_jax.errors import ConfigError
from moepp_jax.moe import Param, param

AXES = ("data", "fsdp", "expert")
BATCH = P(AXES)

_CUT = ("fsdp", "expert")


def mesh_shape(config: Config, num_devices: int) -> tuple[int, int, int]:
    """Sizes of the axes, with -1 resolved.

    Raises:
      ConfigError: the axes do not multiply to the devices, or do not divide what they shard: the
        batch, the FFN experts, the rows of a matrix.
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
    _, fsdp, expert = sizes
    if config.moe.n_ffn % expert:
        raise ConfigError(
            f"config.mesh.expert = {expert} must divide the FFN experts, "
            f"config.moe.n_ffn = {config.moe.n_ffn}"
        )
    _require_rows(config, fsdp, expert)
    part = config.train.batch_size // config.train.accumulate
    if part % num_devices:
        raise ConfigError(
            f"config.train.batch_size = {config.train.batch_size} in "
            f"config.train.accumulate = {config.train.accumulate} parts gives {part} sequences, "
            f"which must be a multiple of the {num_devices} devices"
        )
    sequences = max(1, config.moe.group_size // config.data.seq_len)
    if config.moe.dispatch == "capacity" and part // num_devices % sequences:
        raise ConfigError(
            f"config.moe.group_size = {config.moe.group_size} is {sequences} sequences, and of a "
            f"part of the batch each of the {num_devices} devices has {part // num_devices}, which "
            "must be a multiple of that"
        )
    return tuple(sizes)


def _require_rows(config: Config, fsdp: int, expert: int) -> None:
    m = config.model
    cut = {
        "config.model.hidden_size": (m.hidden_size, fsdp * expert),
        "config.model.vocab_size": (m.vocab_size, fsdp * expert),
        "config.model.num_kv_heads * head width": (m.num_kv_heads * m.head_width, fsdp * expert),
        "config.moe.ffn_size": (config.moe.ffn_size, fsdp),
    }
    if m.moe_every > 1:
        cut["config.model.dense_ffn_size"] = (m.dense_ffn_size, fsdp * expert)
    for name, (rows, parts) in cut.items():
        if rows % parts:
            raise ConfigError(
                f"config.mesh: fsdp={fsdp} x expert={expert} cuts parameters in {parts} parts "
                f"along {name} = {rows}, which they must divide"
            )


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a configuration over all devices, or over those given.

    TPU slices are joined by a slower network, which only the data axis crosses.

    Raises:
      ConfigError: as `mesh_shape`, or the data axis is no multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # An axis may be a part of a torus' side, or parts of several.
    how = {"devices": devices, "allow_split_physical_axes": True}
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, **how)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(*across_slices(slices, shape), **how)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def across_slices(
    slices: int, shape: tuple[int, int, int]
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """A mesh's shape within a slice, and that of the slices, whose product is the mesh's.

    Raises:
      ConfigError: the data axis is no multiple of the slices.
    """
    data, fsdp, expert = shape
    if data % slices:
        raise ConfigError(
            f"config.mesh.data = {data} must be a multiple of the {slices} slices: replicas may "
            f"lie on several, parameters (fsdp={fsdp} x expert={expert}) on one"
        )
    return (data // slices, fsdp, expert), (slices, 1, 1)


def virtual_cpu_devices(config: Config) -> int:
    """How many CPU devices a mesh that leaves the number open (an axis is -1) asks for."""
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.expert)
    return math.prod(s for s in sizes if s != -1) if -1 in sizes else 1


def spec_of(p: Param) -> P:
    """How a parameter is cut over the mesh.

    FFN experts lie on the devices of `expert`, and those share one out over `fsdp`; all else is
    shared out over both. Descriptions cut matrices along rows: TPUs pad the last axis to a multiple
    of 128.
    """
    if p.cut is None and p.expert is None:
        return P()
    axes: list[Any] = [None] * len(p.shape)
    if p.cut is not None:
        axes[p.cut] = _CUT if p.expert is None else "fsdp"
    if p.expert is not None:
        axes[p.expert] = "expert"
    return P(*axes)


def specs(described: Any) -> Any:
    """Specs of a tree of Param."""
    return jax.tree.map(spec_of, described)


def shardings(described: Any, mesh: Mesh) -> Any:
    """`specs` on a mesh."""
    return jax.tree.map(lambda p: NamedSharding(mesh, spec_of(p)), described)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)


def whole(described: Any, params: Any, dtype: Any) -> Any:
    """Puts parameters together from their parts, inside a shard_map over AXES.

    Of the FFN experts only this device's are, so they stay cut along `expert`. What moves is in the
    type of its use, of a model in `dtype`; the gradient goes back the same way, summed over the
    devices that it meets: by a reduce-scatter to the parts, then over their replicas.
    """

    def gather(p: Param, part):
        spec = spec_of(p)
        part = jax.lax.pcast(part, tuple(a for a in AXES if a not in axes_of(spec)), to="varying")
        for dim, entry in enumerate(spec):
            if entry == "expert":
                continue
            # Axis by axis: TPUs have no gather over all of a torus and would all-reduce zeros.
            for axis in reversed(axes_of((entry,))):
                if jax.lax.axis_size(axis) > 1:
                    # Along a matrix's first axis the devices need one of their own, behind it none:
                    # else TPUs all-reduce the gradient whole.
                    tiled = dim > 0 or part.ndim == 1
                    parts = jax.lax.all_gather(part, axis, axis=dim, tiled=tiled)
                    part = parts.reshape(*part.shape[:dim], -1, *part.shape[dim + 1 :])
        return part

    return jax.tree.map(gather, described, param.used(described, params, dtype))


def axes_of(spec) -> tuple[str, ...]:
    """The mesh axes that a spec shards over."""
    entries = [(e,) if isinstance(e, str) else e for e in spec if e is not None]
    return tuple(axis for entry in entries for axis in entry)
