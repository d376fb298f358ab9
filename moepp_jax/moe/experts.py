"""The experts: the pool, FFN experts over stacked parameters, and the three that cost nothing."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Pool(NamedTuple):
    """How many experts of each kind there are. They are numbered in this order."""

    n_ffn: int
    n_const: int = 0
    n_copy: int = 0
    n_zero: int = 0

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


@jax.custom_vjp
def swiglu(
    params: Mapping[str, Float[Array, "..."]], x_EBD: Float[Array, "E B D"]
) -> Float[Array, "E B D"]:
    """W_out (SiLU(W_gate x) * W_up x), every expert on its own rows.

    The gradient keeps the two products of x and makes the rest again, which costs less than memory.

    Args:
      params: "w_in" (E, 2, F, D), the gate's matrix and then the linear one, and "w_out" (E, D, F).
    """
    return _swiglu_fwd(params, x_EBD)[0]


def _activate(h_EB2F: Float[Array, "E B 2 F"]) -> Float[Array, "E B F"]:
    return jax.nn.silu(h_EB2F[:, :, 0]) * h_EB2F[:, :, 1]


def _swiglu_fwd(params, x_EBD):
    h = jnp.einsum("ebd,ehfd->ebhf", x_EBD, params["w_in"])
    return jnp.einsum("ebf,edf->ebd", _activate(h), params["w_out"]), (params, x_EBD, h)


def _swiglu_bwd(saved, d_y):
    params, x_EBD, h = saved
    a, pullback = jax.vjp(_activate, h)
    (d_h,) = pullback(jnp.einsum("ebd,edf->ebf", d_y, params["w_out"]))
    d_params = {
        "w_in": jnp.einsum("ebhf,ebd->ehfd", d_h, x_EBD),
        "w_out": jnp.einsum("ebd,ebf->edf", d_y, a),
    }
    d_params = {name: d.astype(params[name].dtype) for name, d in d_params.items()}
    return d_params, jnp.einsum("ebhf,ehfd->ebd", d_h, params["w_in"]).astype(x_EBD.dtype)


swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


@dataclass(frozen=True)
class OneByOne:
    """An expert function that takes the experts one after the other where no gradient is asked.

    On CPUs an expert's intermediates then stay in cache: faster than the bare batched products. The
    gradient is that of the function itself.

    Attributes:
      expert: (params stacked over E, rows (E, B, D)) -> rows (E, B, D).
    """

    expert: Callable

    def __call__(self, params, x_EBD: Float[Array, "E B D"]) -> Float[Array, "E B D"]:
        return _one_by_one(self.expert, params, x_EBD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one_by_one(expert, params, x_EBD):
    def one(params_and_rows):
        return expert(*jax.tree.map(lambda a: a[None], params_and_rows))[0]

    return jax.lax.map(one, (params, x_EBD))


def _one_by_one_fwd(expert, params, x_EBD):
    return jax.vjp(expert, params, x_EBD)


def _one_by_one_bwd(expert, pullback, d_y):
    return pullback(d_y)


_one_by_one.defvjp(_one_by_one_fwd, _one_by_one_bwd)


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
    mix_GSJ2 = jnp.einsum("gsd,jcd->gsjc", x_GSD, params["w"]).astype(jnp.float32)
    mix_GSJ2 = gates_GSJ[..., None] * jax.nn.softmax(mix_GSJ2, axis=-1)
    scale_GS += jnp.sum(mix_GSJ2[..., 0], axis=-1)
    constant_GSD = jnp.einsum("gsj,jd->gsd", mix_GSJ2[..., 1].astype(x_GSD.dtype), params["v"])
    return (scale_GS[..., None] * x_GSD + constant_GSD).astype(x_GSD.dtype)
