"""Every rule, and the layer around it, in float64 numpy with gradients: written from the equations.

The equations are those of the rules' docstrings; nothing of the package is called. Which experts
tokens have is given and stays as it is: `require_best` says whether they are the right ones.

A gradient is a complex step: f(x + i h) is f(x) + i h f'(x) up to h^2, so that nothing cancels
however large the logits are, and nothing is left of h. Arrays are those of one group of tokens,
(S, N) or (S, D), and may have an axis before, of the directions in which a step is made.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

STEP = 1e-40
# Beside the equations: added to a variance, that of equal logits being 0; and logits above HUGE are
# divided by the largest, or the variance would be infinite, which only equal ones can tell.
VARIANCE, HUGE = 1e-12, 1e15
LARGEST = 1e15  # a log-sum-exp that is squared
TINY = np.finfo(np.float32).tiny  # below it float32 has 0, at which a ReLU is closed


class Exact(NamedTuple):
    """What a rule makes of a group's logits.

    Attributes:
      rank: a token has the experts that are best by this; those of -inf never.
      scores, gates: of all experts, the latter 0 where they are not chosen.
      losses: name -> (value, weight).
    """

    rank: np.ndarray
    scores: np.ndarray
    gates: np.ndarray
    losses: dict[str, tuple[Any, Any]]


# Scores.


def softmax(a):
    e = np.exp(a - a.real.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sigmoid(a):
    e = np.exp(np.where(a.real > 0, -a, a))
    return np.where(a.real > 0, 1, e) / (1 + e)


def shares(a):
    """Over their sum, or 0 where that is."""
    total = a.sum(axis=-1, keepdims=True)
    return a / np.where(total == 0, 1, total)


def scored(r, logits):
    """Logits of one deviation, their mean as it was; then the offset."""
    if r.logit_norm:
        largest = np.abs(logits.real).max(axis=-1, keepdims=True)
        logits = logits / np.where(largest > HUGE, largest, 1)
        apart = logits - logits.mean(axis=-1, keepdims=True)
        variance = (apart * apart).sum(axis=-1, keepdims=True) / (r.pool.size - 1)
        logits = logits * r.logit_norm / np.sqrt(variance + VARIANCE)
        logits = logits - np.where(np.abs(logits.real) < TINY, logits.real, 0)
    return logits + r.zero_offset * (np.arange(r.pool.size) >= r.pool.n_ffn)


def weigh(how: str, scored, scores, chosen, pool):
    """Gates of the chosen."""
    if how == "raw":
        return np.where(chosen, scores, 0)
    if how == "renormalise_all":
        return shares(np.where(chosen, scores, 0))
    if how == "softmax_selected":
        return softmax(np.where(chosen, scored, -np.inf))
    assert how == "renormalise_nonzero"
    is_zero = np.arange(pool.size) >= pool.size - pool.n_zero
    return shares(np.where(chosen & ~is_zero, scores, 0))


def switch(chosen, scores, eta=1.0):
    """N sum_i eta_i f_i P_i."""
    f, P = chosen.mean(axis=0), scores.mean(axis=-2)
    return chosen.shape[-1] * (eta * f * P).sum(axis=-1)


def entropy(scores):
    p = shares(scores)
    return -(p * np.log(np.where(p.real > 0, p, 1))).sum(axis=-1).mean(axis=-1)


def log_sum_exp(logits):
    best = logits.real.max(axis=-1, keepdims=True)
    total = best[..., 0] + np.log(np.exp(logits - best).sum(axis=-1))
    return np.where(np.abs(total.real) > LARGEST, LARGEST * np.sign(total.real), total)


def z(logits):
    return (log_sum_exp(logits) ** 2).mean(axis=-1)


# The rules: options, scored logits, state and the choices -> `Exact`.


def adamoe(r, a, state, chosen) -> Exact:
    P, n_ffn = softmax(a), r.pool.n_ffn
    f = chosen.mean(axis=0)
    f = np.where(np.arange(r.pool.size) < n_ffn, f, f[n_ffn:].mean())
    balance = r.pool.size * (f * P.mean(axis=-2)).sum(axis=-1)
    gates = weigh(r.gate, a, P, chosen, r.pool)
    return Exact(P, P, gates, {"balance_loss": (balance, r.balance_weight)})


def deepseek(r, a, state, chosen) -> Exact:
    s = sigmoid(a)
    best = np.argsort(-s.real, axis=-1, kind="stable")[..., : r.top_k]
    f = (best[..., None] == np.arange(r.pool.size)).any(axis=-2).mean(axis=-2)
    sequence = r.pool.size / r.top_k * (f * shares(s).mean(axis=-2)).sum(axis=-1)
    gates = r.scale * weigh(r.gate, a, s, chosen, r.pool)
    return Exact(s + state["bias"], s, gates, {"sequence_loss": (sequence, r.sequence_weight)})


def longcat(r, a, state, chosen) -> Exact:
    R, D, n_ffn = softmax(a), r.groups, r.pool.n_ffn

    def of_groups(values):
        ffn = values[..., :n_ffn].reshape(*values.shape[:-1], D, n_ffn // D).sum(axis=-1)
        return np.concatenate([ffn, values[..., n_ffn:].sum(axis=-1, keepdims=True)], axis=-1)

    choices = of_groups(chosen.mean(axis=0))
    f = choices * np.array([D / r.ffn_experts] * D + [1 / (r.top_k - r.ffn_experts)])
    balance = (f * of_groups(R.mean(axis=-2))).sum(axis=-1)
    gates = r.scale * np.where(chosen, R, 0)
    return Exact(R + state["bias"], R, gates, {"balance_loss": (balance, r.balance_weight)})


def moepp(r, a, state, chosen) -> Exact:
    a = a + state.get("bias", 0)
    P = softmax(a)
    eta = np.where(np.arange(r.pool.size) < r.pool.n_ffn, 1, r.tau)
    balance = switch(chosen, P, eta)
    gates = weigh(r.gate, a, P, chosen, r.pool)
    return Exact(P, P, gates, {"balance_loss": (balance, r.balance_weight)})


def remoe(r, a, state, chosen) -> Exact:
    R = np.where(a.real > 0, a, 0)
    penalty = switch(chosen, R) / r.top_k
    open_ = np.where(a.real > 0, a, -np.inf)
    gates = np.where(chosen, R, 0)
    return Exact(open_, R, gates, {"l1_loss": (penalty, state["coefficient"])})


def threshold(r, a, state, chosen) -> Exact:
    n = state["updates"]
    c = state["cutoff"] / (1 - r.decay**n) if n else np.zeros(r.pool.size)
    s = sigmoid(a)
    return Exact(np.where(a.real >= c, a, -np.inf), s, weigh(r.gate, a, s, chosen, r.pool), {})


def tied_null(r, a, state, chosen) -> Exact:
    P = softmax(a)
    gates = weigh("renormalise_nonzero", a, P, chosen, r.pool)
    return Exact(P, P, gates, {"balance_loss": (switch(chosen, P) / r.top_k, r.balance_weight)})


def top_p(r, a, state, chosen) -> Exact:
    P = softmax(a)
    losses = {
        "balance_loss": (switch(chosen, P), r.balance_weight),
        "entropy_loss": (entropy(P), r.entropy_weight),
    }
    return Exact(P, P, weigh(r.gate, a, P, chosen, r.pool), losses)


def vanilla(r, a, state, chosen) -> Exact:
    P = softmax(a)
    gates = weigh(r.gate, a, P, chosen, r.pool)
    return Exact(P, P, gates, {"balance_loss": (switch(chosen, P) / r.top_k, r.balance_weight)})


def zeda(r, a, state, chosen) -> Exact:
    P, E = softmax(a), r.pool.n_ffn
    f, mean = chosen.mean(axis=0), P.mean(axis=-2)
    N_Z = r.zero_weight * (r.pool.size - E)
    groups = f[:E].sum() * mean[..., :E].sum(axis=-1) / E
    groups = groups + f[E:].sum() * mean[..., E:].sum(axis=-1) / N_Z
    among = E * (shares(f[:E]) * shares(mean[..., :E])).sum(axis=-1)
    losses = {
        "balance_loss": ((E + N_Z) / r.top_k * groups, r.balance_weight),
        "ffn_balance_loss": (among, r.ffn_balance_weight),
    }
    return Exact(P, P, weigh(r.gate, a, P, chosen, r.pool), losses)


RULES = {
    rule.__name__: rule
    for rule in (
        adamoe,
        deepseek,
        longcat,
        moepp,
        remoe,
        threshold,
        tied_null,
        top_p,
        vanilla,
        zeda,
    )
}


def route(kind: str, r, logits, state, chosen) -> Exact:
    """A rule's part, with the z-loss that all have."""
    exact = RULES[kind](r, scored(r, logits), state, chosen)
    return exact._replace(losses=exact.losses | {"z_loss": (z(logits), r.z_weight)})


def require_best(kind: str, r, exact: Exact, chosen, rounding: float = 1e-5) -> None:
    """Holds choices to the rule, but for those that rounding decides."""
    for s, (rank, taken) in enumerate(zip(exact.rank, chosen, strict=True)):
        fewest, most = how_many(kind, r, rank, rounding)
        assert fewest <= taken.sum() <= most, (s, rank, taken)
        assert (rank[taken] > -np.inf).all(), (s, rank, taken)
        for i, j in zip(*np.nonzero(~taken[:, None] & taken), strict=True):
            if rank[i] > -np.inf:  # j was taken and i was not
                assert rank[j] >= rank[i] - rounding * abs(rank[i]), (s, rank, taken)
                # Equal ranks are of equal logits, or 0 or 1 whatever the precision: the first wins.
                nulls = kind == "tied_null" and i >= r.pool.n_ffn
                assert nulls or rank[j] != rank[i] or j < i, (s, rank, taken)
        if kind == "tied_null":  # the nulls in turn, from one that moves on with the token
            M, nulls = r.pool.n_zero, np.flatnonzero(taken[r.pool.n_ffn :])
            assert {*nulls} == {(s + j) % M for j in range(len(nulls))}


def how_many(kind: str, r, rank, rounding: float) -> tuple[int, int]:
    """The fewest and the most experts that a token can have."""
    bound = getattr(r, "max_experts", None)
    bound = r.top_k if bound is None else bound or r.pool.size
    if kind == "top_p":  # the best until their sum exceeds p: the one that crosses it is taken
        before = np.cumsum(np.append(0, -np.sort(-rank)))[:-1]
        return tuple(min(bound, (before <= r.p + by).sum()) for by in (-rounding, rounding))
    return (min(bound, (rank > -np.inf).sum()),) * 2


# Capacity.


def load(kind: str, r) -> list[Fraction]:
    """Share of the tokens that each expert has at balance."""
    E, Z = r.pool.n_ffn, r.pool.size - r.pool.n_ffn

    def number(value):
        return Fraction(value).limit_denominator(10**6)

    if kind == "longcat":
        K_e = number(r.ffn_experts)
        return [K_e / E] * E + [(r.top_k - K_e) / Z] * Z
    ffn, other = Fraction(1), Fraction(1)  # of what an expert has
    if kind in ("moepp", "threshold"):
        ffn = number(r.tau)
    if kind == "zeda":
        other = number(r.zero_weight)
    K = number(r.expected if kind == "top_p" else r.top_k)
    of_one = K / (ffn * E + other * Z)
    return [ffn * of_one] * E + [other * of_one] * Z


def kept(kind: str, r, chosen, gamma: float | None) -> np.ndarray:
    """Which choices are served: of each expert those of the first tokens, as many as it has room.

    ceil(gamma load_i S) is 1 at least, whatever gamma > 0.
    """
    if gamma is None:
        return chosen
    S = len(chosen)
    slots = [math.ceil(Fraction(str(gamma)) * f * S) for f in load(kind, r)]
    assert min(slots) >= 1
    return chosen & (chosen.cumsum(axis=0) <= slots)


# The layer.


def experts(pool, x, params: Mapping) -> np.ndarray:
    """E_i(x) of all experts, (..., S, N, D)."""
    h = np.einsum("...sd,...ecfd->...secf", x, params["ffn"]["w_in"])
    gate, linear = h[..., 0, :], h[..., 1, :]
    ffn = np.einsum(
        "...sef,...edf->...sed", gate / (1 + np.exp(-gate)) * linear, params["ffn"]["w_out"]
    )
    parts = [ffn]
    if pool.n_const:
        a = softmax(np.einsum("...sd,...jcd->...sjc", x, params["const"]["w"]))
        v = params["const"]["v"][..., None, :, :]
        parts.append(a[..., :1] * x[..., None, :] + a[..., 1:] * v)
    rest = np.repeat(x[..., None, :], pool.n_copy, axis=-2)
    parts += [rest, np.zeros((*x.shape[:-1], pool.n_zero, x.shape[-1]))]
    front = np.broadcast_shapes(*(p.shape[:-2] for p in parts))
    return np.concatenate([np.broadcast_to(p, (*front, *p.shape[-2:])) for p in parts], axis=-2)


class Slope(NamedTuple):
    """A gradient, or its product with directions, and the magnitude that its errors are of."""

    value: np.ndarray
    scale: np.ndarray


def gradients(kind, r, x, previous, params, chosen, served, weights, directions) -> dict:
    """Of sum(weights y) + the rule's losses, by the names of what it is taken to.

    The scale of a sum is the sum of its terms' magnitudes: some are 1e30 and cancel.

    Args:
      directions: as the trees "ffn" and "const", with an axis before; of those the products with
        the gradient are taken, expert by expert.
    """
    router = params["router"]
    copies = tied(r, params)
    own = x @ router["w"].T
    S, rows = own.shape
    y = experts(r.pool, x, params)
    worth = np.einsum("sd,snd->sn", weights, y)
    magnitude = np.einsum("sd,snd->sn", np.abs(weights), np.abs(y))

    def total(own):
        exact = route(kind, r, own[..., copies], router, chosen)
        of_losses = sum(weight * value for value, weight in exact.losses.values())
        return (exact.gates * served * worth).sum(axis=(-2, -1)) + of_losses

    steps = STEP * 1j * np.eye(S * rows).reshape(-1, S, rows)
    d_own = (total(own + steps).imag / STEP).reshape(S, rows)

    exact = route(kind, r, own[:, copies], router, chosen)
    scale = sensitivity(r, own[:, copies], exact, magnitude * served)[:, None] * np.ones(rows)
    signed, gates = exact.gates * served, np.abs(exact.gates) * served
    found = {"w": Slope(d_own.T @ x, scale.T @ np.abs(x))}
    if "w_residual" in router:
        before = previous[:, :rows]
        found["w_residual"] = Slope(d_own.T @ before, scale.T @ np.abs(before))

    each = STEP * 1j * np.eye(x.shape[-1])[:, None]
    moved = experts(r.pool, x + each, params).imag / STEP  # (directions, S, N, D)
    slopes = np.einsum("sd,bsnd->snb", weights, moved)
    terms = np.einsum("sd,bsnd->snb", np.abs(weights), np.abs(moved))
    found["x"] = Slope(
        d_own @ router["w"] + np.einsum("sn,snb->sb", signed, slopes),
        scale @ np.abs(router["w"]) + np.einsum("sn,snb->sb", gates, terms),
    )

    start = {"ffn": 0, "const": r.pool.n_ffn}
    for group, name in ((group, name) for group, tree in directions.items() for name in tree):
        leaf = params[group][name]
        stepped = params[group] | {name: leaf + STEP * 1j * directions[group][name]}
        moved = experts(r.pool, x, params | {group: stepped}).imag / STEP
        own_part = slice(start[group], start[group] + len(leaf))
        slopes = np.einsum("sd,bsnd->bsn", weights, moved)[..., own_part]
        terms = np.einsum("sd,bsnd->bsn", np.abs(weights), np.abs(moved))[..., own_part]
        terms = np.broadcast_to(terms.max(axis=0), slopes.shape)  # a direction may be orthogonal
        found[f"{group} {name}"] = Slope(
            (signed[:, own_part] * slopes).sum(axis=1), (gates[:, own_part] * terms).sum(axis=1)
        )
    return found


def tied(r, params) -> np.ndarray:
    """(N,): which row of W gives an expert's logit; the nulls of `tied_null` have one."""
    return np.minimum(np.arange(r.pool.size), len(params["router"]["w"]) - 1)


def sensitivity(r, logits, exact: Exact, worth) -> np.ndarray:
    """(S,): what a token's logits can move by one, as terms that may cancel in the gradient."""
    S, N = logits.shape
    of_z = exact.losses["z_loss"][1] * 2 * np.abs(log_sum_exp(logits))
    of_z = np.where(of_z < LARGEST * exact.losses["z_loss"][1], of_z, 0)
    losses = sum(w * N * N for name, (_, w) in exact.losses.items() if name != "z_loss")
    moved = getattr(r, "scale", 1.0) * worth.sum(axis=-1) + losses / S
    of_z = of_z / S + 1e6 * TINY  # smaller numbers are not right to so many digits
    if not r.logit_norm:
        return moved + of_z
    best = np.abs(logits).max(axis=-1)
    size = np.where(best > HUGE, best, 1)
    deviation = np.sqrt(np.var(logits / size[:, None], axis=-1, ddof=1) + VARIANCE)
    # The slope of the deviation is a product of two sums that are 0 of equal logits, and in float32
    # 6e-8 of their terms. Shares of 1e-5 are taken of this.
    rounding = (2e-5 * best / size) ** 2 / deviation**3
    return moved * r.logit_norm * (1 / deviation + rounding) / size + of_z
