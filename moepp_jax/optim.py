"""AdamW and its learning rate: by default warm-up and cosine, as the paper trains (section 3)."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax

from moepp_jax.config import Config


def schedule(config: Config) -> optax.Schedule:
    """Learning rate of a step: linear from initial_lr to lr, then by `optim.schedule`.

    "cosine" and "linear" fall to lr final_lr_ratio at the last step. "constant" stays at lr, and
    falls linearly to it in the last `optim.decay_steps` steps only (WSD): until then the number of
    steps has no part in it, so that one run is the beginning of runs of any length.
    """
    o, steps = config.optim, config.train.steps
    # A run shorter than its warm-up ends inside it.
    last, final = max(steps, o.warmup_steps + 1), o.lr * o.final_lr_ratio
    if o.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=o.initial_lr,
            peak_value=o.lr,
            warmup_steps=o.warmup_steps,
            decay_steps=last,
            end_value=final,
        )
    warm_up = optax.linear_schedule(o.initial_lr, o.lr, o.warmup_steps)
    if o.schedule == "linear":
        fall = optax.linear_schedule(o.lr, final, last - o.warmup_steps)
        return optax.join_schedules([warm_up, fall], [o.warmup_steps])
    fall = optax.linear_schedule(o.lr, final, o.decay_steps)  # of 0 steps it stays at lr
    stay = optax.constant_schedule(o.lr)
    return optax.join_schedules([warm_up, stay, fall], [o.warmup_steps, steps - o.decay_steps])


def make_optimizer(config: Config, described: Any) -> optax.GradientTransformation:
    """
    Args:
      described: the parameters' descriptions, which say what weight decay shrinks.
    """
    o = config.optim
    return optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        optax.adamw(
            schedule(config),
            b1=o.beta1,
            b2=o.beta2,
            eps=o.eps,
            weight_decay=o.weight_decay,
            mask=jax.tree.map(lambda p: p.decay, described),
        ),
    )


def at_its_start(opt_state: optax.OptState) -> optax.OptState:
    """The state with its learning rate at step 0 again; the moments stay.

    So does the number of gradients that they are means of: without it AdamW would take them for
    those of the first step, and divide the first moment by 1 - beta1.
    """

    def restarted(part):
        return jax.tree.map(lambda count: count * 0, part) if is_schedule(part) else part

    return jax.tree.map(restarted, opt_state, is_leaf=is_schedule)


def is_schedule(part: Any) -> bool:
    """Whether a part of the optimizer's state is what counts the steps of the learning rate."""
    return isinstance(part, optax.ScaleByScheduleState)


def change(before: Config, after: Config, step: int) -> str:
    """In words, what becomes of the learning rate when a run that is at a step gets more steps."""
    old, new = (float(schedule(config)(step)) for config in (before, after))
    o, steps = after.optim, after.train.steps
    warm = step >= o.warmup_steps
    if not math.isclose(old, new, rel_tol=1e-4):
        said, then = f"jumps from {old:.3g} to {new:.3g}", ", as"
    elif o.schedule == "constant" and warm:
        said, then = f"stays at {new:.3g}", ""
    else:
        said, then = f"is {new:.3g} as before", ";"
    if o.schedule == "constant":
        hold = f"{then} it is constant" if then else ""
        fall = f", then falls until {steps}" if o.decay_steps else ""
        then = f"{hold} until step {steps - o.decay_steps}{fall}"
    else:
        kind = {"cosine": "cosine", "linear": "linear decay"}[o.schedule]
        then = f"{then} the {kind} now ends at {steps}"
    return (
        f"config.train.steps grows from {before.train.steps} to {steps}: at step {step} the "
        f"learning rate {said}{then}"
    )
