"""When in training does the routing settle?

Router saturation, as OLMoE has it: of the experts that a token has in the last checkpoint, the
share that an earlier checkpoint chose for it already, the mean of the tokens, by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from moepp_jax.analysis import drawing
from moepp_jax.analysis.question import Question, Table, beside, labels, sample_said
from moepp_jax.analysis.record import Record


class Saturation(Question):
    place = 15

    def of(self, record: Record) -> Mapping[str, Any]:
        return record.meta.more.get("saturation") or {}

    def missing(self, records: Sequence[Record]) -> str:
        if not any(found.get("steps") for found in self.found(records)):
            return "Earlier checkpoints of the run were not asked."
        return ""

    def tables(self, records: Sequence[Record]) -> dict[str, Table]:
        each = [
            {
                (int(step), layer): (overlap,)
                for step, layers in zip(of.get("steps", ()), of.get("overlap", ()), strict=True)
                for layer, overlap in zip(record.meta.layers, layers, strict=True)
            }
            for record, of in zip(records, self.found(records), strict=True)
        ]
        keys = ("step", "layer")
        return {self.name: beside(records, keys, ("share chosen already",), each, shown=12)}

    def said(self, records: Sequence[Record]) -> list[str]:
        return sample_said(records, self.found(records))

    def figure(self, records: Sequence[Record]) -> Figure:
        shown = [
            (record, of, label)
            for record, of, label in zip(records, self.found(records), labels(records), strict=True)
            if of.get("steps")
        ]
        figure, panels = drawing.panels(len(shown), 2, 6.0, 3.6, sharey=True)
        colors = matplotlib.colormaps[drawing.SEQUENTIAL]
        for axes, (record, of, label) in zip(panels, shown, strict=True):
            overlap, layers = np.array(of["overlap"], float), record.meta.layers
            for j, layer in enumerate(layers):
                color = colors(0.9 * j / max(len(layers) - 1, 1))
                drawn = j in drawing.chosen(len(layers))
                axes.plot(
                    of["steps"],
                    overlap[:, j],
                    color=color,
                    marker="o",
                    ms=3,
                    lw=1.2,
                    label=f"layer {layer}" if drawn else None,
                )
            axes.set_xlabel("step")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.set_ylim(0, 1.02)
            axes.legend(fontsize=8, loc="lower right")
            drawing.tidy(axes)
            if len(records) > 1:
                axes.set_title(drawing.label(label, 40), fontsize=10)
        panels[0].set_ylabel("share of the last choices")
        return figure
