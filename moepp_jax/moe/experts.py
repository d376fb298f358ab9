"""The experts: the pool, FFN experts over stacked parameters, and the three that cost nothing."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moepp_jax.moe.products import tokens_first


class Pool(NamedTuple):
    """How many experts of each kind there are. They are numbered in this order."""

    n_ffn: int
    n_const: int = 0
    n_copy: int = 0
    n_zero: int = 0

    def __str__(self) -> str:
        counts = zip(self, ("FFN", "constant", "copy", "zero"), strict=True)
        return " + ".join(f"{count} {kind}" for count, kind in counts)

    @property
    def n_zero_computation(self) -> int:
        return self.n_const + self.n_copy + self.n_zero

    @property
    def size(self) -> int:
        """N, all kinds."""
        return self.n_ffn + self.n_zero_computation

    @property
    def first_zero(self) -> int:
        """The number of the first zero expert (N where there is none)."""
        return self.size - self.n_zero


def activate(h_BH: Float[Array, "*B H"]) -> Float[Array, "*B F"]:
    """SiLU of the first half times the second."""
    gate, linear = jnp.split(h_BH, 2, axis=-1)
    return jax.nn.silu(gate) * linear


def as_one(w_in: Float[Array, "E 2 F D"]) -> Float[Array, "E H D"]:
    """Both matrices as one of H = 2 F rows: products over two axes make XLA copy them first."""
    return w_in.reshape(w_in.shape[0], -1, w_in.shape[3])


def one_swiglu(product: Callable) -> Callable:
    """`swiglu` of one expert: (its own w_in (2, F, D) and w_out (D, F), rows (B, D)) -> rows.

    Args:
      product: `tokens_first` or `few_weights_first`.
    """

    def expert(params, x_BD):
        w_in, w_out = params["w_in"], params["w_out"]
        return product(activate(product(x_BD, w_in.reshape(-1, w_in.shape[-1]))), w_out)

    return expert


class Keeping(NamedTuple):
    """An expert function whose gradient is given what forward has kept of its rows.

    Attributes:
      forward: (params stacked over E, rows (E, B, D)) -> rows (E, B, D), and arrays (E, B, ...).
      backward: (params, rows, those arrays, the gradient of forward's rows) -> the gradients of
        params and of rows.
    """

    forward: Callable
    backward: Callable

    def function(self) -> Callable:
        """(params, rows) -> rows, with that gradient."""
        expert = jax.custom_vjp(lambda params, x: self.forward(params, x)[0])

        def forward(params, x):
            y, kept = self.forward(params, x)
            return y, (params, x, kept)

        expert.defvjp(forward, lambda saved, d_y: self.backward(*saved, d_y))
        return expert


def _swiglu(matrices: Callable, joined: Callable) -> Keeping:
    """`swiglu` that makes the products of x, and keeps them, as these say.

    Args:
      matrices: w_in (E, 2, F, D) -> what x is multiplied with, (E, H, D) each.
      joined: their gradients -> that of w_in, in any shape.
    """

    def forward(params, x_EBD):
        h = [jnp.einsum("...ebd,ehd->...ebh", x_EBD, w) for w in matrices(params["w_in"])]
        h = [checkpoint_name(product, "w_in") for product in h]
        return jnp.einsum("...ebf,edf->...ebd", _activated(h), params["w_out"]), h

    def backward(params, x_EBD, h, d_y):
        w_in, w_out = params["w_in"], params["w_out"]
        a, pullback = jax.vjp(_activated, h)
        (d_h,) = pullback(jnp.einsum("...ebd,edf->...ebf", d_y, w_out).astype(a.dtype))
        d_in = joined([jnp.einsum("...ebh,...ebd->ehd", d, x_EBD) for d in d_h])
        d_out = jnp.einsum("...ebd,...ebf->edf", d_y, a)
        d_x = [
            jnp.einsum("...ebh,ehd->...ebd", d, w) for d, w in zip(d_h, matrices(w_in), strict=True)
        ]
        d_params = {
            "w_in": d_in.reshape(w_in.shape).astype(w_in.dtype),
            "w_out": d_out.astype(w_out.dtype),
        }
        return d_params, functools.reduce(jnp.add, d_x).astype(x_EBD.dtype)

    return Keeping(forward, backward)


def _activated(h: Sequence[Float[Array, "..."]]) -> Float[Array, "..."]:
    """`activate` of both halves in one array, or apart."""
    return activate(h[0]) if len(h) == 1 else jax.nn.silu(h[0]) * h[1]


def swiglu(
    params: Mapping[str, Float[Array, "..."]], x_EBD: Float[Array, "*n E B D"]
) -> Float[Array, "*n E B D"]:
    """W_out (SiLU(W_gate x) * W_up x), every expert on its own rows, whatever axes come before.

    The gradient keeps the products of x and computes the activation from them again. In checkpoint
    policies their name is "w_in".

    Args:
      params: "w_in" (E, 2, F, D), the gate's matrix and then the linear one, and "w_out" (E, D, F).
    """
    return _AS_ONE(params, x_EBD)


def swiglu_in_turn(
    params: Mapping[str, Float[Array, "..."]], x_EBD: Float[Array, "E B D"]
) -> Float[Array, "E B D"]:
    """`swiglu`, of many rows by products for each expert.

    On CPUs one product for all experts takes longer then, and for few rows it does not: each
    expert's parameters are copied to be multiplied alone.
    """
    if x_EBD.shape[1] < _MANY:
        return _AS_ONE(params, x_EBD)
    E = len(x_EBD)
    each = jnp.split(params["w_in"], E), jnp.split(params["w_out"], E), jnp.split(x_EBD, E)
    return jnp.concatenate(
        [_AS_ONE({"w_in": w_in, "w_out": w_out}, x) for w_in, w_out, x in zip(*each, strict=True)]
    )


# Rows of an expert. Of 768 numbers, F = 2,048: forward 0.89 of the time at 676 rows and 0.82 at
# 376, with backward 0.90 and 0.91; at 282 0.99, at 188 0.95 to 1.1 (8 or 16 experts, two cores
# of an AMD EPYC, jax 0.10.2).
_MANY = 256


def swiglu_apart(
    params: Mapping[str, Float[Array, "..."]], x_EBD: Float[Array, "*n E B D"]
) -> Float[Array, "*n E B D"]:
    """`swiglu`, whose two products of x are two."""
    return _APART(params, x_EBD)


# `swiglu`, for those who keep the products of x themselves.
KEEPING_SWIGLU = _swiglu(lambda w_in: [as_one(w_in)], lambda d: d[0])

_AS_ONE = KEEPING_SWIGLU.function()
_APART = _swiglu(lambda w_in: [w_in[:, 0], w_in[:, 1]], lambda d: jnp.stack(d, axis=1)).function()


@jax.named_scope("zero_computation")
def zero_computation(
    x_GSD: Float[Array, "G S D"],
    experts_GSK: Int[Array, "G S K"],
    gates_GSK: Float[Array, "G S K"],
    kept_GSK: Bool[Array, "G S K"],
    params: Mapping[str, Float[Array, "..."]],
    pool: Pool,
) -> Float[Array, "G S D"]:
    """What zero, copy and constant experts add to the output (eq. 3 to 5), on the token's device.

    Zero adds nothing, copy adds g x, constant j adds g (a1 x + a2 v_j) with
    [a1, a2] = softmax(W_c,j x). All of them together are x times one number a token, plus a
    product with the J constant vectors: nothing is moved and nothing is stored.

    Args:
      params: "w" (J, 2, D), row 0 weighs x and row 1 weighs v, and "v" (J, D); unread if J = 0.
    """
    gates = jnp.where(kept_GSK, gates_GSK, 0.0)
    copies = (experts_GSK >= pool.n_ffn + pool.n_const) & (experts_GSK < pool.first_zero)
    scale_GS = jnp.sum(jnp.where(copies, gates, 0.0), axis=-1)
    if pool.n_const == 0:
        return (scale_GS[..., None] * x_GSD).astype(x_GSD.dtype)
    constants = experts_GSK[..., None] == pool.n_ffn + jnp.arange(pool.n_const)
    gates_GSJ = jnp.sum(jnp.where(constants, gates[..., None], 0.0), axis=2)
    mix_GSJ2 = tokens_first(x_GSD, params["w"].reshape(-1, x_GSD.shape[-1]))
    mix_GSJ2 = mix_GSJ2.astype(jnp.float32).reshape(*gates_GSJ.shape, 2)
    mix_GSJ2 = gates_GSJ[..., None] * jax.nn.softmax(mix_GSJ2, axis=-1)
    scale_GS += jnp.sum(mix_GSJ2[..., 0], axis=-1)
    constant_GSD = tokens_first(mix_GSJ2[..., 1].astype(x_GSD.dtype), params["v"].T)
    return (scale_GS[..., None] * x_GSD + constant_GSD).astype(x_GSD.dtype)


def adding_others(pool: Pool) -> Callable:
    """(y, what `zero_computation` takes) -> y with what its experts add.

    Where none of them adds anything, which the compiler cannot see, nothing is computed.
    """
    return _with_zero_computation if pool.n_const or pool.n_copy else _as_it_is


def _with_zero_computation(y_GSD, *arguments):
    return y_GSD + zero_computation(*arguments)


def _as_it_is(y_GSD, x_GSD, *arguments):
    return y_GSD.astype(jnp.promote_types(y_GSD.dtype, x_GSD.dtype))
