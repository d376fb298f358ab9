"""The configuration: a ConfigDict at the edge (`configs/`), frozen dataclasses inside.

`Config.parse` is the one door between them. It refuses unknown, missing, ill-typed and
contradictory fields before anything is compiled or written, each with one `ConfigError` that names
the field, its value and what would be right. What the fields mean is said once, in
`configs/base.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import os
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

import ml_collections

from moepp_jax import limits
from moepp_jax.errors import ConfigError
from moepp_jax.moe import Pool, Rule, RuleError, rules
from moepp_jax.storage import holds_credentials


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: str
    vocab_size: int
    moe_every: int
    dense_ffn_size: int
    tied_embeddings: bool
    rope_theta: float
    rope_type: str
    rope_scaling: float
    rope_low_freq_factor: float
    rope_high_freq_factor: float
    rope_original_length: int
    sliding_window: int
    norm_eps: float
    init_std: float
    const_std: float
    dtype: str
    attention: str
    remat: str
    loss_chunk: int

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    n_ffn: int
    n_const: int
    n_copy: int
    n_zero: int
    ffn_size: int
    rule: Rule
    gamma: float
    group_size: int
    dispatch: str
    eval_dispatch: str
    exchange_buffer: float
    exchange_parts: int
    input_scale: float

    @property
    def pool(self) -> Pool:
        return Pool(self.n_ffn, self.n_const, self.n_copy, self.n_zero)

    @property
    def num_experts(self) -> int:
        """N, all kinds counted."""
        return self.pool.size


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    path: str
    weight: float
    text_field: str


class Named(dict):
    """Groups of fields under names of the user's: not to be changed, so it can be hashed."""

    def __hash__(self):
        return hash(frozenset(self.items()))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    sources: Named[str, SourceConfig]
    dir: str
    tfds_dir: str
    tokenizer: str
    seq_len: int
    eval_fraction: float
    worker_processes: int

    @property
    def mixed(self) -> dict[str, SourceConfig]:
        """The sources with a weight: what is prepared, trained and evaluated on."""
        return {name: source for name, source in self.sources.items() if source.weight > 0}


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    lr: float
    schedule: str
    decay_steps: int
    final_lr_ratio: float
    initial_lr: float
    warmup_steps: int
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int
    first_batch: int
    batch_size: int
    accumulate: int
    log_every: int
    eval_every: int
    eval_batches: int
    save_every: int
    keep: int
    on_save_error: str
    local_dir: str
    local_every: int
    on_nonfinite: str
    max_skipped: int
    skip_above: float
    hang_factor: float
    hang_seconds: float


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int
    fsdp: int
    expert: int


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int
    model: ModelConfig
    moe: MoEConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    mesh: MeshConfig
    generate: GenerateConfig

    @property
    def batch_tokens(self) -> int:
        """Of a training batch, on all devices together."""
        return self.train.batch_size * self.data.seq_len

    @classmethod
    def parse(cls, fields: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
        """The validated configuration.

        Raises:
          ConfigError: a field is unknown, missing, of another type, out of range or contradicts
            another one.
        """
        if isinstance(fields, ml_collections.ConfigDict):
            fields = fields.to_dict()
        config = _build(cls, fields, prefix="")
        _require_no_credentials(config)
        limits.check(config)
        return config

    def replace(self, group: str, **fields: Any) -> Config:
        """This configuration with fields of a group changed, and checked again as `parse` does.

        Args:
          group: "train", "moe.rule".
        """
        tree = node = self.to_dict()
        for part in group.split("."):
            node = node[part]
        node |= fields
        return Config.parse(tree)

    def to_dict(self) -> dict[str, Any]:
        return {group.name: _plain(getattr(self, group.name)) for group in dataclasses.fields(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"


def _require_no_credentials(config: Config) -> None:
    data = config.data
    paths = {f"data.{name}": getattr(data, name) for name in ("dir", "tfds_dir", "tokenizer")}
    paths |= {f"data.sources.{name}.path": source.path for name, source in data.sources.items()}
    paths["train.local_dir"] = config.train.local_dir
    for name, path in paths.items():
        if holds_credentials(path):
            raise ConfigError(
                f"config.{name} holds credentials, which would be written to config.json: "
                "give the path without what stands before @, and the key in the environment"
            )


def _plain(value: Any) -> Any:
    """What `parse` makes this value of."""
    if isinstance(value, Rule):
        return rules.fields_of(value)
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Named):
        return {name: _plain(group) for name, group in value.items()}
    return value


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> dict[str, tuple]:
    """The leaves in which two nested dictionaries differ: dotted name -> (value in a, in b)."""
    found: dict[str, tuple] = {}
    for key in sorted(a.keys() | b.keys()):
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            found |= differences(x, y, f"{prefix}{key}.")
        elif x != y:
            found[f"{prefix}{key}"] = (x, y)
    return found


def _build(cls: type, fields: Any, prefix: str) -> Any:
    if not isinstance(fields, Mapping):
        name = f"config.{prefix}".rstrip(".")
        raise ConfigError(f"{name} = {fields!r} must be a group of fields")
    types = _types(cls)
    for name in fields:
        if name not in types:
            near = _near(str(name), types, prefix)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(types)}"
            raise ConfigError(f"unknown field config.{prefix}{name} = {fields[name]!r}: {hint}")
    values = {}
    for name, kind in types.items():
        if name not in fields:
            raise ConfigError(f"config.{prefix}{name} is missing: {_place_of_values(cls)}")
        value = fields[name]
        if kind is Rule:
            values[name] = _rule(value, Pool(*(values[n] for n in Pool._fields)))
        elif dataclasses.is_dataclass(kind):
            values[name] = _build(kind, value, f"{prefix}{name}.")
        elif get_origin(kind) is Named:
            values[name] = _build_all(get_args(kind)[1], value, f"{prefix}{name}.")
        else:
            values[name] = _typed(f"config.{prefix}{name}", value, kind)
    return cls(**values)


_types = functools.cache(get_type_hints)


def _place_of_values(cls: type) -> str:
    if cls is SourceConfig:
        return "configs/base.py makes sources: base.source(path, weight=1.0, text_field='text')"
    return "configs/base.py has a value"


def _rule(fields: Any, pool: Pool) -> Rule:
    if not isinstance(fields, Mapping):
        raise ConfigError(
            f"config.moe.rule = {fields!r} must be a group of fields, such as "
            f"{rules.fields_of(rules.make('moepp', Pool(8, 2, 1, 1)))}"
        )
    for name, count in zip(pool._fields, pool, strict=True):
        least = 1 if name == "n_ffn" else 0
        if count < least:
            raise ConfigError(f"config.moe.{name} = {count!r} must be at least {least}")
    try:
        return rules.parse(fields, pool)
    except RuleError as error:
        raise ConfigError(f"config.moe.rule.{error}") from error


def near_field(name: str) -> str | None:
    """The field, with its group, that may have been meant by a name alone: "lr", "tau"."""
    return _near(name, {}, "")


def _near(name: str, types: Mapping[str, Any], prefix: str) -> str | None:
    """The field that may have been meant: one of a like name here, else elsewhere."""
    like = difflib.get_close_matches(name, types, n=1)
    if like:
        return f"{prefix}{like[0]}"
    groups = {g: t for g, t in _types(Config).items() if dataclasses.is_dataclass(t)}
    there = {field: f"{g}.{field}" for g, t in groups.items() for field in _types(t)}
    there |= {option: f"moe.rule.{option}" for option in rules.find("moepp").options()}
    like = difflib.get_close_matches(name, there, n=1)
    return there[like[0]] if like else None


def _build_all(cls: type, groups: Any, prefix: str) -> Named:
    if not isinstance(groups, Mapping) or not groups:
        name = f"config.{prefix}".rstrip(".")
        raise ConfigError(f"{name} = {groups!r} must be groups of fields, at least one")
    return Named((name, _build(cls, group, f"{prefix}{name}.")) for name, group in groups.items())


def _typed(name: str, value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise ConfigError(f"{name} is a number above 1e308, and must be finite") from None
    if type(value) is not kind:
        raise ConfigError(f"{name} = {value!r} must be of type {kind.__name__}")
    if kind is str and value.startswith("~"):
        return os.path.expanduser(value)  # no shell does so behind a "="
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{name} = {value!r} must be finite")
    return value
