"""A vanilla top-K mixture of SwiGLU experts (GShard's), written for itself, as short as it gets."""

import numpy as np


def moe(x_SD, w_ED, w_in, w_out, k: int, slots: int):
    """Gates are renormalised over the K chosen; each expert serves its first `slots` tokens."""
    y_SD, used = np.zeros_like(x_SD), np.zeros(len(w_ED), int)
    for x, y in zip(x_SD, y_SD, strict=True):
        p = np.exp(w_ED @ x)
        chosen = np.argsort(-p)[:k]
        used[chosen] += 1
        for e in chosen[used[chosen] <= slots]:
            gate, linear = w_in[e] @ x
            y += p[e] / p[chosen].sum() * (w_out[e] @ (gate / (1 + np.exp(-gate)) * linear))
    return y_SD
