"""Does a checkpoint in the released layout, converted, compute what the authors' arithmetic gives?

Question  logits, routing, hidden states, loss and greedy tokens of three tiny checkpoints of random
          weights in the layout of the released one, as ours computes them of their conversion,
          beside what the authors' arithmetic gives in float32, which is in their files.
Paper     its inference code and its weights are public; the released checkpoint is not compared
          here.
Claim     every number is the same to 2e-5 of the largest value in float32; chosen experts and
          greedy tokens are the same.
Refuted   by a larger difference in any.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from moepp_jax import markdown
from moepp_jax.experiments import figures, reference
from moepp_jax.experiments.measure import Measurement
from moepp_jax.experiments.scale import Scale, Variant
from moepp_jax.experiments.study import FAILS, HOLDS, MISSING, Results, Study, Verdict

CHECKPOINTS = ("default", "mixtral_gating", "released_flags")
_MARKERS = "os^"


class Reference(Study):
    def variants(self, scale: Scale) -> list[Variant]:
        return []

    def measurements(self, scale: Scale) -> list[Measurement]:
        return [
            Measurement(name, None, functools.partial(_of, checkpoint=name)) for name in CHECKPOINTS
        ]

    def verdicts(self, results: Results) -> list[Verdict]:
        found = []
        there = {row.name: row.values for row in results.measured}
        for name in CHECKPOINTS:
            if name not in there:
                found.append(Verdict(MISSING, f"{name} is not measured yet"))
                continue
            values = there[name]
            worst = max(values, key=lambda column: values[column])
            outcome = HOLDS if values[worst] <= reference.TOLERANCE else FAILS
            said = f"{name}: the largest difference is {values[worst]:.1e} ({worst})"
            found.append(Verdict(outcome, said))
        return found

    def figure(self, results: Results) -> Figure:
        figure = figures.new(8, 4.3)
        axes = figure.subplots()
        for number, row in enumerate(results.measured):
            x, color = np.arange(len(row.values)) + 0.2 * (number - 1), f"C{number}"
            y = np.array(list(row.values.values()))
            axes.plot(x[y > 0], y[y > 0], _MARKERS[number], color=color, ms=7, label=row.name)
            for at in x[y == 0]:  # which has no logarithm
                style = {"ha": "center", "color": color, "transform": axes.get_xaxis_transform()}
                axes.text(at, 0.03, "0", **style)
            axes.set_xticks(range(len(row.values)), list(row.values), rotation=30, ha="right")
            axes.set_xlim(-0.5, len(row.values) - 0.5)
        axes.axhline(reference.TOLERANCE, color=figures.GREY, ls="--", label="claimed at most")
        axes.set(yscale="log", ylabel="difference over the largest value")
        axes.set_ylim(bottom=axes.get_ylim()[0] / 3)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncol=4, frameon=False)
        return figure

    def more(self, results: Results) -> list[str]:
        if not results.measured:
            return []
        columns = list(results.measured[0].values)
        lines = [
            [row.name, *(f"{row.values[column]:.1e}" for column in columns)]
            for row in results.measured
        ]
        said = "Over the largest value; of tokens and choices, the share that differs:"
        return [said, "", *markdown.table(["", *columns], lines), ""]


def _of(folder: Path | None, checkpoint: str) -> Mapping[str, float]:
    from moepp_jax import interop

    there = reference.of_repository(checkpoint)
    with tempfile.TemporaryDirectory() as temporary:
        workdir = Path(temporary) / "run"
        interop.from_hf(there, workdir, dtype="float32", report=lambda line: None)
        found = reference.differences(there, workdir)
    return {name.replace(",", ""): difference.relative for name, difference in found.items()}
