"""Between tokens and vectors: the embedding, and the logits and losses of a large vocabulary.

Shapes: B sequences, L tokens, D width, V vocabulary. The matrices are whole.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moepp_jax.moe.products import tokens_first


def logits(w_VD: Float[Array, "V D"], hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Float32 logits. For many tokens use `token_losses`, which never holds them all."""
    return tokens_first(hidden, w_VD.astype(hidden.dtype), jnp.float32)


def token_losses(
    w_VD: Float[Array, "V D"],
    hidden_BLD: Float[Array, "B L D"],
    targets_BL: Int[Array, "B L"],
    chunk: int,
) -> Float[Array, "B L"]:
    """Cross-entropy of every target in nats, `chunk` tokens of each sequence at a time.

    A chunk's logits are recomputed in the gradient, so (B, chunk, V) of them exist at most.
    """
    B, L, D = hidden_BLD.shape
    size = min(chunk, L)
    w_VD = _summing_in_float32(w_VD, hidden_BLD.dtype)

    @jax.checkpoint
    def of_chunk(hidden, targets):
        z = _logits_of_training(w_VD, hidden)
        at_target = jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(z, axis=-1) - at_target

    chunks = (
        hidden_BLD.reshape(B, L // size, size, D).swapaxes(0, 1),
        targets_BL.reshape(B, L // size, size).swapaxes(0, 1),
    )
    _, by_chunk = jax.lax.scan(lambda _, c: (None, of_chunk(*c)), None, chunks)
    return by_chunk.swapaxes(0, 1).reshape(B, L)


@jax.custom_vjp
def _logits_of_training(
    w_VD: Float[Array, "V D"], hidden_BLD: Float[Array, "B L D"]
) -> Float[Array, "B L V"]:
    """`logits`, whose gradients too are products in the type of `hidden`, summed in float32.

    Left to itself, JAX multiplies the logits' gradient, which is float32, as it is: on GPUs in half
    the speed of bfloat16 or less, and with operands of twice the size.
    """
    return logits(w_VD, hidden_BLD)


def _forward(w_VD, hidden_BLD):
    return logits(w_VD, hidden_BLD), (w_VD, hidden_BLD)


def _backward(kept, d_logits):
    w_VD, hidden_BLD = kept
    dtype, D = hidden_BLD.dtype, hidden_BLD.shape[-1]
    d_TV = d_logits.astype(dtype).reshape(-1, len(w_VD))
    hidden_TD = hidden_BLD.reshape(-1, D)
    d_w_VD = jnp.einsum("tv,td->vd", d_TV, hidden_TD, preferred_element_type=jnp.float32)
    d_hidden_TD = jnp.einsum(
        "tv,vd->td", d_TV, w_VD.astype(dtype), preferred_element_type=jnp.float32
    )
    return d_w_VD.astype(w_VD.dtype), d_hidden_TD.astype(dtype).reshape(hidden_BLD.shape)


_logits_of_training.defvjp(_forward, _backward)


def look_up(
    embedding_VD: Float[Array, "V D"], tokens_BL: Int[Array, "B L"], dtype: Any
) -> Float[Array, "B L D"]:
    """The embedding of every token, in `dtype`."""
    return _summing_in_float32(embedding_VD, dtype)[tokens_BL].astype(dtype)


def _summing_in_float32(matrix_VD, dtype):
    """The matrix with the values of `dtype`, whose gradient is summed in float32.

    It is a sum over all chunks of tokens, or all places of a frequent token.
    """
    return matrix_VD.astype(dtype).astype(jnp.float32)
