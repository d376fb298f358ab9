"""What is compiled, once for each size, and what its runs take."""

from __future__ import annotations

import functools
import math
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moepp_jax import mesh as mesh_lib
from moepp_jax.generation import decode as device
from moepp_jax.generation.layers import Layers, Params, described, taken_apart


@dataclass
class Speed:
    """What was done, and the seconds that it took; compilation is in none of the other times.

    The first new token of each text is made with the prompt, and counts with it.

    Attributes:
      ffn_experts: that all decoded tokens chose; a mean over the MoE layers.
      experts_read: that any sequence chose, summed over steps; a mean over the MoE layers.
    """

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decoded_tokens: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    ffn_experts: float = 0.0
    experts_read: float = 0.0
    programs: int = 0
    compile_seconds: float = 0.0

    @property
    def ffn_experts_per_token(self) -> float:
        return self.ffn_experts / self.decoded_tokens if self.decoded_tokens else math.nan

    @property
    def experts_read_per_step(self) -> float:
        return self.experts_read / self.decode_steps if self.decode_steps else math.nan

    def __add__(self, other: Speed) -> Speed:
        return Speed(*map(operator.add, astuple(self), astuple(other)))

    def __str__(self) -> str:
        return (
            f"prompts {_rate(self.prompt_tokens, self.prefill_seconds)}, "
            f"new text {_rate(self.decoded_tokens, self.decode_seconds)}; "
            f"{f'{self.ffn_experts_per_token:.2f}' if self.decoded_tokens else 'no'} FFN experts a "
            "token; "
            f"{self.programs} programs compiled before, in {self.compile_seconds:.1f} s"
        )


def _rate(tokens: int, seconds: float) -> str:
    per_second = f"{tokens / seconds:,.1f}" if seconds else "-"
    return f"{per_second} tokens/s ({tokens:,} in {seconds:.2f} s)"


# How arguments lie on a mesh: as the parameters do, or cut along their first axis, the sequences.
_PARAMS = "as the parameters"
_ROWS = mesh_lib.BATCH


class Program(NamedTuple):
    """One of `decode`'s functions for one model.

    Attributes:
      takes, gives: how arguments and results lie on a mesh.
      uses_up: numbers of the arguments whose memory the results take.
    """

    function: Callable
    takes: tuple
    gives: Any
    uses_up: tuple[int, ...] = ()

    def lower(self, layers: Layers, mesh: Mesh | None, arguments: Sequence) -> jax.stages.Lowered:
        """Ready to be compiled for such arguments, which may be abstract."""
        function = self.function
        if mesh is not None:
            of_params = mesh_lib.specs(described(layers.model, layers.experts_apart))
            # No gradient is taken, so nothing hangs on what is known to be replicated.
            function = jax.shard_map(
                function,
                mesh=mesh,
                in_specs=tuple(of_params if s is _PARAMS else s for s in self.takes),
                out_specs=self.gives,
                check_vma=False,
            )
        return jax.jit(function, donate_argnums=self.uses_up).lower(*arguments)


def prefill(layers: Layers, places: int) -> Program:
    """(params, tokens_BL, rows, ends, rules) -> state"""
    function = functools.partial(device.prefill, layers, places)
    return Program(function, (_PARAMS, _ROWS, _ROWS, P(), P()), state_specs())


def decode(layers: Layers) -> Program:
    """(params, state, rows, ends, rules, count) -> state, tokens"""
    function = functools.partial(device.decode, layers)
    takes = (_PARAMS, state_specs(), _ROWS, P(), P(), P())
    return Program(function, takes, (state_specs(), _ROWS), uses_up=(1,))


GROW = Program(device.grow, (_ROWS,), _ROWS)


class Programs:
    """`decode`'s functions for one model's parameters, compiled when a size is first met.

    Attributes:
      compiled: by name and sizes.
      speed: of the runs since it was last set; times are added where the work is done.
    """

    def __init__(self, layers: Layers, params: Params, mesh: Mesh | None, use_up: bool):
        self._layers = layers
        self._mesh = mesh
        self._params = params
        self._use_up = use_up
        self.compiled: dict[tuple, Callable] = {}
        self.speed = Speed()

    @property
    def moe_layers(self) -> int:
        return self._layers.model.num_blocks

    @property
    def devices(self) -> int:
        return 1 if self._mesh is None else self._mesh.size

    def prefill(self, places: int, tokens_BL, rows, ends, rules) -> device.State:
        """Adds the time, and no tokens, to the speed."""
        arguments = (self._own_params(), tokens_BL, rows, ends, rules)
        name = ("prefill", tokens_BL.shape, places, len(ends), *rules)
        state, seconds = self._run(name, prefill(self._layers, places), arguments)
        self.speed.prefill_seconds += seconds
        return state

    def decode(self, state: device.State, rows, ends, rules, count: int):
        """Adds the time, and no tokens, to the speed. The state that goes in is used up."""
        arguments = (self._own_params(), state, rows, ends, rules, np.int32(count))
        name = ("decode", state.caches[0].keys.shape, len(ends), *rules)
        (state, made), seconds = self._run(name, decode(self._layers), arguments)
        self.speed.decode_seconds += seconds
        return state, np.asarray(made), seconds

    def grow(self, state: device.State) -> device.State:
        name = ("grow", state.caches[0].keys.shape)
        caches, seconds = self._run(name, GROW, (state.caches,))
        self.speed.decode_seconds += seconds
        return state._replace(caches=caches)

    def _run(self, name: tuple, program: Program, arguments: Sequence) -> tuple[Any, float]:
        if name not in self.compiled:
            start = time.perf_counter()
            lowered = program.lower(self._layers, self._mesh, arguments)
            self.compiled[name] = lowered.compile()
            self.speed.programs += 1
            self.speed.compile_seconds += time.perf_counter() - start
        start = time.perf_counter()
        made = jax.block_until_ready(self.compiled[name](*arguments))
        return made, time.perf_counter() - start

    def _own_params(self) -> Params:
        """The parameters as `Layers` wants them, made at the first use."""
        if not isinstance(self._params["layers"], list):
            start = time.perf_counter()
            layers = self._layers
            self._params = taken_apart(
                self._params, layers.model, layers.experts_apart, self._mesh, self._use_up
            )
            self.speed.compile_seconds += time.perf_counter() - start
        return self._params


def state_specs() -> device.State:
    """How a state lies on a mesh."""
    everywhere = P()
    return device.State(
        caches=_ROWS,
        token=_ROWS,
        place=everywhere,
        step=everywhere,
        open=_ROWS,
        ffn_experts=_ROWS,
        experts_read=everywhere,
        seen=_ROWS,
    )
