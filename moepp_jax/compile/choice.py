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


_COLUMNS = ("hbm_bytes", "fits", "predicted_ms", "mfu_nominal")


def best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The fastest that fits, with links at their peak; None if none does."""
    fitting = [row for row in rows if row["fits"] and "predicted_ms" in row]
    return min(fitting, key=lambda row: row["predicted_ms"][0], default=None)
