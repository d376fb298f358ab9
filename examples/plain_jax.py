"""MoE++ in plain JAX with experts of one's own, GELU MLPs: python examples/plain_jax.py

An expert function takes parameters stacked over the experts and each expert's rows; router, gating
residual, zero-computation experts and dispatch with capacities are `moepp_jax.moe`'s. The task: of
each token and the one before it, say the product modulo 16. Prints the loss, which falls, and how
many FFN experts a token visits, which is fewer than the two that it chooses.
"""

import jax
import jax.numpy as jnp

from moepp_jax import moe

WIDTH, HIDDEN, VOCAB = 32, 64, 16


def gelu_mlp(p, x_EBD):
    h = jax.nn.gelu(jnp.einsum("ebd,edf->ebf", x_EBD, p["w1"]) + p["b1"][:, None])
    return jnp.einsum("ebf,efd->ebd", h, p["w2"]) + p["b2"][:, None]


POOL = moe.Pool(n_ffn=8, n_const=2, n_copy=1, n_zero=1)
RULE = moe.rules.make("moepp", POOL, top_k=2, tau=0.75)
LAYER = moe.MoE(RULE, moe.with_capacity(1.1, gelu_mlp))


def init_layer(key):
    shapes = {"w1": (WIDTH, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, WIDTH), "b2": (WIDTH,)}
    ours = {n: 0.15 * jax.random.normal(key, (POOL.n_ffn, *s)) for n, s in shapes.items()}
    return moe.init(key, moe.describe(RULE, WIDTH, HIDDEN)) | {"ffn": ours}


def loss(params, tokens):
    before = jnp.roll(tokens, 1, axis=1)
    x = params["embed"][0, tokens] + params["embed"][1, before]
    router_logits, auxiliary = jnp.zeros((*tokens.shape, POOL.size)), 0.0
    for layer in params["layers"]:
        y, router_logits, stats = moe.local(x, router_logits, layer, LAYER)
        x += y
        stats = jax.tree.map(lambda s: s.mean(axis=0), stats)
        auxiliary += sum(term.weight * term.value for term in RULE.losses(stats, {}).values())
    logp = jax.nn.log_softmax(x @ params["out"])
    errors = -jnp.take_along_axis(logp, (tokens * before % VOCAB)[..., None], axis=-1)
    return errors.mean() + auxiliary, moe.summarise(stats, POOL)["ffn_experts_per_token"]


@jax.jit
def step(params, key):
    tokens = jax.random.randint(key, (8, 64), 0, VOCAB)
    (value, ffn), gradient = jax.value_and_grad(loss, has_aux=True)(params, tokens)
    return jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient), value, ffn


keys = jax.random.split(jax.random.key(0), 3)
params = {"embed": jax.random.normal(keys[0], (2, VOCAB, WIDTH)) / 2}
params |= {"layers": [init_layer(k) for k in keys[1:]], "out": jnp.zeros((WIDTH, VOCAB))}
for i in range(401):
    params, value, ffn = step(params, jax.random.key(i))
    if i % 50 == 0:
        print(f"step {i:3}  loss {value:.3f}  FFN experts per token {ffn:.2f}")
