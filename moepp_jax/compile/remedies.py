"""What to change in a configuration whose training step does not fit into a chip's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from moepp_jax import flops
from moepp_jax import mesh as mesh_lib
from moepp_jax.config import Config
from moepp_jax.errors import ConfigError
from moepp_jax.limits import CHOICES

_TRIES = 3
REMAT = CHOICES["model.remat"]


def find(
    config: Config, num_devices: int, limit: int, needed: Callable[[Config], int]
) -> dict | None:
    """The first change that was found to fit, or None.

    Changes are tried from the one that costs least time to the one that costs most, those first
    skipped that are estimated not to fit.

    Args:
      limit: bytes of a chip.
      needed: compiles a configuration and says how many bytes a chip needs for it.
    """
    tried = []
    for changed in _changes(config, num_devices):
        guess = estimate(changed, mesh_lib.mesh_shape(changed, num_devices))
        if guess > limit or (tried and guess > 0.8 * tried[-1]):
            continue
        try:
            bytes_ = needed(changed)
        except ConfigError:  # its data axis no longer divides over the slices
            continue
        if bytes_ <= limit:
            return {"flags": flags(config, changed), "hbm_bytes": bytes_}
        tried.append(guess)
        if len(tried) == _TRIES:
            break
    return None


def flags(config: Config, changed: Config) -> list[str]:
    """The flags that turn one configuration into the other."""
    names = (
        ("mesh", ("data", "fsdp", "expert")),
        ("model", ("remat",)),
        ("train", ("accumulate",)),
    )
    return [
        f"--config.{group}.{name}={getattr(getattr(changed, group), name)}"
        for group, fields in names
        for name in fields
        if getattr(getattr(changed, group), name) != getattr(getattr(config, group), name)
    ]


def _changes(config: Config, num_devices: int) -> Iterator[Config]:
    """Valid configurations: of growing accumulation, in growing remat, in growing fsdp."""
    _, fsdp, expert = mesh_lib.mesh_shape(config, num_devices)
    for size in range(fsdp, num_devices // expert + 1):
        if num_devices % (size * expert):
            continue
        meshed = config
        if size != fsdp:
            meshed = config.replace("mesh", data=num_devices // (size * expert), fsdp=size)
        for remat in REMAT[REMAT.index(config.model.remat) :]:
            parts = config.train.accumulate
            while (config.train.batch_size // parts) % num_devices == 0:
                try:
                    changed = meshed.replace("model", remat=remat)
                    changed = changed.replace("train", accumulate=parts)
                    mesh_lib.mesh_shape(changed, num_devices)
                except ConfigError:
                    break
                if changed != config:
                    yield changed
                parts *= 2


def estimate(config: Config, sizes: tuple[int, int, int]) -> float:
    """Roughly the bytes that a chip needs, to know what is worth compiling."""
    m, e = config.model, config.moe
    data, fsdp, expert = sizes
    total = flops.count(config)
    ffn = flops.count(config, lambda path, p: p.expert is not None)
    gradients = 1 if config.train.accumulate == 1 else 2
    held = 4 * (3 + gradients) * total / (fsdp * expert)  # parameters and two moments, float32
    layer = 2 * 2 * (ffn / expert + total - ffn) / m.num_layers  # two layers gathered, 2 bytes each
    rows = config.train.batch_size / config.train.accumulate / (data * fsdp * expert)
    tokens = rows * config.data.seq_len
    inside = tokens * (16 * m.hidden_size + 8 * config.data.seq_len * m.num_heads)
    inside += tokens * 2 * sum(e.rule.load) * 4 * e.ffn_size
    carried = 2 * m.hidden_size * tokens
    exchanged = carried * (1 + 2 * e.gamma * sum(e.rule.load))
    kept = {"full": carried, "exchanged": exchanged, "dots": 2 * exchanged, "none": inside}
    kept |= {"routing": exchanged, "attention": exchanged + carried}
    w_in = exchanged + carried + tokens * 4 * e.gamma * sum(e.rule.load) * e.ffn_size
    heads = 2 * tokens * (m.num_heads + 2 * m.num_kv_heads) * m.head_width
    kept |= {"w_in": w_in, "residual": w_in + carried, "qkv": w_in + carried + heads}
    logits = 8 * rows * m.loss_chunk * m.vocab_size
    return held + layer + m.num_layers * kept[m.remat] + inside + logits
