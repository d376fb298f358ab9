"""What is found of a training step before and after it is compiled, as plain values for JSON."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from moepp_jax import flops, state
from moepp_jax.chips import Chip
from moepp_jax.compile import by_part, hlo, traffic
from moepp_jax.compile.gpu import PREALLOCATED
from moepp_jax.compile.roofline import Interconnect
from moepp_jax.compile.switched import Switched
from moepp_jax.compile.topology import Topology
from moepp_jax.config import Config


def described(config: Config, mesh: Mesh, topology: Topology) -> dict[str, Any]:
    """What is known before compiling."""
    total, active = flops.parameters(config)
    tokens = config.batch_tokens
    held = state.assemble(config, mesh).abstract
    return {
        "topology": topology.text,
        "chip": topology.chip and topology.chip.kinds[0],
        "peak_source": topology.chip and topology.chip.source,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "remat": config.model.remat,
        "accumulate": config.train.accumulate,
        "dispatch": config.moe.dispatch,
        "parameters": total,
        "active_parameters": active,
        "tokens_per_step": tokens,
        "parameter_bytes": bytes_of(held.params),
        "optimizer_bytes": bytes_of(held.opt_state),
        "state_bytes": bytes_of(held),
        "hbm_limit_bytes": topology.chip and topology.chip.hbm_bytes,
        "preallocated_bytes": topology.card and int(PREALLOCATED * topology.chip.hbm_bytes),
        "model_flops": flops.per_token(config).train * tokens / mesh.size,
    }


def bytes_of(tree: Any) -> int:
    """Of one device's shards."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def memory(analysis: Any, platform: str) -> dict[str, int]:
    """What a device needs.

    On a chip that is the most there is at one time: temporary arrays take each other's places. The
    gaps that the compiler's plan leaves between them come on top (3 % where we looked); what does
    not fit with them it refuses itself. Of CPUs it tells no such number: there they are added up.

    Args:
      analysis: `compiled.memory_analysis()`.
      platform: of the devices.
    """
    m = analysis
    kept = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    peak = kept + m.temp_size_in_bytes if platform == "cpu" else m.peak_memory_in_bytes
    return {
        "argument_bytes": m.argument_size_in_bytes,
        "temporary_bytes": max(peak - kept, 0),
        "code_bytes": m.generated_code_size_in_bytes,
        "hbm_bytes": peak + m.generated_code_size_in_bytes,
    }


def work(config: Config, mesh: Mesh, topology: Topology, module: hlo.Module) -> dict[str, Any]:
    """Operations, bytes, collectives of a device and step, and what follows for its time."""
    found = hlo.collectives(module)
    network = _network(mesh, topology)
    least = traffic.least(config, mesh.shape)
    sent = sum((c.times * c.wire_bytes for c in found), 0.0)
    report = {
        "flops": hlo.product_flops(module),
        "kernels": kernels(module, topology),
        "loops_counted_once": hlo.unknown_loops(module),
        "hbm_traffic_bytes": hlo.memory_bytes(module),
        "collectives": _by_kind(found, mesh.shape, network),
        "exchanges": _exchanges(module),
        "wire_bytes": sent,
        "least_wire_bytes": least,
        "wire_ratio": sent / total if (total := sum(least.values())) else None,
    }
    if network is None:
        return report
    chip = topology.chip
    if isinstance(network, Switched):
        report["roofline"] = by_part.roofline(module, chip, network)
    bounds = {
        "arithmetic": arithmetic(report, chip),
        "hbm": report["hbm_traffic_bytes"] / chip.hbm_bandwidth,
        "interconnect": network.bound(found),
    }
    return report | {"bounds": bounds} | best_case(config, mesh.size, chip.flops, bounds)


def load(config: Config, mesh: Mesh) -> hlo.Load:
    """Of a device's FFN experts at a time, at balance (`Rule.load`)."""
    tokens = config.batch_tokens / config.train.accumulate / mesh.size
    rows = tokens / config.moe.exchange_parts * config.moe.rule.ffn_load
    return hlo.Load(rows, config.moe.n_ffn // mesh.shape["expert"])


def _network(mesh: Mesh, topology: Topology) -> Interconnect | Switched | None:
    if topology.chip is None:
        return None
    kind = Switched if topology.card else Interconnect
    return kind(list(mesh.devices.flat), topology.chip)


def kernels(module: hlo.Module, topology: Topology) -> list[dict[str, Any]]:
    """Of GPUs, where products are kernels of libraries; those elsewhere are the compiler's own."""
    if topology.card is None:
        return []
    rows = [dataclasses.asdict(row) for row in hlo.kernels(module)]
    return [row | {"seconds": _seconds(row, topology.chip)} for row in rows]


def _seconds(row: Mapping[str, Any], chip: Chip) -> float | None:
    """At the peak of the row's arithmetic."""
    return row["flops"] and row["flops"] / chip.peak(row["arithmetic"])


def arithmetic(report: Mapping[str, Any], chip: Chip) -> float:
    if not report["kernels"]:
        return report["flops"] / chip.flops
    return sum(row["seconds"] or 0.0 for row in report["kernels"])


def best_case(
    config: Config, num_devices: int, peak: float, bounds: Mapping[str, float]
) -> dict[str, float]:
    """The bounds' consequence: no step is faster than the slowest of them."""
    tokens = config.batch_tokens
    seconds = max(bounds.values())
    model = flops.per_token(config).train * tokens
    return {
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": model / (seconds * peak * num_devices),
    }


def _by_kind(
    found: Sequence[hlo.Collective],
    shape: Mapping[str, int],
    network: Interconnect | Switched | None,
) -> list[dict[str, Any]]:
    """Rows of equal kind, axes and type, the heaviest first; count and bytes of a step."""
    groups = defaultdict(list)
    for c in found:
        if c.group_size > 1:
            groups[c.kind, c.axes(shape), c.types].append(c)
    rows = [
        {
            "kind": kind,
            "axes": list(axes),
            "types": list(types),
            "count": sum(c.times for c in group),
            "bytes": sum(c.times * c.wire_bytes for c in group),
            "largest_operand": max(c.operand_bytes for c in group),
            "asynchronous": sum(c.times for c in group if c.asynchronous),
            "seconds": network and network.bound(group),
        }
        for (kind, axes, types), group in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def _exchanges(module: hlo.Module) -> list[dict[str, Any]]:
    """Of each asynchronous exchange of tokens what is scheduled between its start and its end."""
    times = hlo.executions(module)
    return [
        {
            "scope": start.scope,
            "backward": "transpose(" in start.scope,
            "count": times[computation],
            "instructions": len(between),
            "zero_computation": sum(
                any("zero_computation" in scope for scope in hlo.scopes(module, instruction))
                for instruction in between
            ),
            "flops": sum(hlo.flops_of(module, computation, i) for i in between),
        }
        for kind in ("all-to-all", "ragged-all-to-all")
        for computation, start, between in hlo.overlapped(module, kind)
        if computation in times
    ]
