"""AdamW with warm-up and cosine, as the paper trains (section 3 and appendix)."""

from __future__ import annotations

from typing import Any

import jax
import optax

from moepp_jax.config import Config


def schedule(config: Config) -> optax.Schedule:
    """Learning rate of a step: linear from initial_lr to lr, then cosine to lr final_lr_ratio."""
    o = config.optim
    return optax.warmup_cosine_decay_schedule(
        init_value=o.initial_lr,
        peak_value=o.lr,
        warmup_steps=o.warmup_steps,
        # A run shorter than its warm-up ends inside it.
        decay_steps=max(config.train.steps, o.warmup_steps + 1),
        end_value=o.lr * o.final_lr_ratio,
    )


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
