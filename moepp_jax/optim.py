"""AdamW with warm-up and cosine, as the paper trains (section 3 and appendix)."""

from __future__ import annotations

import re

import jax
import optax

from moepp_jax.config import Config
from moepp_jax.mesh import path_of

# Norm scales; the constant experts' vectors, which are values rather than weights; and biases,
# which a rule of their own moves.
_NOT_DECAYED = re.compile(r"norm$|const/v$|router/bias$")


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


def decayed(params):
    """True for the parameters that weight decay shrinks: every matrix."""

    def is_matrix(key_path, _):
        return not _NOT_DECAYED.search(path_of(key_path))

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    o = config.optim
    return optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        optax.adamw(
            schedule(config),
            b1=o.beta1,
            b2=o.beta2,
            eps=o.eps,
            weight_decay=o.weight_decay,
            mask=decayed,
        ),
    )
