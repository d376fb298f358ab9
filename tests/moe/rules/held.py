"""What the test of every rule holds it to: a float64 loop over tokens, and a table by hand."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from moepp_jax import moe
from moepp_jax.moe.rule import require_sound
from tests import oracle
from tests.moe import cases
from tests.oracle import Spec

# route64(x_D, previous_N, params) -> (logits_N, scores_N, {expert: gate} of the chosen ones), all
# in float64: one token, written from the rule's equations alone.
Route64 = Callable[[np.ndarray, np.ndarray, Mapping], tuple[np.ndarray, np.ndarray, dict]]

VALUES = 2e-6  # float32 against float64, as a share of the largest magnitude


def params_of(rule: moe.Rule, seed: int = 0, **state) -> dict:
    """A layer's parameters of order 1, and the rule's state, by default as training starts."""
    described = moe.describe(rule, cases.D, cases.F, std=0.4)
    params = jax.device_get(moe.init(jax.random.key(seed), described))
    params["router"] |= {name: np.float32(value) for name, value in state.items()}
    return params


def inputs(rule: moe.Rule, groups: int = 2, size: int = 16, seed: int = 1):
    """x (G, S, D) and previous logits (G, S, N)."""
    rng = np.random.default_rng(seed)
    x = np.float32(rng.normal(size=(groups, size, cases.D)))
    return x, np.float32(rng.normal(size=(groups, size, rule.pool.size)))


def logits64(rule: moe.Rule, x, previous, params) -> tuple[np.ndarray, np.ndarray]:
    """A token's logits with the residual in them, and what is scored: those, normalised."""
    if rule.router_layers == 2:
        logits = params["w_logits"] @ np.tanh(params["w_hidden"] @ x)
    else:
        logits = params["w"] @ x
    if rule.residual != "none":
        logits = logits + params["w_residual"] @ previous
    return logits, scored64(rule, logits)


def scored64(rule: moe.Rule, logits: np.ndarray) -> np.ndarray:
    if rule.logit_norm:
        logits = logits * (rule.logit_norm / np.std(logits, ddof=1))
    return logits + rule.zero_offset * (np.arange(len(logits)) >= rule.pool.n_ffn)


def by_expert(experts_GSK, values_GSK, size: int) -> np.ndarray:
    """Values of the choices as (G, S, N), 0 where an expert is not chosen."""
    dense = np.zeros((*np.shape(experts_GSK)[:2], size + 1))
    np.put_along_axis(dense, np.asarray(experts_GSK), np.asarray(values_GSK), axis=-1)
    return dense[..., :size]


def to_float64(rule: moe.Rule, route64: Route64, params: dict | None = None, seed: int = 1):
    """Holds choices, gates, scores, logits and the dropless layer's output to the float64 loop."""
    require_sound(rule)
    params = params or params_of(rule)
    x, previous = inputs(rule, seed=seed)
    layer = moe.MoE(rule, moe.dropless(moe.Blocked(moe.swiglu, block=3)))
    routing = jax.jit(rule.route)(x, previous, params["router"])
    y, logits, stats = jax.jit(lambda *a: moe.local(*a, layer))(x, previous, params)

    exact = jax.tree.map(np.float64, params)
    G, S, _ = x.shape
    N, K = rule.pool.size, rule.most
    want_logits, want_scores = np.zeros((G, S, N)), np.zeros((G, S, N))
    want_gates, want_chosen = np.zeros((G, S, N)), np.zeros((G, S, N), bool)
    experts, gates = np.full((G, S, K), N), np.zeros((G, S, K))
    for g, s in np.ndindex(G, S):
        token = np.float64(x[g, s]), np.float64(previous[g, s]), exact["router"]
        want_logits[g, s], want_scores[g, s], chosen = route64(*token)
        for k, (expert, gate) in enumerate(chosen.items()):
            want_chosen[g, s, expert], want_gates[g, s, expert] = True, gate
            experts[g, s, k], gates[g, s, k] = expert, gate

    used = np.asarray(routing.experts) < N
    np.testing.assert_array_equal(by_expert(routing.experts, used, N), want_chosen)
    cases.close(by_expert(routing.experts, routing.gates, N), want_gates, VALUES, "gates")
    cases.close(routing.scores, want_scores, VALUES, "scores")
    cases.close(routing.logits, want_logits, VALUES, "logits")
    cases.close(logits, want_logits, VALUES, "logits for the next layer")
    spec = Spec(*rule.pool, top_k=K)
    want_y, _ = oracle.serve(spec, np.float64(x), experts, gates, exact)
    cases.close(y, want_y, 2 * VALUES, "y")
    np.testing.assert_allclose(stats.load, want_chosen.mean(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(stats.kept, stats.load)


def by_hand(rule: moe.Rule, logits, previous=None, **state) -> moe.Routing:
    """Routes one group of tokens whose own logits are given, (S, N): W is the identity."""
    x = jnp.asarray(logits, jnp.float32)[None]
    given = {n: jnp.asarray(v, jnp.float32) for n, v in state.items()}
    params = {"w": jnp.eye(x.shape[-1])} | given
    previous = jnp.zeros_like(x) if previous is None else jnp.asarray(previous, jnp.float32)[None]
    return rule.route(x, previous, params)


def statistics(rule: moe.Rule, routing: moe.Routing, kept=None) -> moe.Statistics:
    """Averaged over all tokens, as losses and updates are given them; a leading axis of 1 layer."""
    from moepp_jax.moe import losses

    kept = routing.experts < rule.pool.size if kept is None else kept
    stats = losses.statistics(routing, kept, rule.measure(routing))
    return jax.tree.map(lambda a: a.mean(axis=0)[None], stats)
