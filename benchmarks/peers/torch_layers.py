"""Layers in PyTorch: blocks of transformers, and one with the arithmetic of the authors' code.

Imports PyTorch and transformers, which the package does not need: see `missing`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

from moepp_jax.benchmarks import timing
from moepp_jax.benchmarks.peers.inputs import SCALE, TOP_K, Inputs, Sizes

# How transformers calls its experts: a loop, and a grouped product, which is its default.
IMPLEMENTATIONS = ("eager", "grouped_mm")


def missing() -> str | None:
    """The line that says what is not installed."""
    absent = [n for n in ("torch", "transformers") if importlib.util.find_spec(n) is None]
    if not absent:
        return None
    return f"without {' and '.join(absent)}: no layers in PyTorch (pip install 'moepp_jax[hf]')"


def layers(sizes: Sizes, inputs: Inputs) -> dict[tuple[str, str], Callable]:
    """(kind, name) -> a module that takes (B, S, D)."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    found = {
        ("vanilla", f"{name}, {how}"): make(sizes, inputs, how)
        for name, make in (("Mixtral", _mixtral), ("OLMoE", _olmoe))
        for how in IMPLEMENTATIONS
    }
    found["moepp", "the authors' arithmetic, PyTorch"] = _authors(inputs)
    found["identity", "LongCat-Flash"] = _longcat(sizes, inputs)
    return found


def case(layer: Callable, inputs: Inputs, way: str) -> timing.Case:
    """As `jax_layers.case`, of tensors."""
    import torch

    x, dy = torch.tensor(inputs.x), torch.tensor(inputs.dy)
    if way == "forward":

        def forward(x):
            with torch.no_grad():
                return layer(x)

        return timing.Case(forward, (x,))
    params = [p for p in layer.parameters() if p.requires_grad]

    def both(x, dy):
        y = layer(x)
        d_x, *d_params = torch.autograd.grad(y, [x, *params], dy, allow_unused=True)
        return y.detach(), d_x, d_params

    return timing.Case(both, (x.requires_grad_(), dy))


def _load(module, **arrays):
    """Copies arrays into a module's parameters, which must be all of them."""
    import torch

    own = dict(module.named_parameters())
    assert own.keys() == arrays.keys(), f"{own.keys()} are not {arrays.keys()}"
    with torch.no_grad():
        for name, array in arrays.items():
            own[name].copy_(torch.tensor(array))
    return module


def _experts(inputs: Inputs) -> dict:
    w_in = inputs.ffn["w_in"]
    return {
        "experts.gate_up_proj": w_in.reshape(len(w_in), -1, w_in.shape[-1]),
        "experts.down_proj": inputs.ffn["w_out"],
    }


def _mixtral(sizes: Sizes, inputs: Inputs, how: str):
    from transformers.models.mixtral import modeling_mixtral as m

    config = m.MixtralConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.ffn_size,
        num_local_experts=sizes.n_ffn,
        num_experts_per_tok=TOP_K,
    )
    config._experts_implementation = how
    arrays = {"gate.weight": inputs.routers["vanilla"]} | _experts(inputs)
    return _load(m.MixtralSparseMoeBlock(config), **arrays).eval()


def _olmoe(sizes: Sizes, inputs: Inputs, how: str):
    from transformers.models.olmoe import modeling_olmoe as m

    config = m.OlmoeConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.ffn_size,
        num_experts=sizes.n_ffn,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
    )
    config._experts_implementation = how
    arrays = {"gate.weight": inputs.routers["vanilla"]} | _experts(inputs)
    return _load(m.OlmoeSparseMoeBlock(config), **arrays).eval()


def _longcat(sizes: Sizes, inputs: Inputs):
    import numpy as np
    from transformers.models.longcat_flash import modeling_longcat_flash as m

    others = sum(sizes.others)
    config = m.LongcatFlashConfig(
        hidden_size=sizes.width,
        expert_ffn_hidden_size=sizes.ffn_size,
        n_routed_experts=sizes.n_ffn,
        zero_expert_num=others,
        moe_topk=TOP_K,
        routed_scaling_factor=SCALE,
    )
    arrays = {"router.classifier.weight": inputs.routers["identity"]} | _experts(inputs)
    # Its identity experts have matrices too, which nothing reads.
    unread = np.zeros((others, 2 * sizes.ffn_size, sizes.width), np.float32)
    whole = np.concatenate([arrays["experts.gate_up_proj"], unread])
    return _load(m.LongcatFlashMoE(config), **arrays | {"experts.gate_up_proj": whole}).eval()


def _authors(inputs: Inputs):
    """The inference code's gates; experts one after the other, each on its own tokens."""
    import torch
    from torch.nn import functional

    E = len(inputs.ffn["w_in"])
    J = len(inputs.const["w"])

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            arrays = {"router": inputs.routers["moepp"]} | inputs.ffn
            arrays |= {f"const_{name}": a for name, a in inputs.const.items()}
            for name, array in arrays.items():
                self.register_parameter(name, torch.nn.Parameter(torch.tensor(array)))

        def forward(self, x):
            flat = x.reshape(-1, x.shape[-1])
            probs = functional.softmax(functional.linear(flat, self.router).float(), dim=-1)
            values, experts = torch.topk(probs, TOP_K, dim=-1)
            values = torch.where(experts == probs.shape[-1] - 1, 0.0, values)  # the zero expert
            gates = values / values.sum(dim=-1, keepdim=True).clamp_min(1e-20)
            y = torch.zeros_like(flat)
            for i in range(probs.shape[-1] - 1):
                token, choice = torch.where(experts == i)
                if len(token):
                    added = gates[token, choice, None] * self.expert(i, flat[token])
                    y = y.index_add(0, token, added)
            return y.reshape(x.shape)

        def expert(self, i, x):
            if i < E:
                gate, linear = functional.linear(x, self.w_in[i].flatten(0, 1)).chunk(2, dim=-1)
                return functional.linear(functional.silu(gate) * linear, self.w_out[i])
            if i < E + J:
                a = functional.softmax(functional.linear(x, self.const_w[i - E]), dim=-1)
                return a[:, :1] * x + a[:, 1:] * self.const_v[i - E]
            return x

    return Layer().eval()
