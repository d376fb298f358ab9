"""Is it the learning rate?

Question  held-out loss of MoE++ and of its vanilla twin with half and twice the learning rate of
          every other experiment, which both twins have.
Paper     states the learning rates it trains with; whether others were tried is not stated.
Claim     MoE++ at its best of the three has a lower held-out loss than the vanilla MoE at its own.
Refuted   if the interval of that paired difference is above 0.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from moepp_jax.experiments import figures
from moepp_jax.experiments.scale import MOEPP, VANILLA, Scale, Variant
from moepp_jax.experiments.study import MISSING, Results, Study, Verdict

TIMES = (0.5, 1.0, 2.0)
NAMES = {MOEPP: "MoE++", VANILLA: "vanilla"}


def name_of(kind: str, times: float) -> str:
    return f"{NAMES[kind]}, {times:g} x"


class LearningRate(Study):
    scales = ("tiny", "small")

    def variants(self, scale: Scale) -> list[Variant]:
        usual = scale.recipe().optim.lr
        found = []
        for times in TIMES:
            fields = {"optim.lr": times * usual}
            vanilla = name_of(VANILLA, times)
            found.append(scale.variant(vanilla, VANILLA, fields))
            found.append(scale.variant(name_of(MOEPP, times), MOEPP, fields, against=vanilla))
        return found

    def verdicts(self, results: Results) -> list[Verdict]:
        best = {}
        for kind, name in NAMES.items():
            means = {n: results.mean(n) for n in (name_of(kind, times) for times in TIMES)}
            if None in means.values() or any(map(results.lacking, means)):
                return [Verdict(MISSING, f"{name} is not known at all {len(TIMES)} rates")]
            best[kind] = min(means, key=lambda n: means[n].value)
        return [results.below(best[MOEPP], best[VANILLA])]

    def figure(self, results: Results) -> Figure:
        figure = figures.new(6.5, 4)
        axes = figure.subplots()
        for number, (kind, name) in enumerate(NAMES.items()):
            found = [t for t in TIMES if results.rows(name_of(kind, t))]
            means = [results.mean(name_of(kind, t)) for t in found]
            each = [[row.eval_loss for row in results.rows(name_of(kind, t))] for t in found]
            figures.with_errors(axes, found, means, f"C{number}", name, each)
        axes.set(xscale="log", xlabel="learning rate, by that of the other experiments")
        axes.set_xticks(TIMES, [f"{times:g}" for times in TIMES])
        axes.minorticks_off()
        every = [results.mean(v.name) for v in results.variants if results.rows(v.name)]
        axes.set_ylabel(f"held-out loss, nats a token\n{figures.averaged(every)}")
        axes.grid(alpha=0.3)
        figures.legend(axes)
        return figure
