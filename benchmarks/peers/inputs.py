"""Tokens and weights that every layer is given, as float32 arrays of numpy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moepp_jax import moe

TOP_K = 2
SCALE = 6.0  # of LongCat-Flash's gates
GAMMA = 1.1


class Sizes(NamedTuple):
    """Of a layer; tokens come as two sequences. `others`: constant, copy and zero experts."""

    tokens: int = 4096
    width: int = 768
    ffn_size: int = 2048
    n_ffn: int = 8
    others: tuple[int, int, int] = (2, 1, 1)
    tau: float = 0.75

    @property
    def pool(self) -> moe.Pool:
        return moe.Pool(self.n_ffn, *self.others)

    @property
    def ffn_experts(self) -> float:
        """A token's at balance."""
        weight = self.tau * self.n_ffn
        return TOP_K * weight / (weight + sum(self.others))


class Inputs(NamedTuple):
    """
    Attributes:
      x: (2, T / 2, D); its first column is 1, by which a router without biases has them.
      dy: the gradient of every output.
      routers: kind -> (N, D), at balance.
      ffn: "w_in" (E, 2, F, D), "w_out" (E, D, F).
      const: "w" (J, 2, D), "v" (J, D).
    """

    x: np.ndarray
    dy: np.ndarray
    routers: dict[str, np.ndarray]
    ffn: dict[str, np.ndarray]
    const: dict[str, np.ndarray]


def make(sizes: Sizes) -> Inputs:
    rng = np.random.default_rng(0)
    E, D, F, J = sizes.n_ffn, sizes.width, sizes.ffn_size, sizes.others[0]

    def matrix(*shape: int) -> np.ndarray:
        return np.float32(rng.normal(size=shape) / np.sqrt(shape[-1]))

    x = np.float32(rng.normal(size=(2, sizes.tokens // 2, D)))
    x[..., 0] = 1
    router = matrix(sizes.pool.size, D)
    router[:, 0] = 0
    mixed = router.copy()
    mixed[:E, 0] = _shift(x @ router.T, sizes)
    x = _clear(x, (router[:E], mixed))
    return Inputs(
        x,
        np.float32(rng.normal(size=x.shape)),
        {"vanilla": router[:E], "moepp": mixed, "identity": mixed},
        {"w_in": matrix(E, 2, F, D), "w_out": matrix(E, D, F)},
        {"w": matrix(J, 2, D), "v": np.float32(rng.normal(size=(J, D)))},
    )


def _clear(x: np.ndarray, routers: tuple[np.ndarray, ...], gap: float = 1e-4) -> np.ndarray:
    """Tokens whose choice of experts hangs on rounding are replaced by others, whose does not."""
    flat = x.reshape(-1, x.shape[-1])
    is_clear = np.ones(len(flat), bool)
    for router in routers:
        best = np.sort(flat @ router.T, axis=-1)
        is_clear &= best[:, -TOP_K] - best[:, -TOP_K - 1] > gap
    taken = np.resize(np.flatnonzero(is_clear), len(flat))
    return np.where(is_clear[:, None], flat, flat[taken]).reshape(x.shape)


def _shift(logits: np.ndarray, sizes: Sizes) -> np.float32:
    """What added to the FFN experts' logits gives a token as many of them as tau asks for."""
    low, high = -20.0, 20.0
    is_ffn = np.arange(logits.shape[-1]) < sizes.n_ffn
    for _ in range(40):
        shift = (low + high) / 2
        best = np.argsort(-(logits + shift * is_ffn), axis=-1)[..., :TOP_K]
        few = (best < sizes.n_ffn).sum(axis=-1).mean() < sizes.ffn_experts
        low, high = (shift, high) if few else (low, shift)
    return np.float32(high)
