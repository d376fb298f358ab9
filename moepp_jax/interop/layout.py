"""Where each tensor of the released layout lies in our parameters, which are stacked over layers.

The names are those of the authors' code. What their code cannot hold goes on in the same way: a
dense layer's SwiGLU, which it has none of, is named and stored as an expert's.
"""

from __future__ import annotations

from typing import NamedTuple

from moepp_jax.config import Config


class Place(NamedTuple):
    """One tensor.

    Attributes:
      leaf: our parameter, a path joined by slashes.
      index: of the tensor in that parameter's leading axes.
      piece: shape of the parameter's part at that index.
      shape: of the tensor itself: the piece, or the piece with its first two axes in one.
    """

    leaf: str
    index: tuple[int, ...]
    piece: tuple[int, ...]
    shape: tuple[int, ...]


def layout(config: Config) -> dict[str, Place]:
    """Every tensor's name and place; together they are all of our parameters, each part once."""
    m = config.model
    D, V, W = m.hidden_size, m.vocab_size, m.head_dim
    places = {
        "model.embed_tokens.weight": _place("embedding", (), V, D),
        "model.norm.weight": _place("final/norm", (), D),
    }
    if not m.tied_embeddings:
        places["lm_head.weight"] = _place("output", (), V, D)
    for i in range(m.num_layers):
        block, j = divmod(i, m.moe_every)
        dense = j < m.moe_every - 1
        leaf = f"layers/dense_{j}_" if dense else "layers/"
        layer = {
            "input_layernorm.weight": _place(f"{leaf}attention_norm/norm", (block,), D),
            "post_attention_layernorm.weight": _place(f"{leaf}ffn_norm/norm", (block,), D),
            **{
                f"self_attn.{name}_proj.weight": _place(f"{leaf}attention/{name}", (block,), *shape)
                for name, shape in {
                    "q": (D, D),
                    "k": (m.num_kv_heads * W, D),
                    "v": (m.num_kv_heads * W, D),
                    "o": (D, D),
                }.items()
            },
        }
        if dense:
            layer |= _swiglu("mlp.", f"{leaf}dense", (block,), D, m.dense_ffn_size)
        else:
            layer |= _moe(config, block)
        places |= {f"model.layers.{i}.{name}": place for name, place in layer.items()}
    return places


def _moe(config: Config, block: int) -> dict[str, Place]:
    e, D, N = config.moe, config.model.hidden_size, config.moe.num_experts
    gate, router = "mlp.moe.gate.", "layers/moe/router/"
    places = {}
    if e.router_layers == 2:
        places[f"{gate}wg.0.weight"] = _place(f"{router}w_hidden", (block,), 8 * N, D)
        places[f"{gate}wg.2.weight"] = _place(f"{router}w_logits", (block,), N, 8 * N)
    else:
        places[f"{gate}wg.weight"] = _place(f"{router}w", (block,), N, D)
    if e.residual != "none":
        places[f"{gate}gate_map.weight"] = _place(f"{router}w_residual", (block,), N, N)
    for i in range(e.n_ffn + e.n_const):
        expert = f"mlp.moe.experts.experts.{i}."
        if i < e.n_ffn:
            places |= _swiglu(expert, "layers/moe/ffn", (block, i), D, e.ffn_size)
        else:
            index = (block, i - e.n_ffn)
            places[f"{expert}constant"] = _place("layers/moe/const/v", index, D)
            places[f"{expert}wg.weight"] = _place("layers/moe/const/w", index, 2, D)
    return places


def _swiglu(name: str, leaf: str, index: tuple[int, ...], D: int, F: int) -> dict[str, Place]:
    """The SiLU half and the linear half are one matrix there, a stack of two here."""
    return {
        f"{name}up_proj.weight": Place(f"{leaf}/w_in", index, (2, F, D), (2 * F, D)),
        f"{name}down_proj.weight": _place(f"{leaf}/w_out", index, D, F),
    }


def _place(leaf: str, index: tuple[int, ...], *shape: int) -> Place:
    return Place(leaf, index, shape, shape)
