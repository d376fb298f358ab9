"""Between tokens and vectors: the embedding, and the logits and losses of a large vocabulary.

Shapes: B sequences, L tokens, D width, V vocabulary. The matrices are whole.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moepp_jax.moe.products import tokens_first


def logits(w_VD: Float[Array, "V D"], hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Float32 logits. Of many tokens: `token_losses`, which never holds them all."""
    return tokens_first(hidden, w_VD.astype(hidden.dtype), jnp.float32)


def token_losses(
    w_VD: Float[Array, "V D"],
    hidden_BLD: Float[Array, "B L D"],
    targets_BL: Int[Array, "B L"],
    chunk: int,
) -> Float[Array, "B L"]:
    """Cross-entropy of every target in nats, `chunk` tokens of each sequence at a time.

    For evaluation: what is trained on is `weighted_loss`.
    """
    B = len(hidden_BLD)

    def of_chunk(_, of):
        z, normaliser = _normalised(w_VD, of["hidden"])
        return None, normaliser - _at(z, of["targets"])

    parts = _chunks({"hidden": hidden_BLD, "targets": targets_BL}, chunk)
    _, by_chunk = jax.lax.scan(of_chunk, None, parts)
    return by_chunk.swapaxes(0, 1).reshape(B, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_loss(
    w_VD: Float[Array, "V D"],
    hidden_BLD: Float[Array, "B L D"],
    targets_BL: Int[Array, "B L"],
    weights_BL: Float[Array, "B L"],
    chunk: int,
) -> Float[Array, ""]:
    """The sum of `token_losses` times their weights, which have no gradient.

    What the gradients are is known with the logits, up to a number that comes later: so they are
    made at once, and neither are logits computed again in backward nor do more of them exist than
    (B, chunk, V). Their products are of the type of `hidden`, summed in float32.
    """
    return jnp.sum(weights_BL * token_losses(w_VD, hidden_BLD, targets_BL, chunk))


def _weighted_loss_fwd(w_VD, hidden_BLD, targets_BL, weights_BL, chunk):
    V, D = w_VD.shape
    w = w_VD.astype(hidden_BLD.dtype)

    def of_chunk(d_w_VD, of):
        z, normaliser = _normalised(w, of["hidden"])
        nll = normaliser - _at(z, of["targets"])
        p = jnp.exp(z - normaliser[..., None])
        d_z = jnp.where(jnp.arange(V) == of["targets"][..., None], p - 1, p)
        d_z = (of["weights"][..., None] * d_z).astype(w.dtype).reshape(-1, V)
        of_w = ("tv,td->vd", d_z, of["hidden"].reshape(-1, D))
        d_w_VD += jnp.einsum(*of_w, preferred_element_type=d_w_VD.dtype)
        d_hidden = jnp.einsum("tv,vd->td", d_z, w, preferred_element_type=d_w_VD.dtype)
        return d_w_VD, (nll, d_hidden.astype(w.dtype).reshape(of["hidden"].shape))

    given = {"hidden": hidden_BLD, "targets": targets_BL, "weights": weights_BL}
    # Varying over the mesh as the targets do: shard_map asks that of what a scan carries.
    zeros = jnp.zeros((V, D), jnp.promote_types(jnp.float32, w.dtype)) + 0 * targets_BL[0, 0]
    d_w_VD, by_chunk = jax.lax.scan(of_chunk, zeros, _chunks(given, chunk))
    nll, d_hidden = (a.swapaxes(0, 1).reshape(*targets_BL.shape, *a.shape[3:]) for a in by_chunk)
    return jnp.sum(weights_BL * nll), (d_w_VD, d_hidden, w_VD[:0])


def _weighted_loss_bwd(chunk, kept, d_loss):
    d_w_VD, d_hidden, like_w = kept
    d_hidden = (d_loss * d_hidden).astype(d_hidden.dtype)
    return (d_loss * d_w_VD).astype(like_w.dtype), d_hidden, None, None


weighted_loss.defvjp(_weighted_loss_fwd, _weighted_loss_bwd)


def _chunks(arrays: dict[str, Array], chunk: int) -> dict[str, Array]:
    """(B, L, ...) as (L / chunk, B, chunk, ...); a shorter sequence is one chunk."""

    def split(a):
        B, L, *rest = a.shape
        size = min(chunk, L)
        return a.reshape(B, L // size, size, *rest).swapaxes(0, 1)

    return jax.tree.map(split, arrays)


def _normalised(w_VD, hidden_BCD):
    """The logits of a chunk, and the logarithm of the sum of their exponentials."""
    z = logits(w_VD, hidden_BCD)
    return z, jax.nn.logsumexp(z, axis=-1)


def _at(z_BCV, targets_BC):
    return jnp.take_along_axis(z_BCV, targets_BC[..., None], axis=-1)[..., 0]


def look_up(
    embedding_VD: Float[Array, "V D"], tokens_BL: Int[Array, "B L"], dtype: Any
) -> Float[Array, "B L D"]:
    """The embedding of every token, in `dtype`."""
    # Float32 in between: the gradient is a sum over all places of a frequent token.
    return embedding_VD.astype(dtype).astype(jnp.float32)[tokens_BL].astype(dtype)
