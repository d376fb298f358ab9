"""How the tokens of packed documents attend to each other, and which kernel computes it.

A kernel is chosen when a model is built: the platform's own, or the one that `model.attention`
names. All of them compute the same, to rounding.

Shapes: the letters of `moepp_jax.block`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moepp_jax.block import Attend, attend_to_each_other, sight
from moepp_jax.config import ModelConfig
from moepp_jax.errors import ConfigError

# (document of each token (B, L)) -> how the tokens of a row attend, each to the earlier ones of its
# own document that are in its window.
Packed = Callable[[Int[Array, "B L"]], Attend]

_OF_PLATFORM = {"tpu": "splash", "gpu": "cudnn"}


def kernel(c: ModelConfig, platform: str, axes: tuple[str, ...] = ()) -> Packed:
    """The kernel that the configuration asks for, or else the platform's.

    Args:
      axes: of the shard_map in which it is called.

    Raises:
      ConfigError: see `chosen`.
    """
    return _KERNELS[chosen(c, platform)](c, axes)


def chosen(c: ModelConfig, platform: str) -> str:
    """Its name: "xla", "splash" or "cudnn".

    Raises:
      ConfigError: the kernel asked for is of another platform, or cannot compute this model.
    """
    own = _OF_PLATFORM.get(platform, "xla")
    name = own if c.attention == "auto" else c.attention
    if name not in (own, "xla"):
        raise ConfigError(
            f"config.model.attention = {name!r} is no kernel of this platform, {platform}: "
            f"choose 'auto', here {own!r}, or 'xla'"
        )
    obstacle = _OBSTACLE[name](c)
    if obstacle and c.attention != "auto":
        raise ConfigError(
            f"config.model.attention = {name!r} cannot compute this model: {obstacle}; "
            "choose 'auto' or 'xla'"
        )
    if obstacle:
        _say(f"attention is computed by XLA, not by {name}, which cannot: {obstacle}")
        name = "xla"
    return name


def xla(c: ModelConfig, axes: tuple[str, ...] = ()) -> Packed:
    """Plain products, for any platform; all scores of a head are written to memory."""

    def packed(segments_BL):
        return attend_to_each_other(_in_window(c, packed_mask(segments_BL)))

    return packed


def splash(c: ModelConfig, axes: tuple[str, ...] = (), interpret: bool = False) -> Packed:
    """See `moepp_jax.splash`."""
    from moepp_jax.splash import make  # the import of kernels takes as long as that of JAX

    attention = make(c.sliding_window, axes, interpret)

    def packed(segments_BL):
        return lambda q, k, v: (attention(q, k, v, segments_BL), None)

    return packed


def cudnn(c: ModelConfig, axes: tuple[str, ...] = ()) -> Packed:
    """cuDNN's fused kernel. What is after a token is skipped; documents and windows are a mask."""

    def packed(segments_BL):
        mask = _in_window(c, _same_document(segments_BL))[:, None]
        attention = functools.partial(
            jax.nn.dot_product_attention, mask=mask, is_causal=True, implementation="cudnn"
        )
        return lambda q, k, v: (attention(q, k, v), None)

    return packed


_KERNELS = {"xla": xla, "splash": splash, "cudnn": cudnn}


def _none(c: ModelConfig) -> str:
    return ""


def _of_splash(c: ModelConfig) -> str:
    return f"config.model.dtype = {c.dtype!r} is no type of a TPU" if c.dtype == "float16" else ""


def _of_cudnn(c: ModelConfig) -> str:
    """In JAX's words, which knows what cuDNN takes, and whether it is there."""
    if c.dtype == "float32":
        return "config.model.dtype = 'float32' is none of 'bfloat16' and 'float16'"
    heads = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
    shapes = [jax.ShapeDtypeStruct((1, 2, n, c.head_width), c.dtype) for n in heads.values()]
    segments = jax.ShapeDtypeStruct((1, 2), jnp.int32)

    def attention(segments, *heads):
        return jnp.sum(cudnn(c)(segments)(*heads)[0].astype(jnp.float32))

    try:
        jax.eval_shape(jax.grad(attention, argnums=(1, 2, 3)), segments, *shapes)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split()).rstrip(".")
    return ""


_OBSTACLE = {"xla": _none, "splash": _of_splash, "cudnn": _of_cudnn}


@functools.cache
def _say(line: str) -> None:
    """Once in a process, whatever is built there."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr)


def packed_mask(segments_BL: Int[Array, "B L"]) -> Bool[Array, "B L L"]:
    """Causal, and within a document: tokens see the earlier ones of their own segment.

    Under capacity the documents of a group still share its slots, earlier ones first.
    """
    L = segments_BL.shape[1]
    return _same_document(segments_BL) & jnp.tril(jnp.ones((L, L), bool))


def _same_document(segments_BL):
    return segments_BL[:, :, None] == segments_BL[:, None, :]


def _in_window(c: ModelConfig, mask_BLL):
    place_L = jnp.arange(mask_BLL.shape[1])
    return sight(c)(mask_BLL, place_L[:, None], place_L)
