"""How many constant experts?

Question  held-out loss of MoE++ with 0 to 6 constant experts beside one zero and one copy expert.
Paper     equation 10: max(N_FFN / 4 - n_zero - n_copy, 1), which is 1 for 8 FFN experts, where
          table 2 has 2; a sweep of n_const rises, then falls.
Claim     2 constant experts, as table 2 has it, have a lower held-out loss than none and than 6.
Refuted   if the interval of one of these paired differences is above 0.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from moepp_jax.experiments import figures
from moepp_jax.experiments.scale import Scale, Variant
from moepp_jax.experiments.study import Results, Study, Verdict

COUNTS = (0, 1, 2, 4, 6)


def name_of(count: int) -> str:
    return f"{count} constant"


class NConst(Study):
    def variants(self, scale: Scale) -> list[Variant]:
        return [
            scale.variant(
                name_of(n), fields={"moe.n_const": n}, against=name_of(2) if n != 2 else ""
            )
            for n in COUNTS
        ]

    def verdicts(self, results: Results) -> list[Verdict]:
        return [results.below(name_of(2), name_of(other)) for other in (0, 6)]

    def figure(self, results: Results) -> Figure:
        figure = figures.new(6, 4)
        axes = figure.subplots()
        found = [n for n in COUNTS if results.rows(name_of(n))]
        means = [results.mean(name_of(n)) for n in found]
        each = [[row.eval_loss for row in results.rows(name_of(n))] for n in found]
        figures.with_errors(axes, found, means, "C0", "MoE++", each)
        axes.set(xlabel="constant experts", xticks=COUNTS)
        axes.set(ylabel=f"held-out loss, nats a token\n{figures.averaged(means)}")
        axes.grid(alpha=0.3)
        return figure
