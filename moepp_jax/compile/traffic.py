"""The least that the scheme of sharding and exchange moves between devices in a training step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from moepp_jax import flops
from moepp_jax.compile.hlo import Collective
from moepp_jax.config import Config


def collectives(config: Config, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """What each device does in a step, in the compute dtype.

    Of every part of the batch each parameter is gathered once forward and once backward, and its
    gradient reduce-scattered once; replicas add theirs up once a step; and the kept slots of every
    MoE layer are exchanged four times: to the experts and back, forward and backward. FFN experts
    are gathered over the fsdp axis, all else over the expert axis and then over fsdp.
    """
    m = config.model
    _, fsdp, expert = (mesh_shape[axis] for axis in ("data", "fsdp", "expert"))
    width = jnp.dtype(m.dtype).itemsize
    moe_layers = m.num_layers // m.moe_every
    ffn = flops.count(config, lambda path, p: p.expert is not None)
    rest = flops.count(config) - ffn
    shard = (ffn + rest) / (fsdp * expert)
    rows = config.batch_tokens / math.prod(mesh_shape.values())
    rows *= _rows_per_token(config)
    parts = config.train.accumulate
    operands = (
        ("all-gather", "expert", rest / fsdp / expert, 2 * parts),
        ("all-gather", "fsdp", rest / fsdp + ffn / expert / fsdp, 2 * parts),
        ("reduce-scatter", "fsdp", rest + ffn / expert, parts),
        ("reduce-scatter", "expert", rest / fsdp, parts),
        ("all-reduce", "data", shard, 1),
        ("all-to-all", "expert", rows * m.hidden_size, 4 * moe_layers),
    )
    return [
        Collective(
            kind=kind,
            name=f"least {kind}",
            computation="",
            operand_bytes=round(width * numbers),
            types=(m.dtype,),
            groups=_groups(mesh_shape, axis),
            times=times,
            asynchronous=False,
            scope="",
        )
        for kind, axis, numbers, times in operands
    ]


def least(config: Config, mesh_shape: Mapping[str, int]) -> dict[str, float]:
    """Bytes that each device sends in a step for `collectives`, by kind, by ring algorithms."""
    sent: dict[str, float] = {}
    for c in collectives(config, mesh_shape):
        sent[c.kind] = sent.get(c.kind, 0.0) + c.times * c.wire_bytes
    return sent


def _groups(mesh_shape: Mapping[str, int], axis: str) -> np.ndarray:
    places = np.arange(math.prod(mesh_shape.values())).reshape(tuple(mesh_shape.values()))
    return np.moveaxis(places, list(mesh_shape).index(axis), -1).reshape(-1, mesh_shape[axis])


def _rows_per_token(config: Config) -> float:
    """Rows that are exchanged for each token: slots under capacity, choices without."""
    if config.moe.dispatch != "capacity":
        return config.moe.rule.ffn_load
    return flops.executed_ffn_experts(config)
