"""What backward keeps of a block, and what it computes again, by `model.remat`.

Parts name what they make (`checkpoint_name`) where it is made: tokens that crossed the expert axis
in `moe.exchange` and `moe.paths`, and what the rest is called here in `_KEPT`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax


def _all_but_weights(primitive, *_, **__) -> bool:
    """Keeps everything for backward, but gathers parameters again: whole, they are another model.

    What only copies them (XLA's or ours) is not kept either; for activations it costs little.
    """
    return primitive.name not in _COPIES


_COPIES = {"all_gather", "convert_element_type", "reshape", "transpose", "squeeze", "pvary"}

# Each keeps what those before it keep: tokens at their experts and the experts' answers; where
# assignments go; the answers of attention; the first products of FFNs; the residual stream behind
# attention; queries, keys and values.
_KEPT = {
    "exchanged": ("to_experts", "from_experts"),
    "routing": ("routing",),
    "attention": ("attention",),
    "w_in": ("w_in",),
    "residual": ("residual",),
    "qkv": ("qkv",),
}
# cuDNN's attention as JAX calls it: what it makes cannot be named.
_NAMELESS = "dot_product_attention_fwd_wrapper"


def _keeping(last: str) -> Callable[..., bool]:
    """The policy that keeps what `_KEPT` has up to this one."""
    order = list(_KEPT)
    chosen = order[: order.index(last) + 1]
    named = jax.checkpoint_policies.save_only_these_names(*(n for c in chosen for n in _KEPT[c]))
    if "attention" not in chosen:
        return named

    def policy(primitive, *arguments, **parameters):
        return primitive.name == _NAMELESS or named(primitive, *arguments, **parameters)

    return policy


POLICIES = {
    "none": _all_but_weights,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _keeping("exchanged")
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
} | {name: _keeping(name) for name in _KEPT}
