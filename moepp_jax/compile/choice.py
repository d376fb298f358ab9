"""Which `model.remat` a step should have: the one predicted to be fastest of those that fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moepp_jax.compile.remedies import REMAT
from moepp_jax.config import Config


def of_remat(
    config: Config, report: Mapping[str, Any], examined: Callable[[Config], Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each policy, from the one that computes least again to the one that keeps least.

    Args:
      report: what is known of the configuration itself, which is not examined once more.
      examined: as `step.examine`, with the predicted time.

    Returns:
      remat, hbm_bytes, fits and, where the program could be made, predicted_ms and mfu_nominal.
    """
    rows = []
    for policy in REMAT:
        own = policy == config.model.remat
        found = report if own else examined(config.replace("model", remat=policy))
        known = {name: found[name] for name in _COLUMNS if name in found}
        rows.append({"remat": policy} | known)
    return rows


# Of a chip's memory. A step that needs more may fit only as the compiler squeezes it, so that it is
# slower than one that keeps less.
_ROOMY = 0.9

_COLUMNS = ("hbm_bytes", "fits", "predicted_ms", "mfu_nominal")


def fastest(
    config: Config,
    examined: Callable[[Config], Mapping[str, Any]],
    policies: Sequence[str],
) -> tuple[Config, Mapping[str, Any]]:
    """The configuration with the fastest of these policies that fits, and what is known of it.

    They are tried until one leaves room: those after it compute more again. If none fits it is the
    last one.

    Args:
      examined: as in `of_remat`.
      policies: from the one that keeps most to the one that keeps least.
    """
    chosen = None
    for policy in policies:
        changed = config.replace("model", remat=policy)
        found = examined(changed)
        if not found["fits"]:
            continue
        if chosen is None or found["predicted_ms"][0] < chosen[1]["predicted_ms"][0]:
            chosen = changed, found
        if found["hbm_bytes"] <= _ROOMY * found["hbm_limit_bytes"]:
            break
    return chosen or (changed, found)


def best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The fastest that fits, with links at their peak; None if none does."""
    fitting = [row for row in rows if row["fits"] and "predicted_ms" in row]
    return min(fitting, key=lambda row: row["predicted_ms"][0], default=None)
