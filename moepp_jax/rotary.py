"""Rotary positions: how far the pairs of a head turn, and two ways of turning them.

The rotate-half convention: pair i of a head of width W is (i, i + W / 2).

Shapes: B sequences, L tokens, H heads of width W = 2 R.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moepp_jax.config import ModelConfig
from moepp_jax.moe.layouts import in_order


def _frequencies(c: ModelConfig) -> Float[Array, " R"]:
    W = c.head_width
    return c.rope_theta ** (-jnp.arange(0, W, 2, dtype=jnp.float32) / W)


def linear_angles(c: ModelConfig, positions: Float[Array, "*B"]) -> Float[Array, "*B R"]:
    """Positions are divided by `rope_scaling`."""
    return positions[..., None] / c.rope_scaling * _frequencies(c)


def llama3_angles(c: ModelConfig, positions: Float[Array, "*B"]) -> Float[Array, "*B R"]:
    """Slow frequencies are divided by `rope_scaling`, fast ones stay, between it is a mean of both.

    Slow and fast is how often one turns in `rope_original_length` tokens.
    """
    frequency, low, high = _frequencies(c), c.rope_low_freq_factor, c.rope_high_freq_factor
    turns = c.rope_original_length * frequency / (2 * math.pi)
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return positions[..., None] * frequency * (kept + (1 - kept) / c.rope_scaling)


# How far rotary positions turn, by config.model.rope_type.
ANGLES = {"linear": linear_angles, "llama3": llama3_angles}


def rotate(
    x_BLHW: Float[Array, "B L H W"], angle: Float[Array, "B L 1 R"]
) -> Float[Array, "B L H W"]:
    """Turns every pair, in float32."""
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x_BLHW.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x_BLHW.dtype)


@jax.custom_vjp
def rotate_by_product(
    x_BLHW: Float[Array, "B L H W"], angle: Float[Array, "B L 1 R"]
) -> Float[Array, "B L H W"]:
    """As `rotate`, for TPUs: halves change places in a product with a permutation.

    So heads are read and written once, each in one run, as attention's kernel reads them. Halves of
    a head fill no tile of a TPU, whose compiler writes them apart, of heads in float32, and joins
    them.

    The gradient turns back.
    """
    return _turned(x_BLHW, angle)


def _turned(x_BLHW, angle):
    W = x_BLHW.shape[-1]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    sin, cos = jnp.concatenate([-sin, sin], axis=-1), jnp.concatenate([cos, cos], axis=-1)
    x_BLHW = _heads_in_one_run(x_BLHW)
    swap = jnp.roll(jnp.eye(W, dtype=x_BLHW.dtype), W // 2, axis=0)
    # Each number of the product is one of x, whole.
    other = jnp.einsum(
        "blhw,wv->blhv",
        x_BLHW,
        swap,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    rotated = x_BLHW.astype(jnp.float32) * cos + other * sin
    return _heads_in_one_run(rotated.astype(x_BLHW.dtype))


def _heads_in_one_run(x_BLHW):
    return in_order(x_BLHW, 0, 2, 1, 3)


def _forward(x_BLHW, angle):
    return _turned(x_BLHW, angle), angle


def _backward(angle, d_BLHW):
    return _turned(d_BLHW, -angle), None


rotate_by_product.defvjp(_forward, _backward)
