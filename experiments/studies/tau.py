"""How much of the FFN work does tau take away, and what does it cost?

Question  held-out loss and FFN experts a token of MoE++ with tau from 0.1 to 1.
Paper     table 3, 0.6B, average of nine tasks: 43.4, 44.9, 44.9, 45.6, 44.5 for tau 0.1, 0.25, 0.5,
          0.75, 1 (vanilla 44.3); sizes differ, and the smallest tau is best in none.
Claim     FFN experts a token follow K tau N_FFN / (tau N_FFN + N_ZC) to a quarter of an expert, and
          at tau = 0.75 the held-out loss is below the vanilla MoE's.
Refuted   if FFN experts a token of one tau are further away, or the interval is above 0.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from moepp_jax.experiments import figures
from moepp_jax.experiments.scale import VANILLA, Scale, Variant
from moepp_jax.experiments.study import FAILS, HOLDS, MISSING, Results, Study, Verdict

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
        return [_on_ffn_experts(results), results.below(name_of(0.75), "vanilla")]

    def figure(self, results: Results) -> Figure:
        figure = figures.new(9, 4)
        loss, experts = figure.subplots(1, 2)
        configs = {v.name: v.config for v in results.variants}
        found = [tau for tau in TAUS if results.rows(name_of(tau))]
        means = [results.mean(name_of(tau)) for tau in found]
        figures.with_errors(loss, found, means, "C0", "MoE++")
        if (vanilla := results.mean("vanilla")) is not None:
            loss.axhline(vanilla.value, color=figures.GREY, ls="--", label="vanilla")
        measured = [results.mean(name_of(tau), "ffn_experts") for tau in found]
        theory = [configs[name_of(tau)].moe.rule.ffn_load for tau in TAUS]
        experts.plot(TAUS, theory, ls=":", color=figures.GREY, label="at balance")
        figures.with_errors(experts, found, measured, "C0", "MoE++, held-out text")
        loss.set(xlabel="tau", ylabel="held-out loss, nats a token")
        experts.set(xlabel="tau", ylabel="FFN experts a token", ylim=(0, None))
        for axes in (loss, experts):
            axes.grid(alpha=0.3)
            figures.legend(axes)
        return figure


def _on_ffn_experts(results: Results) -> Verdict:
    off = {}
    for v in results.variants:
        measured = results.mean(v.name, "ffn_experts")
        if v.against and measured is not None:
            off[v.name] = measured.value - v.config.moe.rule.ffn_load
    if len(off) < len(TAUS):
        return Verdict(
            MISSING, f"FFN experts a token are known of {len(off)} of {len(TAUS)} values"
        )
    worst = max(off, key=lambda name: abs(off[name]))
    said = f"FFN experts a token are {off[worst]:+.2f} from balance at {worst}, the furthest"
    return Verdict(HOLDS if abs(off[worst]) <= _NEAR else FAILS, said)
