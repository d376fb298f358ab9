"""Products of tokens with a matrix."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def tokens_first(
    x_BD: Float[Array, "*B D"], w_FD: Float[Array, "F D"], dtype=None, precision=None
) -> Float[Array, "*B F"]:
    """x W^T, in `dtype` or that of x.

    The tokens' axes are made one: of two, XLA on CPU transposes a copy of x, or of what comes back
    for the product, to make the gradient of W.
    """
    y = jnp.einsum(
        "td,fd->tf",
        x_BD.reshape(-1, x_BD.shape[-1]),
        w_FD,
        precision=precision,
        preferred_element_type=dtype,
    )
    return y.reshape(*x_BD.shape[:-1], -1)


def any_axes(x_BD: Float[Array, "*B D"], w_FD: Float[Array, "F D"]) -> Float[Array, "*B F"]:
    """As `tokens_first`, for TPUs, which contract several axes in any order of memory.

    Made one, they are copied for it.
    """
    return jnp.einsum("...d,fd->...f", x_BD, w_FD)


def few_weights_first(x_BD: Float[Array, "*B D"], w_FD: Float[Array, "F D"], dtype=None):
    """As `tokens_first`, for CPUs: of 2 to 8 tokens as W x^T.

    So it reads the weights as fast as memory gives them; the other way round takes twice as long.
    The compiler would turn it, so it must not look.
    """
    few_BD = x_BD.reshape(-1, x_BD.shape[-1])
    if not 2 <= len(few_BD) <= 8:
        return tokens_first(x_BD, w_FD, dtype)
    y_FB = jax.lax.dot_general(w_FD, few_BD, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    return jax.lax.optimization_barrier(y_FB).T.reshape(*x_BD.shape[:-1], -1)
