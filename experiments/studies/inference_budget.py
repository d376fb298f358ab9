"""Can one trained MoE++ be run with more or with less computation?

Question  held-out loss, FFN experts a token and decoded tokens a second of one trained model with
          an offset on the logits of its zero-computation experts, beside models that were trained
          with another tau.
Paper     asks for a model at each tau.
Claim     with an offset at which it runs as many FFN experts a token as a model trained with tau =
          0.25, it ends less than 0.05 nats above that model.
Refuted   if the interval of the paired difference is above 0.05.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moepp_jax import markdown
from moepp_jax.experiments import figures, runs
from moepp_jax.experiments.measure import Measured, Measurement
from moepp_jax.experiments.scale import Scale, Variant
from moepp_jax.experiments.studies.tau import TAUS, name_of
from moepp_jax.experiments.study import OPEN, Results, Study, Verdict

OFFSETS = (-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)
OURS = name_of(0.75)
_LESS, _NATS = name_of(0.25), 0.05
_PROMPT, _NEW, _TEXTS = 16, 64, 8  # tokens, tokens, sequences at once


class InferenceBudget(Study):
    def variants(self, scale: Scale) -> list[Variant]:
        return [
            scale.variant(
                name_of(tau),
                fields={"moe.rule.tau": tau},
                against="" if name_of(tau) == OURS else OURS,
            )
            for tau in TAUS
        ]

    def measurements(self, scale: Scale) -> list[Measurement]:
        (ours,) = (v for v in self.variants(scale) if v.name == OURS)
        return [
            Measurement(f"offset {offset:g}", run, functools.partial(_at, offset=offset))
            for run in runs.runs_of(ours)
            for offset in OFFSETS
        ]

    def verdicts(self, results: Results) -> list[Verdict]:
        theirs = {row.seed: row for row in results.rows(_LESS)}
        found, beyond = {}, 0
        for seed, (experts, loss) in _curves(results.measured).items():
            if seed not in theirs or len(experts) < len(OFFSETS):
                continue
            if not experts[0] <= theirs[seed].ffn_experts <= experts[-1]:
                beyond += 1
                continue
            at = float(np.interp(theirs[seed].ffn_experts, experts, loss))
            found[seed] = at - theirs[seed].eval_loss
        what = f"nats above {_LESS}, with an offset for as many FFN experts a token"
        said = results.measured_below(found, _NATS, what, OURS, _LESS)
        if beyond and not results.lacking(OURS) and not results.lacking(_LESS):
            text = f"{said.said}; with no offset as many in {beyond} seeds"
            return [said._replace(outcome=OPEN, said=text)]
        return [said]

    def figure(self, results: Results) -> Figure:
        figure = figures.new(10, 4.3)
        loss, speed = figure.subplots(1, 2)
        means, speeds = [], []
        for tau in TAUS:
            pairs = [(row.ffn_experts, row.eval_loss) for row in results.rows(name_of(tau))]
            if pairs:
                label = "" if means else "trained with each tau"
                x, y = figures.point(loss, pairs, "C1", "s", label)
                _named(loss, f"{tau:g}", (x.value, min(nats for _, nats in pairs)), -9, "C1")
                means.append(y)
        for offset in OFFSETS:
            rows = [r.values for r in results.measured if r.name == f"offset {offset:g}"]
            if rows:
                label = "" if speeds else f"one model of {OURS}, offsets"
                pairs = [(row["ffn_experts"], row["eval_loss"]) for row in rows]
                x, y = figures.point(loss, pairs, "C0", "o", label)
                text = f"{offset:+g}" if offset else "0"
                _named(loss, text, (x.value, max(nats for _, nats in pairs)), 9, "C0")
                means.append(y)
                pairs = [(row["ffn_experts"], row["decoded_per_second"]) for row in rows]
                speeds.append(figures.point(speed, pairs, "C0", "o")[1])
        loss.set(ylabel=f"held-out loss, nats a token\n{figures.averaged(means)}")
        speed.set(ylabel=f"decoded tokens a second\n{figures.averaged(speeds)}", ylim=(0, None))
        for axes in (loss, speed):
            axes.set(xlabel="FFN experts a token")
            axes.margins(y=0.1)
            axes.grid(alpha=0.3)
        figures.legend(loss)
        return figure

    def more(self, results: Results) -> list[str]:
        names = dict.fromkeys(row.name for row in results.measured)
        if not names:
            return []
        head = ["", "held-out loss", "FFN experts", "decoded tokens a second"]
        lines = []
        for name in sorted(names, key=lambda name: float(name.split()[1])):
            rows = [row.values for row in results.measured if row.name == name]
            loss, experts, speed = (
                np.mean([row[c] for row in rows])
                for c in ("eval_loss", "ffn_experts", "decoded_per_second")
            )
            lines.append([name, f"{loss:.4f}", f"{experts:.3f}", f"{speed:,.0f}"])
        said = f"Of {OURS}, means over seeds; {_TEXTS} texts are decoded at once:"
        return [said, "", *markdown.table(head, lines), ""]


def _named(axes: Axes, text: str, at: tuple[float, float], above: int, color: str) -> None:
    """Text so many points above a point."""
    style = {"ha": "center", "va": "center", "fontsize": 8, "color": color}
    axes.annotate(text, at, (0, above), textcoords="offset points", **style)


def _at(folder: Path, offset: float) -> Mapping[str, float]:
    """What a run's model does with an offset."""
    import moepp_jax
    from moepp_jax.evaluate import evaluate_run
    from moepp_jax.workdir import read_config

    config = read_config(folder).replace("moe.rule", zero_offset=offset)
    found = evaluate_run(config, folder)
    model = moepp_jax.load(folder, only_generate=True, zero_offset=offset)
    prompts = np.random.default_rng(0).integers(3, config.model.vocab_size, (_TEXTS, _PROMPT))
    best = 0.0
    for _ in range(3):  # the first compiles
        model.generate(prompts.tolist(), max_new_tokens=_NEW, temperature=1.0)
        best = max(best, model.speed.decoded_tokens / model.speed.decode_seconds)
    return {
        "eval_loss": found["eval_loss"],
        "ffn_experts": found["eval_ffn_experts_per_token"],
        "decoded_per_second": best,
        "decoded_ffn_experts": model.speed.ffn_experts_per_token,
    }


def _curves(measured: list[Measured]) -> dict[int, tuple[list[float], list[float]]]:
    """seed -> FFN experts a token, rising, and the losses there."""
    found: dict[int, list[tuple[float, float]]] = {}
    for row in measured:
        pair = row.values["ffn_experts"], row.values["eval_loss"]
        found.setdefault(row.seed, []).append(pair)
    return {seed: tuple(map(list, zip(*sorted(p), strict=True))) for seed, p in found.items()}
