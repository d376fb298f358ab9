"""What is found of a model beside the record's rows, on a sample of the same text.

switched_off  held-out loss with all zero, copy or constant experts masked, one kind at a time:
              tokens then choose the next best, where their rule gives them so many
saturation    share of its experts that a token had chosen already at earlier checkpoints
              (router saturation: OLMoE, arXiv 2409.02060, section 5.1)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from moepp_jax.analysis.record import KINDS
from moepp_jax.data.packing import Batch
from moepp_jax.moe import Rule
from moepp_jax.moe.router import Router
from moepp_jax.observe import routed, texts

# Less than any logit, and no infinity: differences of two stay numbers.
_NEVER = -1e9


def masked(rule: Router, experts: range) -> Router:
    """The rule with some experts that no token chooses while there are others."""
    kind = type(rule)
    off = np.isin(np.arange(rule.pool.size), experts)

    class Masked(kind):
        def scored(self, logits):
            return jnp.where(off, _NEVER, super().scored(logits))

        def route(self, x_GSD, previous_GSN, params):
            if "bias" in params:  # some rules choose by scores with a bias on them
                params = {**params, "bias": jnp.where(off, _NEVER, params["bias"])}
            return super().route(x_GSD, previous_GSN, params)

    fields = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
    return Masked(**fields)


def kinds_to_mask(rule: Rule) -> dict[str, range]:
    """Each kind of zero-computation expert there is -> its experts, if the rule has logits."""
    ends = np.cumsum(rule.pool).tolist()
    each = {k: range(*pair) for k, *pair in zip(KINDS[1:], ends, ends[1:], strict=False)}
    return {kind: of for kind, of in each.items() if of and isinstance(rule, Router)}


def switched_off(
    make: Callable[[Rule], routed.Run],
    rule: Router,
    kinds: Mapping[str, range],
    batches: Sequence[Batch],
    done: Callable[[int], Any],
) -> dict[str, Any]:
    """Loss in nats a token, and FFN experts a token, with each kind there is masked.

    Args:
      make: rule -> what runs the model with that rule.
      kinds: see `kinds_to_mask`.

    Returns:
      {"tokens": targets, "none": {"loss", "ffn_experts"}, and the same of "constant", ...}.
    """
    rules: dict[str, Rule] = {"none": rule}
    rules |= {kind: masked(rule, experts) for kind, experts in kinds.items()}
    found: dict[str, Any] = {}
    for kind, one in rules.items():
        run, nats, targets, ffn, tokens = make(one), 0.0, 0.0, 0.0, 0
        for batch in batches:
            seen, real = run(batch), batch["segments"] > 0
            nats += float(np.sum(seen.nll * batch["loss_mask"], dtype=np.float64))
            targets += float(np.sum(batch["loss_mask"]))
            served = (seen.experts < rule.pool.n_ffn) & seen.kept
            ffn += float(np.sum(served[:, real])) / len(served)
            tokens += int(np.sum(real))
            done(1)
        found["tokens"] = int(targets)
        found[kind] = {"loss": nats / targets, "ffn_experts": ffn / tokens}
    return found


def saturation(
    chosen: Callable[[int], list[np.ndarray]],
    steps: Sequence[int],
    num_experts: int,
) -> dict[str, Any]:
    """Overlap of every checkpoint's choices with those of the last.

    Args:
      chosen: step -> by layer the experts [J T K] of the sample's tokens.
      steps: ascending; the last is compared with.

    Returns:
      {"steps", "overlap": by step and layer, "tokens"}.
    """
    last = _sets(chosen(steps[-1]), num_experts)
    overlap = []
    for step in steps[:-1]:
        there = _sets(chosen(step), num_experts)
        both = np.sum(there & last, axis=(1, 2)) / np.maximum(np.sum(last, axis=(1, 2)), 1)
        overlap.append(both.tolist())
    overlap.append([1.0] * last.shape[0])
    return {"steps": list(steps), "overlap": overlap, "tokens": int(last.shape[1])}


def _sets(parts: list[np.ndarray], num_experts: int) -> np.ndarray:
    """[J T N]: whether a token chose an expert."""
    experts = np.concatenate(parts, axis=1)
    return np.stack([np.any(experts == n, axis=-1) for n in range(num_experts)], axis=-1)


def sample(parts: Sequence[texts.Part], tokens: int, batch_size: int) -> list[Batch]:
    """Batches of the first tokens of every part."""
    each = max(1, tokens // max(len(parts), 1))
    return [b for part in parts for b in routed.batches_of(part, each, batch_size)]
