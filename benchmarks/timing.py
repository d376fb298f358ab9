"""Times taken so that they can be compared: interleaved in one process, summed up by medians."""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from rich.progress import track

Name = TypeVar("Name", bound=Hashable)


class Seconds(NamedTuple):
    """Median and quartiles of what a function took."""

    median: float
    low: float
    high: float


class Case(NamedTuple):
    """A function that JAX has compiled, and its arguments, on the device."""

    function: Callable
    arguments: tuple[Any, ...]


def interleaved(
    cases: Mapping[Name, Case], rounds: int, label: str = "timing"
) -> dict[Name, Seconds]:
    """Runs every case once a round, so that what disturbs the machine disturbs all alike.

    Each round has an order of its own: what a case leaves in caches falls to no one in particular.

    Compilation and a first run of each case come before.
    """
    for case in cases.values():
        jax.block_until_ready(case.function(*case.arguments))
    order = random.Random(0)
    taken: dict[Name, list[float]] = {name: [] for name in cases}
    for _ in track(range(rounds), label, transient=True):
        for name in order.sample(list(cases), len(cases)):
            case = cases[name]
            start = time.perf_counter()
            jax.block_until_ready(case.function(*case.arguments))
            taken[name].append(time.perf_counter() - start)
    return {name: summary(times) for name, times in taken.items()}


def summary(times: list[float]) -> Seconds:
    """Of one case's times."""
    if len(times) < 2:
        return Seconds(times[0], times[0], times[0])
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Seconds(median, low, high)


def machine() -> str:
    """The device that JAX computes on, in words."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        name = next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), name)
    return f"CPU {name}, {_cores()}, jax {jax.__version__}"


def _cores() -> str:
    """Those this process may use, which `taskset` and containers make fewer."""
    there = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    return f"{there} cores" if usable == there else f"{usable} of {there} cores"
