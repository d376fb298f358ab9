"""Where each tensor of a checkpoint lies in our parameters, which are stacked over layers.

The names here are those of the authors' code; `families` has those of other models. What their code
cannot hold goes on in the same way: a dense layer's SwiGLU, which it has none of, is named and
stored as an expert's, and norms of queries and keys are named as others name them.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import NamedTuple

from moepp_jax.config import Config

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Place(NamedTuple):
    """One tensor.

    Attributes:
      leaf: our parameter, a path joined by slashes.
      index: of the tensor in that parameter's leading axes.
      piece: shape of the parameter's part at that index.
      shape: of the tensor itself: the piece, or the piece with two neighbouring axes in one.
    """

    leaf: str
    index: tuple[int, ...]
    piece: tuple[int, ...]
    shape: tuple[int, ...]


Places = dict[str, Place]


def layout(config: Config) -> Places:
    """Every tensor's name and place; together they are all of our parameters, each part once."""
    e, D = config.moe, config.model.hidden_size

    def moe(block: int) -> Places:
        gate, router, N = "mlp.moe.gate.", "layers/moe/router/", e.num_experts
        places = {}
        if e.router_layers == 2:
            places[f"{gate}wg.0.weight"] = place(f"{router}w_hidden", (block,), 8 * N, D)
            places[f"{gate}wg.2.weight"] = place(f"{router}w_logits", (block,), N, 8 * N)
        else:
            places[f"{gate}wg.weight"] = place(f"{router}w", (block,), N, D)
        if e.bias_rate:
            places[f"{gate}bias"] = place(f"{router}bias", (block,), N)
        if e.residual != "none":
            places[f"{gate}gate_map.weight"] = place(f"{router}w_residual", (block,), N, N)
        for i in range(e.n_ffn + e.n_const):
            expert = f"mlp.moe.experts.experts.{i}."
            if i < e.n_ffn:
                places |= _swiglu(expert, "layers/moe/ffn", (block, i), D, e.ffn_size)
            else:
                index = (block, i - e.n_ffn)
                places[f"{expert}constant"] = place("layers/moe/const/v", index, D)
                places[f"{expert}wg.weight"] = place("layers/moe/const/w", index, 2, D)
        return places

    def dense(leaf: str, block: int) -> Places:
        return _swiglu("mlp.", leaf, (block,), D, config.model.dense_ffn_size)

    return around(config, moe, dense)


def with_head(places: Places, names: Container[str]) -> Places:
    """The places, and the embedding's once more where it is tied and came as output matrix too."""
    return places | {HEAD: places.get(HEAD, places[EMBEDDING])} if HEAD in names else places


def around(
    config: Config,
    moe: Callable[[int], Places],
    dense: Callable[[str, int], Places] | None = None,
) -> Places:
    """All places of a model in whose layers these are the places behind the second norm.

    Args:
      moe: block -> names after the layer's prefix, of its MoE layer.
      dense: leaf and block -> the same of a dense layer, where there are any.
    """
    m = config.model
    D, V, W = m.hidden_size, m.vocab_size, m.head_width
    heads = {"q": m.num_heads, "k": m.num_kv_heads, "v": m.num_kv_heads}
    places = {
        EMBEDDING: place("embedding", (), V, D),
        "model.norm.weight": place("final/norm", (), D),
    }
    if not m.tied_embeddings:
        places[HEAD] = place("output", (), V, D)
    for i in range(m.num_layers):
        block, j = divmod(i, m.moe_every)
        is_dense = j < m.moe_every - 1
        leaf = f"layers/dense_{j}_" if is_dense else "layers/"
        layer = {
            "input_layernorm.weight": place(f"{leaf}attention_norm/norm", (block,), D),
            "post_attention_layernorm.weight": place(f"{leaf}ffn_norm/norm", (block,), D),
            "self_attn.o_proj.weight": place(f"{leaf}attention/o", (block,), D, m.num_heads * W),
        }
        for name, H in heads.items():
            part = f"{leaf}attention/{name}"
            layer[f"self_attn.{name}_proj.weight"] = place(part, (block,), H * W, D)
            if name != "v" and m.qk_norm != "none":
                width = W if m.qk_norm == "head" else H * W
                layer[f"self_attn.{name}_norm.weight"] = place(f"{part}_norm/norm", (block,), width)
        layer |= dense(f"{leaf}dense", block) if is_dense else moe(block)
        places |= {f"model.layers.{i}.{name}": at for name, at in layer.items()}
    return places


def place(leaf: str, index: tuple[int, ...], *shape: int) -> Place:
    """The place of a tensor that is stored as it is here."""
    return Place(leaf, index, shape, shape)


def _swiglu(name: str, leaf: str, index: tuple[int, ...], D: int, F: int) -> Places:
    """The SiLU half and the linear half are one matrix there, a stack of two here."""
    return {
        f"{name}up_proj.weight": Place(f"{leaf}/w_in", index, (2, F, D), (2 * F, D)),
        f"{name}down_proj.weight": place(f"{leaf}/w_out", index, D, F),
    }
