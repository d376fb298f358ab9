"""Which values the fields of a configuration may have, by themselves and beside each other.

What routing rules ask of their own fields is said by each of them (`moepp_jax/moe/rules/`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from moepp_jax.errors import ConfigError

if TYPE_CHECKING:
    from moepp_jax.config import Config

CHOICES = {
    "model.qk_norm": ("none", "head", "full"),
    "model.rope_type": ("linear", "llama3"),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "model.attention": ("auto", "xla", "splash", "cudnn"),
    # From the one that computes least again in backward to the one that keeps least.
    "model.remat": (
        "none",
        "qkv",
        "residual",
        "w_in",
        "dots",
        "attention",
        "routing",
        "exchanged",
        "full",
    ),
    "moe.dispatch": ("capacity", "dropless"),
    "moe.eval_dispatch": ("capacity", "dropless"),
    "optim.schedule": ("cosine", "linear", "constant"),
    "train.on_save_error": ("stop", "continue"),
    "train.on_nonfinite": ("stop", "skip"),
}

# The smallest value that each of these fields may have.
AT_LEAST = {
    "model.num_layers": 1,
    "model.hidden_size": 1,
    "model.num_heads": 1,
    "model.num_kv_heads": 1,
    "model.head_dim": 0,
    "model.const_std": 0,
    "model.vocab_size": 4,
    "model.moe_every": 1,
    "model.dense_ffn_size": 1,
    "model.loss_chunk": 1,
    "model.rope_original_length": 1,
    "model.sliding_window": 0,
    "moe.ffn_size": 1,
    "moe.group_size": 1,
    "moe.exchange_buffer": 0,
    "moe.exchange_parts": 1,
    "data.seq_len": 2,
    "data.worker_processes": 0,
    "optim.initial_lr": 0,
    "optim.decay_steps": 0,
    "optim.warmup_steps": 0,
    "optim.weight_decay": 0,
    "train.steps": 1,
    "train.first_batch": 0,
    "train.batch_size": 1,
    "train.accumulate": 1,
    "train.log_every": 1,
    "train.eval_every": 1,
    "train.eval_batches": 0,
    "train.save_every": 1,
    "train.keep": 1,
    "train.local_every": 1,
    "train.max_skipped": 1,
    "train.skip_above": 0,
    "train.hang_factor": 1,
    "train.hang_seconds": 0,
    "generate.max_new_tokens": 1,
    "generate.temperature": 0,
    "generate.top_k": 0,
}

# name: (lower bound, upper bound), the lower one excluded.
WITHIN = {
    "model.rope_theta": (0, math.inf),
    "model.rope_scaling": (0, math.inf),
    "model.rope_low_freq_factor": (0, math.inf),
    "model.rope_high_freq_factor": (0, math.inf),
    "model.norm_eps": (0, 1),
    "model.init_std": (0, math.inf),
    "moe.gamma": (0, math.inf),
    "moe.input_scale": (0, math.inf),
    "data.eval_fraction": (0, 0.5),
    "optim.lr": (0, math.inf),
    "optim.eps": (0, 1),
    "optim.clip_norm": (0, math.inf),
    "generate.top_p": (0, 1),
    "generate.repetition_penalty": (0, math.inf),
}

# From 0 on, and less than this.
BELOW = {
    "seed": 2**32,
    "optim.beta1": 1,
    "optim.beta2": 1,
    "generate.seed": 2**32,
    "generate.min_p": 1,
}


def check(config: Config) -> None:
    """Refuses values that cannot be, and those that contradict each other.

    Raises:
      ConfigError: names the field, its value and what would be right.
    """
    _each(config)
    _optim(config)
    _model(config)
    _moe(config)
    _train(config)
    _data(config)
    _mesh(config)


def _value(config: Config, name: str) -> Any:
    node: Any = config
    for part in name.split("."):
        node = getattr(node, part)
    return node


def _require(holds: bool, config: Config, name: str, remedy: str) -> None:
    if not holds:
        raise ConfigError(f"config.{name} = {_value(config, name)!r} {remedy}")


def _each(c: Config) -> None:
    """Each field by itself."""
    for name, choices in CHOICES.items():
        said = f"must be one of {', '.join(map(repr, choices))}"
        _require(_value(c, name) in choices, c, name, said)
    for name, least in AT_LEAST.items():
        _require(_value(c, name) >= least, c, name, f"must be at least {least}")
    for name, (low, high) in WITHIN.items():
        bounds = f"greater than {low}" + (f" and at most {high}" if high < math.inf else "")
        _require(low < _value(c, name) <= high, c, name, f"must be {bounds}")
    for name, end in BELOW.items():
        said = f"must be at least 0 and less than {end if end < 2**32 else '2**32'}"
        _require(0 <= _value(c, name) < end, c, name, said)


def _optim(c: Config) -> None:
    o = c.optim
    _require(0 <= o.final_lr_ratio <= 1, c, "optim.final_lr_ratio", "must be from 0 to 1")
    _require(
        o.decay_steps == 0 or o.schedule == "constant",
        c,
        "optim.decay_steps",
        f"is of config.optim.schedule = 'constant', and it is {o.schedule!r}: set it to 0",
    )
    _require(
        o.schedule != "constant" or o.warmup_steps + o.decay_steps <= c.train.steps,
        c,
        "optim.decay_steps",
        f"and config.optim.warmup_steps = {o.warmup_steps} must fit into config.train.steps = "
        f"{c.train.steps}: lower one of them",
    )


def _model(c: Config) -> None:
    m, seq_len = c.model, c.data.seq_len
    _require(
        m.head_dim > 0 or m.hidden_size % m.num_heads == 0,
        c,
        "model.num_heads",
        f"must divide config.model.hidden_size = {m.hidden_size}",
    )
    _require(
        m.head_width % 2 == 0,
        c,
        "model.head_dim" if m.head_dim else "model.num_heads",
        f"makes heads {m.head_width} wide, and rotary positions need an even width",
    )
    _require(
        m.rope_high_freq_factor > m.rope_low_freq_factor,
        c,
        "model.rope_high_freq_factor",
        f"must be greater than config.model.rope_low_freq_factor = {m.rope_low_freq_factor}",
    )
    _require(
        m.num_heads % m.num_kv_heads == 0,
        c,
        "model.num_kv_heads",
        f"must divide config.model.num_heads = {m.num_heads}",
    )
    _require(
        m.num_layers % m.moe_every == 0,
        c,
        "model.moe_every",
        f"must divide config.model.num_layers = {m.num_layers}",
    )
    _require(
        seq_len % min(m.loss_chunk, seq_len) == 0,
        c,
        "model.loss_chunk",
        f"must divide config.data.seq_len = {seq_len}",
    )


def _moe(c: Config) -> None:
    e, seq_len = c.moe, c.data.seq_len
    _require(
        seq_len % e.group_size == 0 or e.group_size % seq_len == 0,
        c,
        "moe.group_size",
        f"must divide config.data.seq_len = {seq_len}, or be a multiple of it: a group is a part "
        "of a sequence, or several whole ones",
    )


def _train(c: Config) -> None:
    t = c.train
    _require(
        t.batch_size % t.accumulate == 0,
        c,
        "train.accumulate",
        f"must divide config.train.batch_size = {t.batch_size}",
    )
    _require(
        t.skip_above == 0 or t.on_nonfinite == "skip",
        c,
        "train.skip_above",
        f"is of config.train.on_nonfinite = 'skip', and it is {t.on_nonfinite!r}: set it to 0",
    )
    _require(
        t.skip_above == 0 or t.skip_above > 1,
        c,
        "train.skip_above",
        "must be 0 (off) or greater than 1: it is a multiple of the usual norm",
    )
    _require(
        "://" not in t.local_dir,
        c,
        "train.local_dir",
        "must be a folder on each host's own disk: a store that all hosts share is for --workdir",
    )


def _data(c: Config) -> None:
    sources = c.data.sources
    for name, source in sources.items():
        if source.weight < 0:
            field = f"config.data.sources.{name}.weight"
            raise ConfigError(f"{field} = {source.weight!r} must be at least 0")
    if not c.data.mixed:
        raise ConfigError(
            f"config.data.sources: the weights of {', '.join(sources)} are all 0: give one of "
            "them more"
        )


def _mesh(c: Config) -> None:
    for axis in ("data", "fsdp", "expert"):
        size = getattr(c.mesh, axis)
        remedy = "must be at least 1, or -1 for all devices that the other axes leave"
        _require(size >= 1 or size == -1, c, f"mesh.{axis}", remedy)
    _require(
        c.mesh.expert == -1 or c.moe.n_ffn % c.mesh.expert == 0,
        c,
        "mesh.expert",
        f"must divide the FFN experts, config.moe.n_ffn = {c.moe.n_ffn}",
    )
