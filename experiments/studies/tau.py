"""How much of the FFN work does tau take away, and what does it cost?

Question  held-out loss and FFN experts a token of MoE++ with tau from 0.1 to 1.
Paper     table 3, 0.6B, average of nine tasks: 43.4, 44.9, 44.9, 45.6, 44.5 for tau 0.1, 0.25, 0.5,
          0.75, 1 (vanilla 44.3); sizes differ, and the smallest tau is best in none.
Claim     FFN experts a token follow K tau N_FFN / (tau N_FFN + N_ZC) to a quarter of an expert, and
          at tau = 0.75 the held-out loss is below the vanilla MoE's.
Refuted   if the interval of FFN experts a token of one tau is further away, or that of the loss's
          difference is above 0.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from moepp_jax.experiments import figures
from moepp_jax.experiments.scale import VANILLA, Scale, Variant
from moepp_jax.experiments.study import Results, Study, Verdict

TAUS = (0.1, 0.25, 0.5, 0.75, 1.0)
_NEAR = 0.25  # FFN experts a token


def name_of(tau: float) -> str:
    return f"tau {tau:g}"


class Tau(Study):
    def variants(self, scale: Scale) -> list[Variant]:
        vanilla = scale.variant("vanilla", VANILLA)
        each = [
            scale.variant(name_of(tau), fields={"moe.rule.tau": tau}, against="vanilla")
            for tau in TAUS
        ]
        return [vanilla, *each]

    def verdicts(self, results: Results) -> list[Verdict]:
        near = [_near_balance(results, v) for v in results.variants if v.against]
        return [*near, results.below(name_of(0.75), "vanilla")]

    def figure(self, results: Results) -> Figure:
        figure = figures.new(9, 4)
        loss, experts = figure.subplots(1, 2)
        configs = {v.name: v.config for v in results.variants}
        found = [tau for tau in TAUS if results.rows(name_of(tau))]
        means = [results.mean(name_of(tau)) for tau in found]
        each = [[row.eval_loss for row in results.rows(name_of(tau))] for tau in found]
        figures.with_errors(loss, found, means, "C0", "MoE++", each)
        if (vanilla := results.mean("vanilla")) is not None:
            figures.level(loss, vanilla, figures.GREY, "vanilla")
        measured = [results.mean(name_of(tau), "ffn_experts") for tau in found]
        theory = [configs[name_of(tau)].moe.rule.ffn_load for tau in TAUS]
        experts.plot(TAUS, theory, ls=":", color=figures.GREY, label="at balance")
        figures.with_errors(experts, found, measured, "C0", "MoE++, held-out text")
        loss.set(xlabel="tau")
        loss.set_ylabel(f"held-out loss, nats a token\n{figures.averaged(means)}")
        experts.set(xlabel="tau", ylabel="FFN experts a token", ylim=(0, None))
        for axes in (loss, experts):
            axes.grid(alpha=0.3)
            figures.legend(axes)
        return figure


def _near_balance(results: Results, variant: Variant) -> Verdict:
    balance = variant.config.moe.rule.ffn_load
    off = {row.seed: row.ffn_experts - balance for row in results.rows(variant.name)}
    what = f"{variant.name}, FFN experts a token less the {balance:.3f} of balance"
    return results.measured_within(off, _NEAR, what, variant.name)
