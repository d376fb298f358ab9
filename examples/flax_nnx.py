"""MoE++ in Flax NNX: a module holds the parameters, `moe.local` computes.

python examples/flax_nnx.py has a small character model learn this very file, each character from
the eight before it. Dispatch is dropless: every token gets the experts that it chose. Prints the
loss, which falls, and how many FFN experts a token visits, fewer than the two that it chooses.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moepp_jax import moe

POOL, WIDTH, CONTEXT = moe.Pool(n_ffn=4, n_const=1, n_copy=1, n_zero=1), 64, 8
RULE = moe.rules.make("moepp", POOL, top_k=2, tau=0.75)
LAYER = moe.MoE(RULE, moe.dropless())


class CharacterModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(128, WIDTH // CONTEXT, rngs=rngs)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        params = moe.init(rngs.params(), moe.describe(RULE, WIDTH, ffn_size=2 * WIDTH))
        self.moe = nnx.data(jax.tree.map(nnx.Param, params))
        self.out = nnx.Linear(WIDTH, 128, rngs=rngs)

    def __call__(self, windows_GSC):
        x = self.embed(windows_GSC).reshape(*windows_GSC.shape[:2], WIDTH)
        first = jnp.zeros((*x.shape[:2], POOL.size))  # no layer before to take logits from
        y, _, stats = moe.local(self.norm(x), first, nnx.as_pure(self.moe), LAYER)
        return self.out(x + y), jax.tree.map(lambda s: s.mean(axis=0), stats)


@nnx.jit
def step(model, optimizer, windows):
    def loss(model):
        logits, stats = model(windows[..., :-1])
        errors = optax.softmax_cross_entropy_with_integer_labels(logits, windows[..., -1])
        auxiliary = sum(term.weight * term.value for term in RULE.losses(stats, {}).values())
        return errors.mean() + auxiliary, moe.summarise(stats, POOL)["ffn_experts_per_token"]

    (value, ffn), gradient = nnx.value_and_grad(loss, has_aux=True)(model)
    optimizer.update(model, gradient)
    return value, ffn


text = jnp.array(list(Path(__file__).read_bytes()))
model = CharacterModel(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
for i in range(201):
    starts = jax.random.randint(jax.random.key(i), (8, 64, 1), 0, len(text) - CONTEXT)
    value, ffn = step(model, optimizer, text[starts + jnp.arange(CONTEXT + 1)])
    if i % 40 == 0:
        print(f"step {i:3}  loss {value:.3f}  FFN experts per token {ffn:.2f}")
