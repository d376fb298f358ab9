# %% [markdown]
# # Tutorial
#
# From one layer on eight words to a language model, a report of where its tokens go, a routing
# rule of one's own, and a Mixtral that becomes a MoE++. Everything below ran when this page was
# made, on a CPU, in a minute or two: the numbers and pictures are what came out. The file is
# `docs/tutorial.py`; from the repository's root it runs as a script (`python docs/tutorial.py`)
# and, cell by cell, in Jupyter (with jupytext) or VS Code.

# %% [folded]
import json
import logging
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

logging.getLogger("absl").setLevel(logging.ERROR)
plt.rcParams["figure.constrained_layout.use"] = True
WORK = Path(tempfile.mkdtemp())  # where the runs of this page go
COLORS = {"FFN": "#3b6fb6", "constant": "#e0a030", "copy": "#4a9d5b", "zero": "#9a9a9a"}

# %% [markdown]
# ## The layer on eight tokens
#
# A MoE++ layer has FFN experts, as every mixture of experts, and three kinds beside them that
# compute next to nothing: *zero* returns nothing, *copy* returns the token as it is, and a
# *constant* expert returns a mixture of the token and a vector that it has learned. A router
# chooses two of them all for each token. Here are four FFN experts and one of each other kind,
# freshly drawn, and eight words of random vectors.

# %%
from moepp_jax import moe

WORDS = ["In", "the", "beginning", "God", "created", "heaven", "and", "earth"]
D, F = 16, 32

pool = moe.Pool(n_ffn=4, n_const=1, n_copy=1, n_zero=1)
rule = moe.rules.make("moepp", pool, top_k=2, tau=0.75)
layer = moe.MoE(rule, moe.dropless())
params = moe.init(jax.random.key(4), moe.describe(rule, width=D, ffn_size=F, std=0.3))

x = jax.random.normal(jax.random.key(1), (1, len(WORDS), D))  # one group of S = 8 tokens
first = jnp.zeros((1, len(WORDS), pool.size))  # logits of the layer before: there is none
y, way = moe.routed(x, first, params, layer)

# %% [markdown]
# `way.routing` says which experts each token takes, by number (FFN first, then constant, copy and
# zero), and with which gates:

# %%
NAMES = [f"FFN {i}" for i in range(4)] + ["constant", "copy", "zero"]
KINDS = ["FFN"] * 4 + ["constant", "copy", "zero"]
experts, gates = np.array(way.routing.experts[0]), np.array(way.routing.gates[0])

for word, chosen, weights in zip(WORDS, experts, gates, strict=True):
    taken = [f"{w:.2f} of {NAMES[e]}" for e, w in zip(chosen, weights, strict=True)]
    print(f"{word:10}", ",  ".join(taken))

# %% [folded]
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=[3, 1], sharey=True)
fig.suptitle("Gates of the chosen experts, and how many FFN experts each word runs")
for row, (chosen, weights) in enumerate(zip(experts, gates, strict=True)):
    for expert, weight in zip(chosen, weights, strict=True):
        color = COLORS[KINDS[expert]]
        left.add_patch(plt.Rectangle((expert - 0.45, row - 0.4), 0.9, 0.8, fc=color, alpha=0.85))
        left.text(expert, row, f"{weight:.2f}", ha="center", va="center", color="white")
left.set(xlim=(-0.6, 6.6), ylim=(7.6, -0.6), xticks=range(7), yticks=range(8), yticklabels=WORDS)
left.set_xticklabels(NAMES, rotation=25)
left.grid(alpha=0.2)
right.barh(range(8), (experts < pool.n_ffn).sum(axis=1), color=COLORS["FFN"])
right.set(xlim=(0, 2.1), xticks=[0, 1, 2], xlabel="FFN experts")
plt.show()

# %% [markdown]
# Two things show. Tokens differ in what they cost: a vanilla MoE would run two FFN experts for
# each word. And an FFN expert beside a zero expert weighs 1: gates are divided by the sum of those
# that are not of a zero expert.
#
# What the layer adds up can be written down for one token after the other, with the parameters as
# they are:


# %%
def by_hand(token, chosen, weights):
    total = np.zeros(D)
    for expert, gate in zip(chosen, weights, strict=True):
        total += gate * returned(token, expert)
    return total


def returned(token, expert):
    """What one expert gives back for a token (eq. 3 to 5 of the paper)."""
    kind = KINDS[expert]
    if kind == "zero":
        return np.zeros(D)
    if kind == "copy":
        return token
    if kind == "constant":
        logits = np.array(params["const"]["w"][0]) @ token
        a1, a2 = np.exp(logits) / np.exp(logits).sum()
        return a1 * token + a2 * np.array(params["const"]["v"][0])
    gate, linear = np.array(params["ffn"]["w_in"][expert]) @ token
    return np.array(params["ffn"]["w_out"][expert]) @ (gate / (1 + np.exp(-gate)) * linear)


tokens = np.array(x[0])
ours = np.stack([by_hand(t, e, g) for t, e, g in zip(tokens, experts, gates, strict=True)])
print(f"largest difference from the layer: {np.abs(ours - np.array(y[0])).max():.1e}")
assert np.allclose(ours, y[0], atol=1e-5)

# %% [folded]
fig, axes = plt.subplots(5, 1, figsize=(9, 4.4), sharex=True)
fig.suptitle(f"What each kind of expert returns for the word {WORDS[2]!r}")
rows = {"the token": tokens[2], "zero": returned(tokens[2], 6), "copy": returned(tokens[2], 5)}
rows |= {"constant": returned(tokens[2], 4), "FFN 0": returned(tokens[2], 0)}
reach = 1.05 * max(np.abs(values).max() for values in rows.values())
for ax, (name, values) in zip(axes, rows.items(), strict=True):
    ax.bar(range(D), values, color=COLORS.get(name.split()[0], "#303030"))
    ax.axhline(0, color="black", lw=0.6)
    ax.set(ylim=(-reach, reach), yticks=[])
    ax.set_ylabel(name, rotation=0, ha="right", va="center")
axes[-1].set(xticks=range(D), xlabel="coordinate")
plt.show()

# %% [markdown]
# How many FFN experts run is not left to the router alone. `tau` weighs zero-computation experts
# in the balance loss, and `rule.load` says where that is at rest: the share of all tokens that
# each expert then has. FFN experts' buffers, FLOPs and traffic are made for it.

# %%
for tau in (0.1, 0.5, 0.75, 1.0):
    at = moe.rules.make("moepp", pool, top_k=2, tau=tau)
    print(f"tau {tau:4}: {at.ffn_load:.2f} FFN experts a token at balance, of 2 that it chooses")

# %% [markdown]
# ## Training a tiny model
#
# A recipe is a Python file of fields; the default job's, made smaller still, trains on the twelve
# short texts of the tests, 8 kB in all. That is enough to see a loss fall and tokens part. On the
# command line this is `train --config=configs/tiny.py --config.train.steps=60 ...
# --workdir=FOLDER`.

# %%
from moepp_jax.config import Config
from moepp_jax.configs import tiny
from moepp_jax.train import train


def recipe(**rule):
    c = tiny.get_config()
    c.model.update(num_layers=3, hidden_size=64, vocab_size=384, dense_ffn_size=128, loss_chunk=64)
    c.moe.update(ffn_size=96, group_size=8 * 64)
    c.moe.rule.update(rule)
    c.data.sources.text.path = "tests/data/text"
    c.data.update(dir=str(WORK / "data"), seq_len=64, eval_fraction=0.1)
    c.optim.update(lr=5e-3, warmup_steps=10)
    c.train.update(steps=60, log_every=5, eval_every=60, eval_batches=1, save_every=60)
    return c


state = train(Config.parse(recipe()), WORK / "first", report=lambda line: None)

# %% [markdown]
# Every row that it logged is an object in `metrics.jsonl`:


# %%
def logged(run, name):
    rows = [json.loads(line) for line in (WORK / run / "metrics.jsonl").open()]
    return np.array([(row["step"], np.mean(row[name])) for row in rows if name in row]).T


fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
fig.suptitle("The training loss, and FFN experts a token, over 60 steps")
left.plot(*logged("first", "loss"), color="#303030")
left.set(xlabel="step", ylabel="training loss, nats")
right.plot(*logged("first", "ffn_experts_per_token"), color=COLORS["FFN"])
right.axhline(Config.parse(recipe()).moe.rule.ffn_load, color="black", ls=":", label="at balance")
right.set(xlabel="step", ylabel="FFN experts a token", ylim=(0, 2))
right.legend()
plt.show()

# %%
import moepp_jax

model = moepp_jax.load(WORK / "first")
print(model.generate("The bees", max_new_tokens=30, temperature=0.7, seed=1))

# %% [markdown]
# ## What the model does with a text
#
# `model.routing` runs the model over a text and keeps every token's way. Its last line in a
# notebook is a page: hover over a token, choose a layer, filter by expert.

# %%
text = Path("tests/data/text/tides.txt").read_text()
routing = model.routing(text)
routing

# %% [markdown]
# The same record answers fifteen questions, with tables and figures, as `analyze` does for a run
# ([an example in full](routing/REPORT.md)). It asks:

# %%
report = routing.report(WORK / "report").read_text()
print(*[line for line in report.splitlines() if line.startswith("## ")], sep="\n")

# %% [markdown]
# Not all can be answered of one short text, and the report says of each what is missing. The load
# can: the share of each layer's choices that each expert has.

# %%
record = routing.record
counts = np.array(
    [[(layer == e).sum() for e in range(record.meta.num_experts)] for layer in record.rows.experts]
)
share = counts / counts.sum(axis=1, keepdims=True)
kinds = np.repeat(list(COLORS), record.meta.counts)

fig, axes = plt.subplots(1, len(share), figsize=(9, 2.8), sharey=True)
fig.suptitle("The experts' share of the choices, layer by layer")
for j, (ax, row) in enumerate(zip(axes, share, strict=True)):
    ax.bar(range(len(row)), row, color=[COLORS[kind] for kind in kinds])
    ax.set(title=f"layer {record.meta.layers[j]}", xlabel="expert")
axes[0].set_ylabel("share")
fig.legend(handles=[Patch(color=c, label=k) for k, c in COLORS.items()], loc="outside right")
plt.show()
print(f"FFN experts a token, by layer: {record.ffn.mean(axis=1).round(2)}")

# %% [markdown]
# ## A routing rule of one's own
#
# A rule is a frozen dataclass: its fields are a recipe's options, `route` chooses, `losses`
# balances. Here tokens take the experts whose direction is nearest to their own, by the cosine; a
# length then says nothing. Projection, number of choices, parameters and load at balance are
# `TopK`'s.

# %%
import dataclasses

from moepp_jax.moe import losses, router
from moepp_jax.moe.rule import Loss, Routing, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineRule(router.TopK):
    sharpness: float = option(8.0, above=0)  # of the softmax over cosines
    balance_weight: float = option(0.01, at_least=0)

    def route(self, x_GSD, previous_GSN, params):
        x = x_GSD.astype(jnp.float32)
        x /= jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6
        w = params["w"] / (jnp.linalg.norm(params["w"], axis=-1, keepdims=True) + 1e-6)
        logits = self.sharpness * x @ w.T
        scores = jax.nn.softmax(logits, axis=-1)
        experts = router.top_k(scores, self.top_k)
        gates = router.over_sum(router.at_chosen(scores, experts))
        return Routing(experts, gates, scores, logits)

    def losses(self, stats, state):
        balance = losses.weighted_balance(stats.load, stats.prob, [1.0] * self.pool.size)
        return {"balance_loss": Loss(balance, self.balance_weight)}


# %% [markdown]
# That is all. In a file of your own a recipe names it `type="my_module:CosineRule"`; here the
# module is this page's. An option out of range is refused as those of every rule:

# %%
try:
    moe.rules.make("__main__:CosineRule", pool, sharpness=-1.0)
except moe.RuleError as error:
    print(error)

c = recipe()
c.moe.rule = dict(type="__main__:CosineRule", top_k=2, sharpness=8.0)
state = train(Config.parse(c), WORK / "cosine", report=lambda line: None)

fig, ax = plt.subplots(figsize=(9, 3))
fig.suptitle("Training loss by rule: a toy of one seed, which says only that both train")
for run, color in (("first", COLORS["FFN"]), ("cosine", COLORS["constant"])):
    ax.plot(*logged(run, "loss"), color=color, label={"first": "moepp"}.get(run, run))
ax.set(xlabel="step", ylabel="nats")
ax.legend()
plt.show()

# %% [markdown]
# ## A Mixtral becomes a MoE++
#
# `upcycle` reads a checkpoint as `transformers` saves it, adds the other kinds of experts and the
# gating residuals, and computes the same function at first: the new experts begin with a bias so
# low that none is chosen. The checkpoint here is a tiny one of the tests, with the logits that
# `transformers` gave.

# %%
from moepp_jax import interop

source = Path("tests/data/upcycle/mixtral")
interop.upcycle(source, WORK / "upcycled", n_const=2, n_copy=1, n_zero=1, report=lambda line: None)
upcycled = moepp_jax.load(WORK / "upcycled")

expected = np.load(source / "expected.npz")
difference = np.abs(upcycled.logits(expected["input_ids"]) - expected["logits"]).max()
print("pool:", upcycled.config.moe.pool)
print(f"largest difference from Mixtral's logits: {difference:.1e}")

# %% [markdown]
# Training moves the biases until tokens go where `tau` wants them. `zero_offset`, which is added
# to the same logits, shows already what a bias does to the tokens of an untrained layer:

# %%
gate = jax.tree.map(lambda p: p[0], upcycled.params["layers"]["moe"])  # of the first layer
hidden = jax.random.normal(jax.random.key(0), (1, 512, 24))
for offset in (0.0, 28.0, 30.0, 32.0):
    moved = dataclasses.replace(upcycled.config.moe.rule, zero_offset=offset)
    r = moved.route(hidden, jnp.zeros((1, 512, moved.pool.size)), gate["router"])
    ffn = (r.experts < moved.pool.n_ffn).sum(axis=-1).mean()
    print(f"bias {offset - 30:+5.0f}: {ffn:.2f} FFN experts a token")

# %% [markdown]
# From here, `train --workdir=FOLDER` goes on with a text of yours; [what came of
# that](upcycling/README.md) with a larger model, and [how checkpoints go in and
# out](CHECKPOINTS.md).
