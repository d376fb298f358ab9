"""The MoE++ layer: `local` on one device, `sharded` on a mesh."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from moepp_jax.moe import experts, losses
from moepp_jax.moe.experts import Pool
from moepp_jax.moe.losses import Statistics
from moepp_jax.moe.param import Param
from moepp_jax.moe.paths import Path
from moepp_jax.moe.rule import Routing, Rule

Params = Mapping[str, Any]


@dataclass(frozen=True)
class MoE:
    """What a layer computes, apart from its parameters.

    Attributes:
      rule: how tokens choose and weigh experts.
      path: how tokens reach the FFN experts: `paths.with_capacity` or `paths.dropless`.
      input_scale: multiplies what all experts read, not what the router reads.
      sequences: n, whole sequences of a group of tokens, one after the other, that share slots.
      others: adds what the zero-computation experts of the pool do; follows from it.
    """

    rule: Rule
    path: Path
    input_scale: float = 1.0
    sequences: int = 1
    others: Callable = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "others", experts.adding_others(self.pool))

    @property
    def pool(self) -> Pool:
        return self.rule.pool


class Routed(NamedTuple):
    """How a layer routed its tokens.

    Attributes:
      kept: which choices were served; an unused one never is.
      statistics: leading axis G.
    """

    routing: Routing
    kept: Bool[Array, "G S K"]
    statistics: Statistics


def describe(
    rule: Rule, width: int, ffn_size: int, std: float = 0.02, const_std: float = 1.0
) -> dict[str, Any]:
    """The parameters of a layer with SwiGLU experts, each described: a tree for `param.init`.

    What the rule has is in "router", its state among it.

    Args:
      std: standard deviation of every matrix.
      const_std: of the constant experts' vectors; 1 is the size of a normalised token.
    """
    D, F, E, J = width, ffn_size, rule.pool.n_ffn, rule.pool.n_const
    described = {
        "router": rule.params(D, std) | rule.state(),
        # Of the devices that share an expert each has a part of F: cut along D, the gradient of
        # w_out would be all-reduced whole on TPU.
        "ffn": {
            "w_in": Param((E, 2, F, D), std, cut=2, expert=0),
            "w_out": Param((E, D, F), std, cut=2, expert=0),
        },
    }
    if J:
        described["const"] = {
            "w": Param((J, 2, D), std, cut=2),
            "v": Param((J, D), const_std, cut=1, decay=False),
        }
    return described


def local(
    x_GSD: Float[Array, "G S D"],
    previous_GSN: Float[Array, "G S N"],
    params: Params,
    moe: MoE,
    axis: str | None = None,
) -> tuple[Float[Array, "G S D"], Float[Array, "G S N"], Statistics]:
    """One device's groups through the layer (eq. 1).

    Args: as `routed`.

    Returns:
      The output (no residual connection added), the router's logits for the next layer, and
      statistics with the leading axis G.
    """
    y, r = routed(x_GSD, previous_GSN, params, moe, axis)
    return y, r.routing.logits, r.statistics


def routed(
    x_GSD: Float[Array, "G S D"],
    previous_GSN: Float[Array, "G S N"],
    params: Params,
    moe: MoE,
    axis: str | None = None,
) -> tuple[Float[Array, "G S D"], Routed]:
    """As `local`, with all that is known of every token's way.

    Args:
      x_GSD: the layer's input.
      previous_GSN: the second output of the MoE layer before, zeros for the first layer.
      params: of `describe`: {"router": what the rule has, "ffn": as the path's expert function
        wants them, stacked over the FFN experts, "const": see `experts.zero_computation`, absent
        if J = 0}.
      axis: mesh axis over which the FFN experts are sharded, inside a shard_map; params["ffn"]
        then holds this device's experts.
    """
    state = moe.rule.state()
    router = {n: jax.lax.stop_gradient(p) if n in state else p for n, p in params["router"].items()}
    with jax.named_scope("router"):
        r = moe.rule.route(x_GSD, previous_GSN, router)
    x_GSD = x_GSD * jnp.asarray(moe.input_scale, x_GSD.dtype)
    y, kept = moe.path(x_GSD, r, params["ffn"], moe.rule, axis, moe.sequences)
    y = moe.others(y, x_GSD, r.experts, r.gates, kept, params.get("const", {}), moe.pool)
    return y, Routed(r, kept, losses.statistics(r, kept, moe.rule.measure(r), moe.sequences))


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


def _vary(params: Params, axes: tuple[str, ...], spec: P) -> Params:
    """Marks parameters as varying over the axes that their spec does not shard them over."""
    replicated = tuple(a for a in axes if a not in spec)
    return jax.tree.map(lambda p: jax.lax.pcast(p, replicated, to="varying"), params)
