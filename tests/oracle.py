"""The MoE++ layer one token at a time: the specification that the package is held to.

float64 numpy and plain loops, to be read beside section 3 of the paper (arXiv 2410.07348); what
the paper leaves open follows the authors' inference code and says so ("code"). It shares nothing
with the package and knows no device, no buffer and no gradient.

Experts are numbered FFN first, then constant, copy, zero. The parameters are
  router  w (N, D), or for the two-layer gate w_hidden (H, D) and w_logits (N, H); w_residual (N, N)
  ffn     w_in (E, 2, F, D), the SiLU half and then the linear half; w_out (E, D, F)
  const   w (J, 2, D), v (J, D)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Spec:
    n_ffn: int
    n_const: int = 0
    n_copy: int = 0
    n_zero: int = 0
    top_k: int = 2
    gate: str = "renormalise_nonzero"
    residual: bool = True
    two_layer: bool = False
    logit_std: float | None = None  # None: logits are not normalised
    input_scale: float = 1.0
    tau: float = 0.75
    gamma: float | None = None  # None: no capacity, nothing is dropped

    @property
    def kinds(self) -> list[str]:
        return (
            ["ffn"] * self.n_ffn
            + ["const"] * self.n_const
            + ["copy"] * self.n_copy
            + ["zero"] * self.n_zero
        )


class Output(NamedTuple):
    """Per group g, token s: y, logits, experts, gates, kept; per group the mean statistics."""

    y: np.ndarray
    logits: np.ndarray
    experts: np.ndarray
    gates: np.ndarray
    kept: np.ndarray
    load: np.ndarray  # f_i, share of the tokens that choose expert i
    served: np.ndarray  # share of the tokens whose choice of expert i was kept
    prob: np.ndarray  # P_i, mean probability of expert i
    entropy: np.ndarray  # nats
    z: np.ndarray  # squared log-sum-exp of the logits


def layer(spec: Spec, x_GSD, previous_GSN, params: Mapping) -> Output:
    """Eq. 1: y = sum_i g_i E_i(x) over the top-K experts that had room."""
    x_GSD, previous_GSN = np.float64(x_GSD), np.float64(previous_GSN)
    params = {group: {k: np.float64(v) for k, v in p.items()} for group, p in params.items()}
    G, S, _ = x_GSD.shape
    tokens = [(g, s) for g in range(G) for s in range(S)]
    routes = [route(spec, x_GSD[t], previous_GSN[t], params["router"]) for t in tokens]
    logits, probs, experts, gates = (
        np.array(a).reshape(G, S, -1) for a in zip(*routes, strict=True)
    )
    y, kept = serve(spec, x_GSD, experts, gates, params)
    chosen = experts[..., None] == np.arange(len(spec.kinds))
    return Output(
        y,
        logits,
        experts,
        gates,
        kept,
        load=chosen.sum(axis=2).mean(axis=1),
        served=(chosen & kept[..., None]).sum(axis=2).mean(axis=1),
        prob=probs.mean(axis=1),
        entropy=-(probs * np.log(probs)).sum(axis=-1).mean(axis=1),
        z=(np.log(np.exp(logits).sum(axis=-1)) ** 2).mean(axis=1),
    )


def route(spec: Spec, x_D, previous_N, router: Mapping):
    """One token's logits, probabilities, chosen experts and their gates (section 3.2)."""
    if spec.two_layer:  # code
        logits = router["w_logits"] @ np.tanh(router["w_hidden"] @ x_D)
    else:
        logits = router["w"] @ x_D
    if spec.residual:  # eq. 6; the first layer's previous logits are zeros
        logits = logits + router["w_residual"] @ previous_N
    scored = logits
    if spec.logit_std is not None:  # code: the mean is not subtracted
        scored = logits / (np.std(logits, ddof=1) / spec.logit_std)
    probs = softmax(scored)
    best_first = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    experts = best_first[: spec.top_k]
    return logits, probs, experts, gates(spec, scored[experts], probs[experts], experts)


def gates(spec: Spec, scored_K, probs_K, experts: list[int]):
    """The weights of the chosen experts."""
    if spec.gate == "raw":  # eq. 1
        return probs_K
    if spec.gate == "renormalise_all":
        return probs_K / probs_K.sum()
    if spec.gate == "softmax_selected":  # code, moe_use_mixtral_gating
        return softmax(scored_K)
    assert spec.gate == "renormalise_nonzero"  # code, the default
    is_zero = np.array([spec.kinds[i] == "zero" for i in experts])
    rest = np.where(is_zero, 0.0, probs_K)
    return rest if is_zero.all() else rest / rest.sum()


def serve(spec: Spec, x_GSD, experts_GSK, gates_GSK, params: Mapping):
    """The layer's output for given choices, and which of them were kept.

    Within a group, tokens take places in their experts' queues one after the other, all K choices
    of a token before the next token; what comes after the capacity is dropped, and the gates of
    the kept ones stay as they are.
    """
    G, S, K = experts_GSK.shape
    y_GSD, kept_GSK = np.zeros_like(x_GSD), np.zeros(experts_GSK.shape, bool)
    for g in range(G):
        waiting = [0] * len(spec.kinds)
        for s in range(S):
            for k in range(K):
                i = experts_GSK[g, s, k]
                if i == len(spec.kinds):  # an unused choice
                    continue
                waiting[i] += 1
                kept_GSK[g, s, k] = waiting[i] <= capacity(spec, i, S)
                if kept_GSK[g, s, k]:
                    scaled = spec.input_scale * x_GSD[g, s]  # code
                    y_GSD[g, s] += gates_GSK[g, s, k] * expert(spec, i, scaled, params)
    return y_GSD, kept_GSK


def expert(spec: Spec, i: int, x_D, params: Mapping):
    """E_i(x)."""
    kind = spec.kinds[i]
    if kind == "zero":  # eq. 3
        return np.zeros_like(x_D)
    if kind == "copy":  # eq. 4
        return x_D
    if kind == "const":  # eq. 5
        j = i - spec.n_ffn
        a1, a2 = softmax(params["const"]["w"][j] @ x_D)
        return a1 * x_D + a2 * params["const"]["v"][j]
    gate, linear = params["ffn"]["w_in"][i] @ x_D
    return params["ffn"]["w_out"][i] @ (gate / (1 + np.exp(-gate)) * linear)


def capacity(spec: Spec, i: int, tokens: int) -> int:
    """Eq. 8 for a group of S tokens, in exact fractions, with K S assignments to share out.

    An expert needs no more than S slots, for a token chooses it once.
    """
    if spec.gamma is None:
        return tokens
    tau, gamma = Fraction(str(spec.tau)), Fraction(str(spec.gamma))
    n_zero_computation = len(spec.kinds) - spec.n_ffn
    share = gamma * spec.top_k * tokens / (tau * spec.n_ffn + n_zero_computation)
    return min(math.ceil(share * tau if spec.kinds[i] == "ffn" else share), tokens)


def balance_loss(spec: Spec, load_N, prob_N) -> float:
    """Eq. 7: sum_i eta_i f_i P_i, times N."""
    eta = [1.0 if kind == "ffn" else spec.tau for kind in spec.kinds]
    return len(eta) * sum(e * f * p for e, f, p in zip(eta, load_N, prob_N, strict=True))


def softmax(a):
    e = np.exp(a - np.max(a))
    return e / e.sum()
