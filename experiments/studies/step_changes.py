"""What does each setting of the 7B's step give, by what the compiler schedules?

Question  how long a step of the 7B on 64 TPU v5p takes with plain attention and with backward that
          computes nearly everything again, and with the settings of its recipe made one after the
          other; and whether sequences of 8,192 and 32,768 tokens fit.
Paper     none.
Claim     every setting makes the step shorter, and the long sequences fit a chip.
Refuted   if one makes it longer with links at their peak, or one does not fit.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from moepp_jax import markdown
from moepp_jax.compile import parts
from moepp_jax.config import Config
from moepp_jax.experiments import figures
from moepp_jax.experiments.measure import Measurement
from moepp_jax.experiments.scale import PAPER, Scale, Variant
from moepp_jax.experiments.studies import step_time
from moepp_jax.experiments.study import FAILS, HOLDS, MISSING, Results, Study, Verdict

# One on the other; the last one is the recipe.
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "plain attention, tokens that were exchanged are kept": {
        "model.attention": "xla",
        "model.remat": "exchanged",
        "moe.exchange_parts": 1,
    },
    "fused attention": {"model.attention": "auto"},
    "where tokens go is kept": {"model.remat": "routing"},
    "what attention answers is kept": {"model.remat": "attention"},
    "the experts' first product is kept": {"model.remat": "w_in"},
    "tokens are exchanged in two parts": {"moe.exchange_parts": 2},
    "in four parts": {"moe.exchange_parts": 4},
    "the residual stream behind attention is kept: the recipe": {"model.remat": "residual"},
}
# As many tokens a step as the recipe has.
LENGTHS = (8192, 32_768)
REMAT = ("residual", "exchanged")


def long(length: int, remat: str) -> str:
    """Of a row."""
    return f"{length:,} tokens a sequence, model.remat {remat}"


class StepChanges(Study):
    scales = (PAPER.name,)

    def variants(self, scale: Scale) -> list[Variant]:
        return []

    def measurements(self, scale: Scale) -> list[Measurement]:
        wanted, made = {}, {}
        for name, fields in CHANGES.items():
            made |= fields
            wanted[name] = _config(scale, made)
        for length in LENGTHS:
            for remat in REMAT:
                tokens = _config(scale, {}).batch_tokens
                fields = {"data.seq_len": length, "train.batch_size": tokens // length}
                wanted[long(length, remat)] = _config(scale, fields | {"model.remat": remat})
        return [
            Measurement(name, None, functools.partial(step_time.predict, config, step_time.AT))
            for name, config in wanted.items()
        ]

    def verdicts(self, results: Results) -> list[Verdict]:
        rows = _rows(results)
        if any(name not in rows for name in (*CHANGES, *_long_names())):
            return [Verdict(MISSING, "some rows are not there yet")]
        steps = [rows[name].get("predicted_ms_peak", 0.0) for name in CHANGES]
        shorter = all(after < before for before, after in itertools.pairwise(steps))
        said = ", ".join(f"{step:,.0f}" for step in steps)
        fit = [name for name in _long_names() if rows[name]["fits"]]
        lacking = [name for name in _long_names() if name not in fit]
        told = f"not: {'; '.join(lacking)}" if lacking else "all of them fit"
        return [
            Verdict(HOLDS if shorter else FAILS, f"ms of a step, change by change: {said}"),
            Verdict(FAILS if lacking else HOLDS, f"long sequences: {told}"),
        ]

    def figure(self, results: Results) -> Figure:
        """A bar for each change, of the parts of the step."""
        rows = {n: row for n, row in _rows(results).items() if n in CHANGES and row["fits"]}
        figure = figures.new(11, 4)
        axes = figure.subplots()
        shown = [name for name in CHANGES if name in rows]
        left = [0.0] * len(shown)
        for number, part in enumerate(parts.ALL):
            widths = [rows[name][step_time.column(part)] for name in shown]
            color = step_time.COLORS[number]
            axes.barh(shown, widths, left=left, label=part, color=color, height=0.7)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for y, (name, end) in enumerate(zip(shown, left, strict=True)):
            said = f" {rows[name]['mfu_peak']:.1%} MFU, {rows[name]['hbm_gib']:.0f} GiB"
            axes.text(end, y, said, va="center", fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.set(title=f"The 7B's step on {step_time.AT}, links at their peak")
        axes.set_xlabel("ms, predicted")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
        return figure

    def more(self, results: Results) -> list[str]:
        rows = _rows(results)
        if not rows:
            return []
        head = ("step, ms", "MFU, nominal", "attention core, ms", "exchange not hidden, ms")
        head = ("", *head, "GiB a chip")
        return [
            f"The 7B at tau {step_time.USUAL:g} on {step_time.AT}, one change on the other:",
            "",
            *markdown.table(head, _lines(rows, CHANGES)),
            "",
            "The recipe with longer sequences, as many tokens a step:",
            "",
            *markdown.table(head, _lines(rows, _long_names())),
            "",
            _NOTES,
            "",
        ]


_NOTES = """\
Of two numbers the first is with links at their peak, the second with links at a quarter of it.
Nothing here ran on a TPU: see `step_time`. Model code of today is in every row: what else it has
gained (rows combined with their gates' gradients in one pass, capacity by comparison, vocabulary
products in bfloat16) no row is without."""


def _config(scale: Scale, changes: Mapping[str, Any]) -> Config:
    return step_time.config_of(scale, step_time.LARGEST, step_time.USUAL, changes)


def _long_names() -> list[str]:
    return [long(length, remat) for length in LENGTHS for remat in REMAT]


def _rows(results: Results) -> dict[str, step_time.Row]:
    return {row.name: row.values for row in results.measured}


def _lines(rows: Mapping[str, step_time.Row], names: Sequence[str] | Mapping) -> list[list[str]]:
    lines = []
    for name in names:
        row = rows.get(name)
        if row is None:
            continue
        if "predicted_ms_peak" not in row:
            lines.append([name, "does not fit", "", "", "", f"{row['hbm_gib']:.1f}"])
            continue
        hidden = step_time.column(parts.EXCHANGE)
        lines.append(
            [
                name,
                f"{row['predicted_ms_peak']:,.0f} to {row['predicted_ms_slow']:,.0f}",
                f"{row['mfu_peak']:.1%} to {row['mfu_slow']:.1%}",
                f"{row[step_time.column(parts.CORE)]:,.0f}",
                f"{row[hidden]:,.1f} to {row[f'{hidden}_slow']:,.1f}",
                f"{row['hbm_gib']:.1f}" + ("" if row["fits"] else ", does not fit"),
            ]
        )
    return lines
