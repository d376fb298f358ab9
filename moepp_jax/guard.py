"""Gradients that cannot be right: what a step remembers of them, and which updates are left out.

A gradient is sound if it and the loss are finite and, where `config.train.skip_above` asks for it,
if its norm is no such multiple of what the norms were. With `config.train.on_nonfinite = "stop"`
every update is made, and a run ends where numbers are seen that are not finite; with "skip" the
update of an unsound gradient is left out: parameters, moments and the rule's state stay, and the
learning rate goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moepp_jax import optim
from moepp_jax.config import TrainConfig
from moepp_jax.metrics import DivergedError, require_finite

# Sound gradients whose norms are averaged before one is said to be too large; then their mean is
# of about so many.
_MEAN_OF = 100

Sound = Callable[["Guard", Float[Array, ""], Float[Array, ""]], Bool[Array, ""]]


@flax.struct.dataclass
class Guard:
    """What is remembered of a run's gradients: numbers, alike on all devices, saved with the state.

    Attributes:
      norm: running mean of the norms of sound ones.
      sound: how many that were.
      unsound: how many the others were.
      in_a_row: unsound ones since the last sound one.
      longest: the largest that `in_a_row` has been.
      first: step of the first of the newest unsound ones in a row, counted as in the metrics; -1 if
        there was none.
      forward: MoE layer, from 0, whose router is the first to see numbers that are not finite in
        that step; -1: none does.
      backward: block, from 0, of the last gradient that is not finite there, which is the first to
        be computed; -1: none is.
    """

    norm: Any
    sound: Any
    unsound: Any
    in_a_row: Any
    longest: Any
    first: Any
    forward: Any
    backward: Any

    @classmethod
    def fresh(cls) -> Guard:
        counts = {name: jnp.int32(0) for name in ("sound", "unsound", "in_a_row", "longest")}
        places = {name: jnp.int32(-1) for name in ("first", "forward", "backward")}
        return cls(norm=jnp.float32(0), **counts, **places)

    def after(
        self,
        step: Int[Array, ""],
        sound: Bool[Array, ""],
        norm: Float[Array, ""],
        forward: Int[Array, ""],
        backward: Int[Array, ""],
    ) -> Guard:
        """With one more gradient, of this step as the metrics count it."""
        opens = ~sound & (self.in_a_row == 0)
        in_a_row = jnp.where(sound, 0, self.in_a_row + 1)
        count = self.sound + sound
        moved = self.norm + (norm - self.norm) / jnp.clip(count, 1, _MEAN_OF)
        return Guard(
            norm=jnp.where(sound, moved, self.norm),
            sound=count,
            unsound=self.unsound + ~sound,
            in_a_row=in_a_row,
            longest=jnp.maximum(self.longest, in_a_row),
            first=jnp.where(opens, step, self.first),
            forward=jnp.where(opens, forward, self.forward),
            backward=jnp.where(opens, backward, self.backward),
        )


def soundness(train: TrainConfig) -> Sound:
    """(guard, loss, norm of the gradient) -> whether the gradient is sound."""

    def finite(guard, loss, norm):
        return jnp.isfinite(loss) & jnp.isfinite(norm)

    def small(guard, loss, norm):
        limit = jnp.where(guard.sound < _MEAN_OF, jnp.inf, train.skip_above * guard.norm)
        return finite(guard, loss, norm) & (norm <= limit)

    return small if train.skip_above else finite


def choice(train: TrainConfig) -> Callable[[Bool[Array, ""], Any, Any], Any]:
    """(sound, state after the update, state before) -> the state with which training goes on."""

    def made(sound, after, before):
        return after

    def made_if_sound(sound, after, before):
        def chosen(after, before):
            if optim.is_schedule(after):
                return after  # steps are counted, whatever comes of them
            return jax.tree.map(lambda a, b: jnp.where(sound, a, b), after, before)

        return jax.tree.map(chosen, after, before, is_leaf=optim.is_schedule)

    return made_if_sound if train.on_nonfinite == "skip" else made


def norm_by_block(grads: dict[str, Any]) -> Float[Array, " blocks"]:
    """Of the gradient of each block's parameters."""
    squares = [jnp.sum(jnp.square(g), range(1, g.ndim)) for g in jax.tree.leaves(grads["layers"])]
    return jnp.sqrt(sum(squares))


def first_lost(values: Float[Array, " n"]) -> Int[Array, ""]:
    """The first that is not finite; -1: all are."""
    lost = ~jnp.isfinite(values)
    return jnp.where(lost.any(), lost.argmax(), -1)


def last_lost(values: Float[Array, " n"]) -> Int[Array, ""]:
    """The last that is not finite; -1: all are."""
    lost = ~jnp.isfinite(values)
    return jnp.where(lost.any(), len(values) - 1 - lost[::-1].argmax(), -1)


def require_sound(train: TrainConfig, step: int, values: Mapping[str, Any], guard: Guard) -> None:
    """
    Args:
      step: of the row of metrics that these values are.

    Raises:
      DivergedError: they are not finite; or, if such updates are left out,
        `config.train.max_skipped` of them were it in a row.
    """
    if train.on_nonfinite == "skip":
        if guard.longest >= train.max_skipped:
            raise DivergedError(
                f"step {step}: {guard.longest} updates in a row were left out, and "
                f"config.train.max_skipped = {train.max_skipped}; the newest: {place(guard)}",
                int(guard.first),
            )
        return
    try:
        require_finite(step, values)
    except DivergedError as error:
        if guard.first < 0:
            raise
        raise DivergedError(f"{error} ({place(guard)})", int(guard.first)) from None


def place(guard: Guard) -> str:
    """In words, where the newest unsound gradients began."""
    if guard.forward >= 0:
        where = f"the router of MoE layer {guard.forward + 1} is the first to see such numbers"
    elif guard.backward >= 0:
        where = f"forward all routers see finite numbers, backward block {guard.backward + 1} is "
        where += "the first with a gradient that is not finite"
    else:
        where = "no layer has numbers that are not finite"
    return f"first at step {guard.first}, where {where}"
