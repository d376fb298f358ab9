"""Where each tensor of a checkpoint lies in our parameters, which are stacked over layers.

The names here are those of the authors' code; `families` has those of other models. What their code
cannot hold goes on in the same way: a dense layer's SwiGLU, which it has none of, is named and
stored as an expert's, and norms of queries and keys are named as others name them.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import NamedTuple

import jax

from moepp_jax.config import Config
from moepp_jax.model import describe
from moepp_jax.moe.param import path_of

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


class Ours:
    """Our parameters by path, as the model describes them; where a tensor lies in one."""

    def __init__(self, config: Config):
        described = jax.tree_util.tree_leaves_with_path(describe(config))
        self._shapes = {path_of(path): p.shape for path, p in described}

    def __contains__(self, leaf: str) -> bool:
        return leaf in self._shapes

    def under(self, prefix: str) -> list[str]:
        """The parameters below a prefix."""
        return [leaf for leaf in self._shapes if leaf.startswith(prefix)]

    def place(self, leaf: str, *index: int, merged: int | None = None) -> Place:
        """The place of a tensor that is stored as it is here.

        Args:
          merged: the tensor has this axis of the piece and the one behind it in one.
        """
        piece = self._shapes[leaf][len(index) :]
        shape = piece
        if merged is not None:
            one = piece[merged] * piece[merged + 1]
            shape = (*piece[:merged], one, *piece[merged + 2 :])
        return Place(leaf, index, piece, shape)


def layout(config: Config) -> Places:
    """Every tensor's name and place; together they are all of our parameters, each part once."""
    ours, pool = Ours(config), config.moe.pool

    def moe(block: int) -> Places:
        places = {}
        for leaf in ours.under(_ROUTER):
            name = leaf.removeprefix(_ROUTER)
            places[f"mlp.moe.gate.{_GATE.get(name, name)}"] = ours.place(leaf, block)
        for i in range(pool.n_ffn + pool.n_const):
            expert = f"mlp.moe.experts.experts.{i}."
            if i < pool.n_ffn:
                places |= _swiglu(ours, expert, "layers/moe/ffn", block, i)
            else:
                at = (block, i - pool.n_ffn)
                places[f"{expert}constant"] = ours.place("layers/moe/const/v", *at)
                places[f"{expert}wg.weight"] = ours.place("layers/moe/const/w", *at)
        return places

    def dense(leaf: str, block: int) -> Places:
        return _swiglu(ours, "mlp.", leaf, block)

    return around(config, ours, moe, dense)


_ROUTER = "layers/moe/router/"
# What the authors call a router's parameters; others, a rule's state among them, keep their names.
_GATE = {
    "w": "wg.weight",
    "w_hidden": "wg.0.weight",
    "w_logits": "wg.2.weight",
    "w_residual": "gate_map.weight",
}


def with_head(places: Places, names: Container[str]) -> Places:
    """The places; those of a tied embedding under the names that it came by.

    It may have come as the embedding, as the output matrix, or as both.
    """
    if HEAD not in names or HEAD in places:
        return places
    tied = places | {HEAD: places[EMBEDDING]}
    return tied if EMBEDDING in names else {n: p for n, p in tied.items() if n != EMBEDDING}


def around(
    config: Config,
    ours: Ours,
    moe: Callable[[int], Places],
    dense: Callable[[str, int], Places] | None = None,
) -> Places:
    """All places of a model in whose layers these are the places behind the second norm.

    Args:
      moe: block -> names after the layer's prefix, of its MoE layer.
      dense: leaf and block -> the same of a dense layer, where there are any.
    """
    m = config.model
    places = {
        EMBEDDING: ours.place("embedding"),
        "model.norm.weight": ours.place("final/norm"),
    }
    if "output" in ours:
        places[HEAD] = ours.place("output")
    for i in range(m.num_layers):
        block, j = divmod(i, m.moe_every)
        is_dense = j < m.moe_every - 1
        leaf = f"layers/dense_{j}_" if is_dense else "layers/"
        layer = {
            "input_layernorm.weight": ours.place(f"{leaf}attention_norm/norm", block),
            "post_attention_layernorm.weight": ours.place(f"{leaf}ffn_norm/norm", block),
        }
        for name in ("q", "k", "v", "o"):
            layer[f"self_attn.{name}_proj.weight"] = ours.place(f"{leaf}attention/{name}", block)
            norm = f"{leaf}attention/{name}_norm/norm"
            if norm in ours:
                layer[f"self_attn.{name}_norm.weight"] = ours.place(norm, block)
        layer |= dense(f"{leaf}dense", block) if is_dense else moe(block)
        places |= {f"model.layers.{i}.{name}": at for name, at in layer.items()}
    return places


def _swiglu(ours: Ours, name: str, leaf: str, *index: int) -> Places:
    """The SiLU half and the linear half are one matrix there, a stack of two here."""
    return {
        f"{name}up_proj.weight": ours.place(f"{leaf}/w_in", *index, merged=0),
        f"{name}down_proj.weight": ours.place(f"{leaf}/w_out", *index),
    }
