"""Whether a model's parameters mean what they meant when another configuration computes with them.

Every field of config.model and config.moe must be the same, but for those that say how a model is
trained or computed: `_FREE` names them. A field that is added later is none of them until it is put
there. Of a routing rule's options those matter that change what `route` computes, which is seen
from its traced program: weights of losses, tau or the rate of a bias leave it as it is.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moepp_jax.config import Config, differences
from moepp_jax.moe import Rule, RuleError, param

# Fields of the model that its parameters do not depend on.
_FREE = {
    "model.init_std",
    "model.const_std",
    "model.dtype",
    "model.attention",
    "model.remat",
    "model.loss_chunk",
    "moe.gamma",
    "moe.group_size",
    "moe.dispatch",
    "moe.eval_dispatch",
    "moe.exchange_buffer",
    "moe.exchange_parts",
}


def unlike(theirs: Config, ours: Config) -> dict[str, tuple[Any, Any]]:
    """The fields that change what a parameter means: dotted name -> (value there, value here)."""
    a, b = ({name: c.to_dict()[name] for name in ("model", "moe")} for c in (theirs, ours))
    return {
        name: values
        for name, values in differences(a, b).items()
        if name not in _FREE and _matters(name, theirs.moe.rule, ours.moe.rule)
    }


def _matters(name: str, theirs: Rule, ours: Rule) -> bool:
    """Whether models that differ in this field compute differently."""
    option = name.removeprefix("moe.rule.")
    if option in (name, "type"):
        return True
    if type(theirs) is not type(ours):
        return False  # the type is named
    try:
        other = dataclasses.replace(ours, **{option: getattr(theirs, option)})
    except RuleError:
        return True
    return _program(other) != _program(ours)


def _program(rule: Rule, width: int = 8) -> tuple[str, list[bytes]]:
    """What `route` computes, written down: alike for rules that route alike."""
    tokens = jax.ShapeDtypeStruct((1, 4, width), jnp.float32)
    previous = jax.ShapeDtypeStruct((1, 4, rule.pool.size), jnp.float32)
    described = dict(rule.params(width, 0.5)) | dict(rule.state())
    traced = jax.make_jaxpr(rule.route)(tokens, previous, param.shapes(described))
    written = re.sub(r" at 0x[0-9a-f]+", "", str(traced.jaxpr))  # of functions in it
    return written, [np.asarray(constant).tobytes() for constant in traced.consts]
