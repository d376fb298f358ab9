"""Between tokens and vectors: the embedding, and the logits and losses of a large vocabulary.

Shapes: B sequences, L tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moepp_jax.mesh import BATCH


def output_matrix(params: dict[str, Any]) -> Float[Array, "V D"]:
    """The matrix of the vocabulary's logits: its own, or the embedding where they are tied."""
    return params["output"] if "output" in params else params["embedding"]


def logits(params: dict[str, Any], hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Float32 logits. For many tokens use `token_losses`, which never holds them all."""
    return _logits(output_matrix(params), hidden)


def _logits(w_VD, hidden):
    w_VD = w_VD.astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, w_VD, preferred_element_type=jnp.float32)


def token_losses(
    params: dict[str, Any],
    hidden_BLD: Float[Array, "B L D"],
    targets_BL: Int[Array, "B L"],
    chunk: int,
    mesh: Mesh | None = None,
) -> Float[Array, "B L"]:
    """Cross-entropy of every target in nats, `chunk` tokens of each sequence at a time.

    A chunk's logits are recomputed in the gradient, so (B, chunk, V) of them exist at most.
    """

    @jax.checkpoint
    def of_chunk(w_VD, hidden, targets):
        z = _logits(w_VD, hidden)
        at_target = jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(z, axis=-1) - at_target

    def losses(w_VD, hidden_BLD, targets_BL):
        B, L, D = hidden_BLD.shape
        size = min(chunk, L)
        parts = (
            hidden_BLD.reshape(B, L // size, size, D).swapaxes(0, 1),
            targets_BL.reshape(B, L // size, size).swapaxes(0, 1),
        )
        _, by_chunk = jax.lax.scan(lambda _, p: (None, of_chunk(w_VD, *p)), None, parts)
        return by_chunk.swapaxes(0, 1).reshape(B, L)

    matrix, dtype = output_matrix(params), hidden_BLD.dtype
    return _with_whole_matrix(losses, matrix, dtype, mesh, hidden_BLD, targets_BL)


def look_up(
    embedding_VD: Float[Array, "V D"], tokens_BL: Int[Array, "B L"], dtype, mesh: Mesh | None
) -> Float[Array, "B L D"]:
    """The embedding of every token, in `dtype`."""

    def rows(whole_VD, tokens_BL):
        return whole_VD[tokens_BL].astype(dtype)

    return _with_whole_matrix(rows, embedding_VD, dtype, mesh, tokens_BL)


def _with_whole_matrix(function, matrix_VD, dtype, mesh: Mesh | None, *of_batch):
    """function(matrix, *of_batch) on each device's sequences, with the matrix put together once.

    Its values are those of `dtype`, in which it and its gradient cross devices. But it is float32:
    the gradient sums over all chunks of tokens, or all places of a frequent token.
    """
    if mesh is None:
        return function(matrix_VD.astype(dtype).astype(jnp.float32), *of_batch)

    def on_device(shard, *of_batch):
        others = tuple(axis for axis in mesh.axis_names if axis != "fsdp")
        shard = jax.lax.pcast(shard.astype(dtype), others, to="varying")
        whole = jax.lax.all_gather(shard, "fsdp", axis=1, tiled=True)
        return function(whole.astype(jnp.float32), *of_batch)

    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P(None, "fsdp"), *(BATCH for _ in of_batch)),
        out_specs=BATCH,
    )(matrix_VD, *of_batch)
