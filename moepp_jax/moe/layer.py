"""The MoE++ layer: `local` on one device, `sharded` on a mesh, `MoEPP` as a Flax module."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from moepp_jax.moe import losses, router
from moepp_jax.moe.experts import Pool, zero_computation
from moepp_jax.moe.losses import Statistics
from moepp_jax.moe.paths import Path
from moepp_jax.moe.router import Router, route

Params = Mapping[str, Any]


@dataclass(frozen=True)
class MoE:
    """What a layer computes, apart from its parameters.

    Attributes:
      pool: how many experts of each kind.
      router: how tokens choose and weigh them.
      path: how tokens reach the FFN experts: `paths.with_capacity` or `paths.dropless`.
      input_scale: multiplies what all experts read, not what the router reads.
    """

    pool: Pool
    router: Router
    path: Path
    input_scale: float = 1.0


def local(
    x_GSD: Float[Array, "G S D"],
    previous_GSN: Float[Array, "G S N"],
    params: Params,
    moe: MoE,
    axis: str | None = None,
) -> tuple[Float[Array, "G S D"], Float[Array, "G S N"], Statistics]:
    """One device's groups through the layer (eq. 1).

    Args:
      x_GSD: the layer's input.
      previous_GSN: the second output of the MoE layer before, zeros for the first layer.
      params: {"router": see `router.route`, "ffn": as the path's expert function wants them,
        stacked over the FFN experts, "const": see `experts.zero_computation`, absent if J = 0}.
      axis: mesh axis over which the FFN experts are sharded, inside a shard_map; params["ffn"]
        then holds this device's experts.

    Returns:
      The output (no residual connection added), the router's logits for the next layer, and
      statistics with the leading axis G.
    """
    r = route(x_GSD, previous_GSN, params["router"], moe.router, moe.pool.first_zero)
    x_GSD = x_GSD * jnp.asarray(moe.input_scale, x_GSD.dtype)
    y, kept = moe.path(x_GSD, r.experts, r.gates, params["ffn"], moe.pool, axis)
    y += zero_computation(x_GSD, r.experts, r.gates, kept, params.get("const", {}), moe.pool)
    return y, r.logits, losses.statistics(r, kept)


def sharded(
    x_GSD: Float[Array, "G S D"],
    previous_GSN: Float[Array, "G S N"],
    params: Params,
    moe: MoE,
    mesh: Mesh,
    expert_axis: str = "expert",
) -> tuple[Float[Array, "G S D"], Float[Array, "G S N"], Statistics]:
    """As `local`, with groups sharded over all axes of the mesh and FFN experts over one.

    One shard_map holds the whole layer, router included: around the exchange alone, top_k makes the
    partitioner gather every token's probabilities.

    Raises:
      ValueError: groups or FFN experts do not divide by the devices that they are sharded over.
    """
    devices = mesh.shape[expert_axis]
    if moe.pool.n_ffn % devices:
        raise ValueError(
            f"{moe.pool.n_ffn} FFN experts cannot be split over the {devices} devices of mesh axis "
            f"{expert_axis!r}: choose an axis size that divides them"
        )
    if x_GSD.shape[0] % mesh.size:
        raise ValueError(
            f"{x_GSD.shape[0]} groups of tokens cannot be split over {mesh.size} devices: "
            "choose a batch of sequences that they divide"
        )
    everywhere = mesh.axis_names
    tokens = P(everywhere)
    specs = {group: P(expert_axis) if group == "ffn" else P() for group in params}

    def on_device(x, previous, params):
        # Gradients of what is replicated are summed where it starts to vary.
        params = {group: _vary(params[group], everywhere, specs[group]) for group in params}
        return local(x, previous, params, moe, expert_axis if devices > 1 else None)

    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(tokens, tokens, specs),
        out_specs=(tokens, tokens, tokens),
    )(x_GSD, previous_GSN, dict(params))


def init(
    key: Array, moe: MoE, width: int, ffn_size: int, std: float = 0.02
) -> dict[str, dict[str, Float[Array, "..."]]]:
    """Parameters for `local` with SwiGLU experts: matrices N(0, std), constant vectors N(0, 1)."""
    groups = _declare(moe, width, ffn_size, std)
    keys = jax.random.split(key, len(groups))
    return {group: make(k) for k, (group, make) in zip(keys, groups.items(), strict=True)}


class MoEPP(nn.Module):
    """The layer as a Flax module over sequences, with its parameters declared.

    The parameters are those of `local`: a dictionary of the groups router, ffn and const.

    Attributes:
      moe: what is computed.
      ffn_size: F.
      group_size: S, tokens that share a capacity; divides L.
      mesh: run under a shard_map on it, or on this device if None.
      axis: inside the caller's own shard_map, the mesh axis over which the FFN experts are sharded;
        their parameters are then this device's.
      init_std: standard deviation of every matrix.
      dtype: of the experts' arithmetic; parameters and router are float32.
    """

    moe: MoE
    ffn_size: int
    group_size: int
    mesh: Mesh | None = None
    axis: str | None = None
    init_std: float = 0.02
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], previous_BLN: Float[Array, "B L N"]
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L N"], Statistics]:
        D, N = x_BLD.shape[-1], self.moe.pool.size
        devices = jax.lax.axis_size(self.axis) if self.axis else 1
        declared = _declare(self.moe, D, self.ffn_size, self.init_std, devices)
        params = {group: self.param(group, make) for group, make in declared.items()}
        computed = {group: params[group] for group in params if group != "router"}
        params |= jax.tree.map(lambda p: p.astype(self.dtype), computed)
        if x_BLD.shape[1] % self.group_size:
            raise ValueError(
                f"groups of {self.group_size} tokens do not divide sequences of {x_BLD.shape[1]}"
            )
        x_GSD = x_BLD.reshape(-1, self.group_size, D)
        previous_GSN = previous_BLN.reshape(-1, self.group_size, N)
        if self.mesh is None:
            y, logits, stats = local(x_GSD, previous_GSN, params, self.moe, self.axis)
        else:
            y, logits, stats = sharded(x_GSD, previous_GSN, params, self.moe, self.mesh)
        return y.reshape(x_BLD.shape), logits.reshape(previous_BLN.shape), stats


def _declare(moe: MoE, D: int, F: int, std: float, devices: int = 1) -> dict[str, Callable]:
    """For each group of parameters a function key -> {name: array}, of one of the devices."""
    E, J, N = moe.pool.n_ffn // devices, moe.pool.n_const, moe.pool.size
    gate = {"w": (N, D)}
    if moe.router.project is router.two_layer:
        gate = {"w_hidden": (8 * N, D), "w_logits": (N, 8 * N)}
    if moe.router.residual is not router.no_residual:
        gate["w_residual"] = (N, N)
    if moe.router.bias is not router.no_bias:
        gate["bias"] = (N,)
    shapes = {"router": gate, "ffn": {"w_in": (E, 2, F, D), "w_out": (E, D, F)}}
    if J:
        shapes["const"] = {"w": (J, 2, D), "v": (J, D)}

    # A constant expert's vector is of the size of a normalised token; a bias starts at nothing.
    deviation = {"v": 1.0, "bias": 0.0}

    def maker(shapes):
        def make(key):
            keys = jax.random.split(key, len(shapes))
            return {
                name: deviation.get(name, std) * jax.random.normal(k, shape, jnp.float32)
                for k, (name, shape) in zip(keys, shapes.items(), strict=True)
            }

        return make

    return {group: maker(s) for group, s in shapes.items()}


def _vary(params: Params, axes: tuple[str, ...], spec: P) -> Params:
    """Marks parameters as varying over the axes that their spec does not shard them over."""
    replicated = tuple(a for a in axes if a not in spec)
    return jax.tree.map(lambda p: jax.lax.pcast(p, replicated, to="varying"), params)
