"""Can a trained vanilla MoE become a MoE++ that runs fewer FFN experts, by a little more training?

Question  how far FFN experts a token fall in a vanilla MoE that is given zero-computation experts
          and trained on, and what that costs in held-out loss beside as much training without.
Paper     trains from scratch alone.
Claim     FFN experts a token get to what tau asks for, 5 % above it at most, and at tau = 1 the
          loss is at most 0.02 nats above the control's.
Refuted   if either interval is beyond that.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from moepp_jax import markdown
from moepp_jax.experiments import figures, runs
from moepp_jax.experiments import upcycling as steps
from moepp_jax.experiments.measure import Measurement
from moepp_jax.experiments.scale import VANILLA, Scale, Variant
from moepp_jax.experiments.study import Results, Study, Verdict

TAUS = (0.1, 0.5, 1.0)
_EXPERTS, _NATS = 1.05, 0.02


class Upcycling(Study):
    def variants(self, scale: Scale) -> list[Variant]:
        vanilla = scale.variant("vanilla", VANILLA)
        return [vanilla, scale.variant("MoE++, from scratch", against="vanilla")]

    def measurements(self, scale: Scale) -> list[Measurement]:
        source = self.variants(scale)[0]
        return [
            Measurement("upcycled", run, functools.partial(_upcycled, scale=scale))
            for run in runs.runs_of(source)
        ]

    def verdicts(self, results: Results) -> list[Verdict]:
        rows = {row.seed: row.values for row in results.measured}
        found = []
        for tau in TAUS:
            over = {seed: v[f"experts {tau:g}"] / v[f"wanted {tau:g}"] for seed, v in rows.items()}
            what = f"FFN experts at tau = {tau:g} over those wanted"
            found.append(results.measured_below(over, _EXPERTS, what, "vanilla"))
        above = {seed: v["loss 1"] - v["loss control"] for seed, v in rows.items()}
        what = "nats above the control at tau = 1"
        return [*found, results.measured_below(above, _NATS, what, "vanilla")]

    def figure(self, results: Results) -> Figure:
        figure = figures.new(6.5, 4.2)
        axes = figure.subplots()
        for number, name in enumerate(("control", *(f"{tau:g}" for tau in TAUS))):
            rows = [row.values for row in results.measured]
            x = [row[f"experts {name}"] for row in rows]
            y = [row[f"loss {name}"] - row["loss control"] for row in rows]
            label = name if name == "control" else f"tau {name}"
            color = figures.GREY if number == 0 else f"C{number - 1}"
            axes.plot(x, y, "o", color=color, label=label)
        axes.set(xlabel="FFN experts a token", ylabel="held-out loss less the control's, nats")
        axes.grid(alpha=0.3)
        figures.legend(axes)
        return figure

    def more(self, results: Results) -> list[str]:
        rows = [row.values for row in results.measured]
        if not rows:
            return []
        head = ["", "held-out loss", "to the control", "FFN experts", "wanted"]
        before = np.mean([row["loss before"] for row in rows])
        lines = [["before", f"{before:.4f}", "", "", ""]]
        for name in ("control", *(f"{tau:g}" for tau in TAUS)):
            loss, experts, wanted = (
                np.mean([row[f"{column} {name}"] for row in rows])
                for column in ("loss", "experts", "wanted")
            )
            above = loss - np.mean([row["loss control"] for row in rows])
            label = name if name == "control" else f"tau {name}"
            cells = [label, f"{loss:.4f}", f"{above:+.4f}", f"{experts:.3f}", f"{wanted:.3f}"]
            lines.append(cells)
        said = (
            "The trained vanilla model as MoE++ with 2 constant, 1 copy and 1 zero expert, trained "
            "on for as many steps\nat its last learning rate; control: the same without them. "
            "Means over seeds, of the last three evaluations:"
        )
        return [said, "", *markdown.table(head, lines), ""]


def _upcycled(folder: Path, scale: Scale) -> Mapping[str, float]:
    """A trained vanilla run, upcycled at each tau and trained on, and its control."""
    from moepp_jax.workdir import read_config

    config = read_config(folder)
    rate = config.optim.lr * config.optim.final_lr_ratio
    more = config.train.steps
    settings = steps.Settings(more, rate, bias_rate=90 / more)
    with tempfile.TemporaryDirectory() as files:
        workdir = folder.parent / f"{folder.name}-upcycled"
        rows = steps.upcycling(
            folder, workdir, Path(files), TAUS, settings, report=lambda line: None
        )
    found = {}
    for name, points in steps.by_run(rows).items():
        end, name = steps.end_of(points), name.removeprefix("tau ")
        found |= {f"loss {name}": end["eval_loss"], f"experts {name}": end["ffn_experts_per_token"]}
        found |= {f"wanted {name}": end["wanted"], "loss before": points[0]["eval_loss"]}
    return found
