"""Prompts of any length as arrays of a few sizes, and how far to go in one call."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from moepp_jax.generation import decode as device
from moepp_jax.generation import sampling
from moepp_jax.generation.programs import Programs

# A call lasts about so long: text comes smoothly, and what the host does between is little.
_SECONDS = 0.05


class Batch:
    """Sequences that are continued together; each of its calls makes some tokens of all of them."""

    def __init__(
        self,
        programs: Programs,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        samples: Sequence[int],
        ends: Collection[int],
        seed: int,
        rules: sampling.Rules,
    ):
        self._programs = programs
        self._prompts = prompts
        self._rules = rules
        room = max(4, _power_of_two(len(ends)))  # -1 is no token
        self._ends = np.array([*ends, *[-1] * (room - len(ends))], np.int32)
        # More rows than prompts: they do what the last one does, so that they choose its experts.
        rows = _multiple(_power_of_two(len(prompts)), programs.devices)
        more = rows - len(prompts)
        self._width = max(16, _power_of_two(max(map(len, prompts))))
        self._tokens = np.zeros((rows, self._width), np.int32)
        for row, prompt in zip(self._tokens, [*prompts, *[prompts[-1]] * more], strict=True):
            row[self._width - len(prompt) :] = prompt

        def filled(values, dtype=np.int32):
            return np.array([*values, *[values[-1]] * more], dtype)

        self._rows = device.Rows(
            first=filled([self._width - len(prompt) for prompt in prompts]),
            limit=filled(limits),
            seed=np.full(rows, seed % 2**32, np.uint32),
            prompt=filled([sampling.number_of(prompt) for prompt in prompts], np.uint32),
            sample=filled(samples),
        )
        self._count = 1
        self._open: set[int] = set(range(len(prompts)))

    def start(self, least_places: int) -> np.ndarray:
        """The first new token of each prompt, (B, 1)."""
        p = self._programs
        p.speed.prompt_tokens += sum(map(len, self._prompts))
        places = max(least_places, _power_of_two(self._width + 1))
        self._state = p.prefill(places, self._tokens, self._rows, self._ends, self._rules)
        self._place, self._places = self._width, places
        return np.asarray(self._state.token)[:, None]

    def go_on(self, left: dict[int, int]) -> np.ndarray:
        """The next tokens, (B, n); -1 where a sequence has ended.

        Args:
          left: the prompts to go on with, and how many tokens each may still have.
        """
        p = self._programs
        if self._place == self._places:
            self._state, self._places = p.grow(self._state), 2 * self._places
        if left.keys() != self._open:
            open_rows = np.zeros(len(self._tokens), bool)
            open_rows[list(left)] = True
            self._state = self._state._replace(open=open_rows)
            self._open = set(left)
        count = min(self._count, max(left.values()), self._places - self._place)
        self._state, made, seconds = p.decode(
            self._state, self._rows, self._ends, self._rules, count
        )
        made = made[: len(self._prompts), :count]
        self._note(made)
        self._place += count
        self._count = int(np.clip(_SECONDS * count / seconds, 1, device.CHUNK))
        return made

    def _note(self, made: np.ndarray) -> None:
        speed, state = self._programs.speed, self._state
        speed.decoded_tokens += int((made >= 0).sum())
        speed.decode_steps += int((made >= 0).any(axis=0).sum())
        layers = self._programs.moe_layers
        own = np.asarray(state.ffn_experts)[: len(made)]
        speed.ffn_experts = float(own.sum()) / layers
        speed.experts_read = float(state.experts_read) / layers


def _power_of_two(n: int) -> int:
    """The least that is at least n."""
    return 1 << (n - 1).bit_length() if n else 0


def _multiple(n: int, of: int) -> int:
    return -(-n // of) * of
