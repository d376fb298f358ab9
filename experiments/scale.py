"""How large an experiment is: the recipe that its variants change, its sizes, lengths and seeds.

`tiny` trains on a laptop's two cores, `small` on one accelerator; `paper` is the paper's own
models, for a pod.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from moepp_jax.config import Config, differences
from moepp_jax.configs import base, english, moepp_0p6b, moepp_1b, moepp_2b, moepp_7b, tiny
from moepp_jax.errors import ConfigError, did_you_mean
from moepp_jax.moe import rules

CORPORA = "corpora"  # folder, or a link to it, of the paper's text: configs/data/paper_mixture.py
MOEPP, VANILLA = "moepp", "moe"  # the variants of a recipe, as `base.variant` names them


class Variant(NamedTuple):
    """What is compared with other variants.

    Attributes:
      name: in tables and figures; of an experiment no two have the same.
      config: of seed 0.
      seeds: how many it is trained with, 0 and up.
      against: the variant that it is compared with; none is compared with one of its own name.
    """

    name: str
    config: Config
    seeds: int
    against: str = ""


@dataclasses.dataclass(frozen=True)
class Scale:
    """
    Attributes:
      recipe: of MoE++ in its usual size, which the first of `sizes` is too.
      sizes: name -> the recipe of MoE++ in that size.
      growing: of each model of a scaling curve, smallest first, the recipe of MoE++.
      lengths: of a scaling curve, in steps.
      seeds: that a variant is trained with where its experiment does not say.
    """

    name: str
    recipe: Callable[[], ConfigDict]
    sizes: Mapping[str, Callable[[], ConfigDict]]
    growing: Mapping[str, Callable[[], ConfigDict]]
    lengths: tuple[int, ...]
    seeds: int

    def variant(
        self,
        name: str,
        kind: str = MOEPP,
        fields: Mapping[str, Any] | None = None,
        *,
        against: str = "",
        of: Callable[[], ConfigDict] | None = None,
        seeds: int | None = None,
    ) -> Variant:
        """A variant of the scale's recipe.

        Args:
          kind: MOEPP, or VANILLA, the recipe's twin.
          fields: dotted name -> value, set last.
          of: another recipe than the usual one.
          seeds: by default the scale's.
        """
        recipe = base.variant((of or self.recipe)(), kind)
        recipe.update_from_flattened_dict(dict(fields or {}))
        seeds = self.seeds if seeds is None else seeds
        return Variant(name, Config.parse(recipe), seeds, against)

    def routed_by(self, rule: str, against: str = "") -> Variant:
        """The usual recipe with a routing rule and its pool, as configs/routing has them."""
        there = importlib.import_module(f"moepp_jax.configs.routing.{rule}").get_config()
        own = differences(tiny.get_config().to_dict(), there.to_dict())
        pool = {n: v for n, (_, v) in own.items() if not n.startswith("moe.rule.")}
        recipe = self.recipe()
        recipe.update_from_flattened_dict(pool)
        recipe.moe.rule = there.moe.rule
        return Variant(rule, Config.parse(recipe), self.seeds, against)


def _changed(recipe: Callable[[], ConfigDict], **groups: Mapping[str, Any]) -> Callable:
    """The recipe with fields of its groups changed."""

    def changed() -> ConfigDict:
        c = recipe()
        for group, fields in groups.items():
            c[group].update(fields)
        return c

    return changed


def _tiny() -> ConfigDict:
    """The default job's model on its text, whose three domains are told apart in evaluation."""
    c = english.get_config()
    c.train.update(steps=400, log_every=10, eval_every=400, eval_batches=0, save_every=200)
    return c


def _small() -> ConfigDict:
    """12 layers of 512, 229 M parameters of which 73 M are active, for one accelerator."""
    c = _tiny()
    c.model.update(
        num_layers=12, hidden_size=512, num_heads=8, num_kv_heads=8, vocab_size=8192,
        dense_ffn_size=1408, init_std=0.02, dtype="bfloat16",
    )  # fmt: skip
    c.moe.update(ffn_size=1408, group_size=8 * 512)
    c.data.seq_len = 512
    c.optim.update(lr=1e-3, warmup_steps=200)
    c.train.update(steps=2000, batch_size=64, eval_every=2000, save_every=1000)
    return c


_POOLS = {
    "8+4": dict(n_ffn=8, n_const=2, n_copy=1, n_zero=1),
    "16+4": dict(n_ffn=16, n_const=2, n_copy=1, n_zero=1),
    "32+8": dict(n_ffn=32, n_const=6, n_copy=1, n_zero=1),
}


def _in_three_pools(recipe: Callable[[], ConfigDict]) -> dict[str, Callable[[], ConfigDict]]:
    return {name: _changed(recipe, moe=pool) for name, pool in _POOLS.items()}


def _wide(recipe: Callable, layers: int, heads: int, head_width: int, ffn_size: int) -> Callable:
    """The recipe in another depth and width."""
    model = dict(num_layers=layers, num_heads=heads, num_kv_heads=heads)
    model |= dict(hidden_size=heads * head_width, dense_ffn_size=ffn_size)
    return _changed(recipe, model=model, moe=dict(ffn_size=ffn_size))


TINY = Scale(
    "tiny",
    _tiny,
    sizes=_in_three_pools(_tiny)
    | {"16+4, larger": _wide(_changed(_tiny, moe=_POOLS["16+4"]), 6, 3, 64, 576)},
    growing={
        "2 x 64": _wide(_tiny, 2, 1, 64, 192),
        "3 x 96": _wide(_tiny, 3, 2, 48, 288),
        "4 x 128": _tiny,
        "5 x 192": _wide(_tiny, 5, 3, 64, 576),
    },
    lengths=(100, 200, 400, 800),
    seeds=3,
)

SMALL = Scale(
    "small",
    _small,
    sizes=_in_three_pools(_small)
    | {"16+4, larger": _wide(_changed(_small, moe=_POOLS["16+4"]), 16, 12, 64, 2048)},
    growing={
        "6 x 256": _wide(_small, 6, 4, 64, 704),
        "8 x 384": _wide(_small, 8, 6, 64, 1024),
        "12 x 512": _small,
        "16 x 768": _wide(_small, 16, 12, 64, 2048),
    },
    lengths=(500, 1000, 2000, 4000),
    seeds=3,
)

# On 64 TPU v5p, keeping for backward as much as fits of both twins: their recipes say what other
# slices take.
_0P6B, _1B, _2B, _7B = (
    _changed(
        functools.partial(module.get_config, CORPORA),
        model=dict(remat=remat),
        train=dict(accumulate=1),
    )
    for module, remat in (
        (moepp_0p6b, "none"),
        (moepp_1b, "none"),
        (moepp_2b, "none"),
        (moepp_7b, "w_in"),
    )
)
PAPER = Scale(
    "paper",
    _0P6B,
    sizes={"8+4": _0P6B, "16+4": _1B, "32+8": _2B, "16+4, larger": _7B},
    growing={"0.6B": _0P6B, "1B": _1B, "2B": _2B, "7B": _7B},
    lengths=(2981, 5961, 11_921, 23_842),  # 12.5, 25, 50 and 100 B tokens
    seeds=1,
)

SCALES = {scale.name: scale for scale in (TINY, SMALL, PAPER)}


def find(name: str) -> Scale:
    """
    Raises:
      ConfigError: there is no such scale.
    """
    if name not in SCALES:
        hint = did_you_mean(name, SCALES, f"there are {', '.join(SCALES)}")
        raise ConfigError(f"--scale={name}: there is no such scale{hint}")
    return SCALES[name]


def rule_names() -> list[str]:
    """The routing rules that have a recipe of their own in configs/routing."""
    return [name for name in rules.names() if name != "moepp"]
