"""Do gating residuals help, and would they help a vanilla MoE too?

Question  held-out loss of MoE++ with gating residuals, without them, and with no gradient through
          them; and of the vanilla MoE with and without, which reviewers asked for. And how much
          the router's two best probabilities vary over the tokens of held-out text.
Paper     1B, average of seven tasks: 47.7 with, 47.5 without. Whether its vanilla baselines have
          them is not stated. Its histograms show that they lower the variance of the highest and of
          the second-highest probability.
Claim     MoE++ has a lower held-out loss with gating residuals than without, and a vanilla MoE that
          is given them stays above MoE++; both probabilities vary less with them.
Refuted   if the interval of one of these paired differences is above 0, or that of a ratio of
          variances above 1.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moepp_jax import markdown
from moepp_jax.experiments import runs
from moepp_jax.experiments.measure import Measurement
from moepp_jax.experiments.scale import VANILLA, Scale, Variant
from moepp_jax.experiments.study import Results, Study, Verdict

_COMPARED = ("MoE++", "MoE++, none")
_COLUMNS = ("first_mean", "first_variance", "second_mean", "second_variance", "entropy")
_TOKENS = 60_000


class GatingResidual(Study):
    def variants(self, scale: Scale) -> list[Variant]:
        def residual(how: str) -> dict[str, str]:
            return {"moe.rule.residual": how}

        return [
            scale.variant("MoE++"),
            scale.variant("MoE++, detached", fields=residual("detached"), against="MoE++"),
            scale.variant("MoE++, none", fields=residual("none"), against="MoE++"),
            scale.variant("vanilla", VANILLA, against="MoE++"),
            scale.variant("vanilla, residuals", VANILLA, residual("logits"), against="MoE++"),
        ]

    def verdicts(self, results: Results) -> list[Verdict]:
        return [
            results.below("MoE++", "MoE++, none"),
            results.below("MoE++", "vanilla, residuals"),
            *(self._steadier(results, which) for which in ("first", "second")),
        ]

    def measurements(self, scale: Scale) -> list[Measurement]:
        return [
            Measurement("probabilities", run, _probabilities)
            for v in self.variants(scale)
            if v.name in _COMPARED
            for run in runs.runs_of(v)
        ]

    def more(self, results: Results) -> list[str]:
        head = ["", "first, mean", "variance", "second, mean", "variance", "entropy"]
        lines = []
        for name in _COMPARED:
            rows = list(_measured(results, name).values())
            if rows:
                means = [sum(row[c] for row in rows) / len(rows) for c in _COLUMNS]
                lines.append([name, *(format(m, ".4g") for m in means)])
        if not lines:
            return []
        said = (
            f"The router's best and second-best probability over {_TOKENS:,} tokens of held-out "
            "text and all layers, and the entropy in nats; means over seeds:"
        )
        return [said, "", *markdown.table(head, lines), ""]

    def _steadier(self, results: Results, which: str) -> Verdict:
        ours, theirs = (_measured(results, name) for name in _COMPARED)
        column = f"{which}_variance"
        ratios = {s: ours[s][column] / theirs[s][column] for s in ours.keys() & theirs.keys()}
        what = f"variance of the {which} probability with residuals over that without"
        return results.measured_below(ratios, 1.0, what, *_COMPARED)


def _measured(results: Results, name: str) -> dict[int, Mapping[str, float]]:
    """Seed -> what was measured of a variant."""
    own = runs.fingerprint(next(v.config for v in results.variants if v.name == name))
    return {row.seed: row.values for row in results.measured if row.fingerprint == own}


def _probabilities(folder: Path) -> Mapping[str, float]:
    """Of a run's router on held-out text."""
    from moepp_jax import observe
    from moepp_jax.analysis import record
    from moepp_jax.workdir import read_config

    config = read_config(folder)
    with tempfile.TemporaryDirectory() as files:
        file = Path(files) / "routing.parquet"
        text = observe.Text(tokens=_TOKENS, sample=0)
        observe.analyze(config, folder, config.train.steps, text, [file])
        rows = record.read(file).rows
    first, second = np.float64(rows.scores[..., 0]), np.float64(rows.scores[..., 1])
    values = (first.mean(), first.var(), second.mean(), second.var(), rows.entropy.mean())
    return dict(zip(_COLUMNS, map(float, values), strict=True))
