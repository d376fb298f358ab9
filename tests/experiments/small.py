"""An experiment in small: a scale of the tests' model, and rows made up for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moepp_jax.configs import base
from moepp_jax.experiments import runs, study
from moepp_jax.experiments.results import DONE, Row
from moepp_jax.experiments.scale import VANILLA, Scale, Variant
from moepp_jax.experiments.study import Results, Study, Verdict
from tests import tiny

MACHINE = "CPU, 2 cores, jax 0"


def scale(data: Path | str = "data", **changes: Any) -> Scale:
    """A scale whose recipe is the tests' model.

    Args:
      data: where its prepared text is kept.
      changes: of fields, with dots.
    """

    def recipe():
        fields = base.get_config()
        own = {
            "data.dir": str(data),
            "train.steps": 4,
            "train.eval_every": 4,
            "train.save_every": 2,
        }
        fields.update_from_flattened_dict(tiny.CHANGES | own | changes)
        return fields

    return Scale("small", recipe, {"8+4": recipe}, {"2 x 32": recipe}, (2, 3, 4), seeds=2)


class Twins(Study):
    def variants(self, scale: Scale) -> list[Variant]:
        return [
            scale.variant("vanilla", VANILLA),
            scale.variant("MoE++", against="vanilla"),
            scale.variant("tau .25", fields={"moe.rule.tau": 0.25}, against="vanilla"),
        ]

    def verdicts(self, results: Results) -> list[Verdict]:
        return [results.below("MoE++", "vanilla")]

    @property
    def name(self) -> str:
        return "twins"

    def _doc(self) -> str:
        return (
            "Are twins alike?\n\nQuestion  one\n          question.\nPaper     nothing.\n"
            "Claim     a claim.\nRefuted   never."
        )


def row(of: Variant | str, seed: int = 0, loss: float | None = 5.0, **changes: Any) -> Row:
    """A made-up row of a variant, or of a fingerprint."""
    values: Mapping[str, Any] = dict(
        fingerprint=of if isinstance(of, str) else runs.fingerprint(of.config),
        seed=seed,
        changes="moe.rule.tau=0.25",
        status=DONE,
        eval_loss=loss,
        bits_per_byte=2.0,
        held_out=f"text={loss}",
        tokens=1000,
        nominal_flops=2e9,
        realised_flops=1e9,
        ffn_experts=1.2,
        experts=2.0,
        training_ffn_experts=1.3,
        drop_rate=0.01,
        worst_eighth=0.02,
        step_seconds=0.25,
        seconds=30.0,
        machine=MACHINE,
    )
    return Row(**(values | changes))


def results(rows: list[Row], of: Study | None = None) -> Results:
    return study.results_of(of or Twins(), scale(), rows)
