"""The authors' model in float64 numpy, from config.json's fields and tensors by name.

What their inference code computes, written from its description and sharing nothing with the
package: what a converted checkpoint must compute is compared with this.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

# What their class takes for an absent field.
DEFAULTS = {
    "moe_2layer_gate": True,
    "moe_use_mixtral_gating": False,
    "moe_use_logits_norm": False,
    "moe_gate_norm_std": 1.0,
    "moe_feature_no_mul_topk": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
K = 2


class Computed(NamedTuple):
    """Of a pass over (B, T) tokens; layers first.

    Attributes:
      hidden_states: the input of every layer, and what is after the final norm.
      margin: by how much the last chosen score is above the first that is not.
    """

    logits: np.ndarray
    router_logits: np.ndarray
    gates: np.ndarray
    selected: np.ndarray
    hidden_states: np.ndarray
    margin: np.ndarray


class Model:
    def __init__(self, fields: Mapping, tensors: Mapping[str, np.ndarray]):
        self.c = DEFAULTS | dict(fields)
        self.t = {name: np.float64(values) for name, values in tensors.items()}

    @classmethod
    def load(cls, folder: Path) -> "Model":
        files = sorted(folder.glob("*.safetensors"))
        tensors = {name: a for file in files for name, a in load_file(file).items()}
        return cls(json.loads((folder / "config.json").read_text()), tensors)

    def __call__(self, tokens, mask=None) -> Computed:
        """mask: true for real tokens; positions are counted from the first of them."""
        B, T = tokens.shape
        real = np.ones((B, T), bool) if mask is None else mask.astype(bool)
        turns = self._turns(np.where(real, np.cumsum(real, axis=1) - 1, 1))
        seen = np.tril(np.ones((T, T), bool)) & real[:, None, :]
        x, logits = self.t["model.embed_tokens.weight"][tokens], None
        states, routed = [], []
        for i in range(self.c["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            states.append(x)
            h = self._norm(x, f"{layer}input_layernorm")
            x = x + self._attention(h, f"{layer}self_attn.", turns, seen)
            h = self._norm(x, f"{layer}post_attention_layernorm")
            y, logits, *choice = self._moe(h, logits, f"{layer}mlp.moe.")
            x = x + y
            routed.append((logits, *choice))
        hidden = self._norm(x, "model.norm")
        tied = self.c["tie_word_embeddings"]
        output = self.t["model.embed_tokens.weight" if tied else "lm_head.weight"]
        return Computed(
            hidden @ output.T,
            *(np.stack(part) for part in list(zip(*routed, strict=True))[:3]),
            hidden_states=np.stack([*states, hidden]),
            margin=np.stack([layer[3] for layer in routed]),
        )

    def greedy(self, prompt, count: int):
        """The prompt with the likeliest tokens after it, and by how much any was the likeliest."""
        tokens, least = prompt, np.inf
        for _ in range(count):
            last = self(tokens).logits[:, -1]
            second, first = np.sort(last, axis=-1)[:, -2:].T
            least = min(least, np.min(first - second))
            new = last.argmax(axis=-1)[:, None].astype(tokens.dtype)
            tokens = np.concatenate([tokens, new], axis=1)
        return tokens, least

    def _norm(self, x, name):
        mean_square = np.mean(x**2, axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + self.c["rms_norm_eps"]) * self.t[f"{name}.weight"]

    def _product(self, x, name):
        return x @ self.t[f"{name}.weight"].T

    def _turns(self, positions):
        W = self.c["hidden_size"] // self.c["num_attention_heads"]
        frequency = self.c["rope_theta"] ** -(np.arange(0, W, 2) / W)
        if self.c["rope_scaling"]:
            positions = positions / self.c["rope_scaling"]["factor"]
        angle = np.concatenate([positions[..., None] * frequency] * 2, axis=-1)[:, :, None]
        return np.cos(angle), np.sin(angle)

    def _attention(self, x, name, turns, seen):
        B, T, D = x.shape
        H = self.c["num_attention_heads"]
        KV = self.c.get("num_key_value_heads") or H
        W = D // H

        def heads(part, count):
            return self._product(x, f"{name}{part}_proj").reshape(B, T, count, W)

        def turned(a):
            cos, sin = turns
            return a * cos + np.concatenate([-a[..., W // 2 :], a[..., : W // 2]], axis=-1) * sin

        q, k = turned(heads("q", H)), turned(heads("k", KV)).repeat(H // KV, axis=2)
        scores = np.einsum("bqhw,bkhw->bhqk", q, k) / np.sqrt(W)
        share = _softmax(np.where(seen[:, None], scores, -1e30))
        v = heads("v", KV).repeat(H // KV, axis=2)
        y = np.einsum("bhqk,bkhw->bqhw", share, v).reshape(B, T, D)
        return self._product(y, f"{name}o_proj")

    def _moe(self, x, previous, name):
        c = self.c
        if c["moe_2layer_gate"]:
            logits = self._product(
                np.tanh(self._product(x, f"{name}gate.wg.0")), f"{name}gate.wg.2"
            )
        else:
            logits = self._product(x, f"{name}gate.wg")
        if previous is not None:
            logits = logits + self._product(previous, f"{name}gate.gate_map")
        scored, N = logits, logits.shape[-1]
        if c["moe_use_logits_norm"]:
            deviation = logits.std(axis=-1, ddof=1, keepdims=True)
            scored = logits / (deviation / c["moe_gate_norm_std"])
        descending = -np.sort(-scored, axis=-1)
        selected = scored >= descending[..., K - 1 : K]
        if c["moe_use_mixtral_gating"]:
            gates = _softmax(np.where(selected, scored, -np.inf))
        else:
            gates = np.where(selected & (np.arange(N) < N - 1), _softmax(scored), 0.0)
            gates /= gates.sum(axis=-1, keepdims=True)
        once = c["moe_use_mixtral_gating"] or c["moe_feature_no_mul_topk"]
        given = x if once else K * x
        y = sum(
            gates[..., i, None] * self._expert(given, N - i, f"{name}experts.experts.{i}.")
            for i in range(N)
        )
        return y, logits, gates, selected, descending[..., K - 1] - descending[..., K]

    def _expert(self, x, from_end, name):
        """The last is zero, before it are copy and two constants; all others are FFNs."""
        if from_end == 1:
            return np.zeros_like(x)
        if from_end == 2:
            return x
        if from_end <= 4:
            a = _softmax(self._product(x, f"{name}wg"))
            return a[..., :1] * x + a[..., 1:] * self.t[f"{name}constant"]
        silu, linear = np.split(self._product(x, f"{name}up_proj"), 2, axis=-1)
        return self._product(silu / (1 + np.exp(-silu)) * linear, f"{name}down_proj")


def loss(logits, tokens) -> float:
    """Mean cross-entropy of every token after the first."""
    probs = _softmax(logits[:, :-1])
    return -np.log(np.take_along_axis(probs, tokens[:, 1:, None], axis=-1)).mean()


def _softmax(a):
    e = np.exp(a - a.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)
