"""Runs: a configuration and a seed, known by what they compute, so that each is trained once."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from moepp_jax import earlier, flops
from moepp_jax.config import Config, differences
from moepp_jax.experiments.scale import Scale, Variant
from moepp_jax.moe import rules

# Of the arithmetic: one more where a commit changes the losses of a configuration by more than
# rounding. Rows of another number are not mixed with new ones. A test of its losses notices.
NUMERICS = 1

# Fields, or groups with the dot, that say where, how fast or how often, not what is computed.
COSMETIC = (
    "seed",  # stands beside the fingerprint
    "mesh.",
    "generate.",
    "data.dir",
    "data.tfds_dir",
    "data.worker_processes",
    "model.attention",
    "model.remat",
    "model.loss_chunk",
    "moe.exchange_parts",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep",
    "train.local_dir",
    "train.local_every",
    "train.hang_factor",
    "train.hang_seconds",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training, from a seed.

    Attributes:
      name: of a variant that it is of, for people.
    """

    config: Config
    name: str = dataclasses.field(default="", compare=False)

    # Once each: the first hashes a configuration, the second describes a model, and boards ask for
    # them of every run several times a second.
    @functools.cached_property
    def key(self) -> tuple[str, int]:
        """What no other run has: fingerprint and seed."""
        return fingerprint(self.config), self.config.seed

    @functools.cached_property
    def nominal_flops(self) -> float:
        """Floating-point operations of its training, at balance."""
        tokens = self.config.train.steps * self.config.batch_tokens
        return tokens * flops.per_token(self.config).train

    @property
    def folder(self) -> str:
        """The name of its work directory."""
        return "{}-{}".format(*self.key)


def runs_of(variant: Variant, seeds: int | None = None) -> list[Run]:
    """A variant's, one a seed.

    Args:
      seeds: instead of the variant's own number.
    """
    count = variant.seeds if seeds is None else seeds
    configs = (dataclasses.replace(variant.config, seed=seed) for seed in range(count))
    return [Run(config, variant.name) for config in configs]


def plan(variants: Iterable[Variant], seeds: int | None = None) -> list[Run]:
    """The runs of all variants, each once; first those of seed 0, then those of seed 1, ...

    So a sweep that is not through yet says something of every variant.
    """
    found: dict[tuple[str, int], Run] = {}
    for variant in variants:
        for run in runs_of(variant, seeds):
            found.setdefault(run.key, run)
    return sorted(found.values(), key=lambda run: run.config.seed)


def fingerprint(config: Config) -> str:
    """Eight digits that differ where what is computed does, whatever the seed.

    A field at the value that stands for its absence in earlier configurations has no say, nor has
    an option of a rule at its default: a new one does not make all rows strangers.
    """
    groups: dict[str, Any] = {field.name: {} for field in dataclasses.fields(Config)}
    usual = config.moe.rule.options()
    absent, _ = earlier.completed(groups | {"seed": None, "moe": {"rule": usual}})
    says = {
        name: value
        for name, (_, value) in differences(absent, config.to_dict()).items()
        if value is not None and not name.startswith(COSMETIC)
    }
    says["numerics"] = NUMERICS
    return hashlib.sha256(json.dumps(says, sort_keys=True).encode()).hexdigest()[:8]


def changes(config: Config, scale: Scale) -> str:
    """How it differs from the scale's recipe, as "moe.rule.tau=0.25 train.steps=200"."""
    usual = Config.parse(scale.recipe())
    found = differences(usual.to_dict(), config.to_dict())
    said = {n: v for n, (_, v) in found.items() if v is not None and not n.startswith(COSMETIC)}
    if "moe.rule.type" in said:  # all of its options, whichever the other rule has too
        said = {n: v for n, v in said.items() if not n.startswith("moe.rule.")}
        said |= {f"moe.rule.{n}": v for n, v in rules.fields_of(config.moe.rule).items()}
    return " ".join(f"{name}={value}" for name, value in said.items())


def missing(runs: Sequence[Run], keys: Iterable[tuple[str, int]]) -> list[Run]:
    """Those of the runs that have no row of these keys."""
    there = set(keys)
    return [run for run in runs if run.key not in there]
