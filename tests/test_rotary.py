"""Both ways of turning pairs, against complex numbers and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax import rotary

WAYS = {"halves": rotary.rotate, "by product": rotary.rotate_by_product}


def drawn(width: int, dtype=jnp.float32):
    rng = np.random.default_rng(width)
    x, d = rng.normal(size=(2, 2, 5, 3, width))
    angle = rng.uniform(0, 7, size=(2, 5, 1, width // 2))
    return jnp.asarray(x, dtype), jnp.asarray(d, dtype), jnp.asarray(angle, jnp.float32)


def turned(x, angle):
    real, imaginary = np.split(np.asarray(x, np.float64), 2, axis=-1)
    product = (real + 1j * imaginary) * np.exp(1j * np.asarray(angle, np.float64))
    return np.concatenate([product.real, product.imag], axis=-1)


@pytest.mark.parametrize("width", [2, 6, 64, 96])
@pytest.mark.parametrize("way", WAYS)
def test_pairs_turn_and_their_gradients_turn_back(way, width):
    x, d, angle = drawn(width)
    y, pullback = jax.vjp(lambda x: WAYS[way](x, angle), x)
    np.testing.assert_allclose(y, turned(x, angle), atol=1e-6)
    np.testing.assert_allclose(pullback(d)[0], turned(d, -angle), atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_half_a_turn_and_a_quarter_by_hand(way):
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    angle = jnp.asarray([np.pi, np.pi / 2], jnp.float32).reshape(1, 1, 1, 2)
    # Pair (1, 3) is turned round, of pair (2, 4) the second takes the first one's place.
    np.testing.assert_allclose(WAYS[way](x, angle).ravel(), [-1, -4, -3, 2], atol=1e-6)


def test_a_product_moves_numbers_whole():
    """Of bfloat16 the same as by halves, but for the order of two roundings."""
    x, d, angle = drawn(96, jnp.bfloat16)
    both = [jax.vjp(lambda x, way=way: way(x, angle), x) for way in WAYS.values()]
    (y, pullback), (other, other_pullback) = both
    assert y.dtype == other.dtype == jnp.bfloat16
    for a, b in ((y, other), (pullback(d)[0], other_pullback(d)[0])):
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=2**-7, atol=1e-6)
