"""How large what is measured is: as large as the paper's where memory allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from moepp_jax import mesh as mesh_lib
from moepp_jax.benchmarks.layer import Shape
from moepp_jax.chips import GIB, of_kind
from moepp_jax.compile import remedies
from moepp_jax.config import Config
from moepp_jax.configs import moepp_0p6b
from moepp_jax.errors import ConfigError

_SMALL = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.num_heads": 4,
    "model.num_kv_heads": 4,
    "model.vocab_size": 512,
    "model.dense_ffn_size": 128,
    "model.init_std": 0.2,  # large enough that routing differs from token to token
    "model.loss_chunk": 32,
    "moe.ffn_size": 128,
    "moe.group_size": 64,
    "data.seq_len": 64,
}


class Attention(NamedTuple):
    batch: int
    length: int
    heads: int
    width: int


class Sizes(NamedTuple):
    """
    Attributes:
      memory: bytes of a device, None on CPU.
      tokens: of a layer's batch.
      layer: of the layer's benchmark; its `tokens` as above.
      equal: the model that is compared with the CPU, float32.
      step: the model that is trained.
      dtype: of what is timed.
    """

    memory: int | None
    tokens: int
    layer: Shape
    attention: Attention
    equal: Config
    step: Config
    dtype: str


def memory_of(device: Any) -> int | None:
    """Bytes that programs have of a `jax.Device`, as JAX takes them or as published; None on CPU.

    Raises:
      ConfigError: neither is known.
    """
    if device.platform == "cpu":
        return None
    told = (device.memory_stats() or {}).get("bytes_limit")
    chip = of_kind(device.device_kind)
    if told is None and chip is None:
        raise ConfigError(f"{device.device_kind} does not say how much memory it has")
    return told or chip.hbm_bytes


def sizes(devices: Sequence[Any]) -> Sizes:
    """For these `jax.devices()`, which are alike."""
    memory = memory_of(devices[0])
    if memory is None:
        shape = Shape(256, 2, 32, 64, 8, (2, 1, 1))
        step = _config(len(devices), _SMALL | {"train.batch_size": len(devices)})
        return Sizes(None, 256, shape, Attention(1, 64, 2, 16), _equal(), step, "float32")
    # A token's rows at 16 experts and K = 2, forward and backward, take 200 kB in the 7B's layer.
    tokens = min(32_768, _power_of_two(memory / 4 / 200_000))
    shape = Shape(tokens, max(1, tokens // 2048), 768, 2048, 8, (2, 1, 1))
    attention = Attention(max(1, min(16, memory // (4 * GIB))), 2048, 12, 64)
    return Sizes(memory, tokens, shape, attention, _equal(), _step(devices, memory), "bfloat16")


def _equal() -> Config:
    return _config(1, _SMALL | {"model.dtype": "float32", "train.batch_size": 8})


def _step(devices: Sequence[Any], memory: int) -> Config:
    """The 0.6B model with as many sequences, and else as many layers, as are estimated to fit."""
    n = len(devices)
    for layers in (12, 6, 2):
        for rows in (32, 16, 8, 4, 2, 1):
            fields = {"model.remat": "exchanged", "model.num_layers": layers}
            config = _config(n, fields | {"train.batch_size": rows * n})
            if remedies.estimate(config, mesh_lib.mesh_shape(config, n)) < 0.6 * memory:
                return config
    raise ConfigError(f"{memory / GIB:.1f} GiB hold no training step of two layers")


def _config(num_devices: int, changes: dict[str, Any]) -> Config:
    """Of the 0.6B model; FFN experts over all devices where they divide, else replicas."""
    experts = num_devices if 8 % num_devices == 0 else 1
    fields = moepp_0p6b.get_config()
    mesh = {"mesh.data": -1, "mesh.fsdp": 1, "mesh.expert": experts}
    fields.update_from_flattened_dict(mesh | {"train.accumulate": 1} | changes)
    return Config.parse(fields)


def _power_of_two(size: float) -> int:
    return 1 << max(8, int(size).bit_length() - 1)
