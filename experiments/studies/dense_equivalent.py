"""How large a dense model does MoE++ stand for?

Question  held-out loss of dense models whose layers have 1, 2 and 3 times the parameters that a
          token of MoE++ meets at most, beside MoE++ and its vanilla twin.
Paper     section 4.2, of its 7B, which table 4 gives at most 1.2 B active parameters, after 1 T
          tokens: "delivers performance comparable to dense models that have 2 to 3 times the number
          of activation parameters". Those are others' models, trained on other text.
Claim     MoE++ has a lower held-out loss than the dense model of twice its active parameters.
Refuted   if the interval of that paired difference is above 0.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from moepp_jax.config import Config
from moepp_jax.experiments import figures
from moepp_jax.experiments.scale import VANILLA, Scale, Variant
from moepp_jax.experiments.study import Results, Study, Verdict

TIMES = (1, 2, 3)


def name_of(times: int) -> str:
    return f"dense, {times} x active"


class DenseEquivalent(Study):
    def variants(self, scale: Scale) -> list[Variant]:
        ours = scale.variant("MoE++")
        dense = [
            # One expert that every token is sent to, with a gate of 1.
            scale.variant(
                name_of(times),
                VANILLA,
                {
                    "moe.n_ffn": 1,
                    "moe.rule.top_k": 1,
                    "moe.rule.balance_weight": 0.0,
                    "moe.ffn_size": _width(ours.config, times),
                },
                against="MoE++",
            )
            for times in TIMES
        ]
        return [ours, scale.variant("vanilla", VANILLA, against="MoE++"), *dense]

    def verdicts(self, results: Results) -> list[Verdict]:
        return [results.below("MoE++", name_of(2))]

    def figure(self, results: Results) -> Figure:
        figure = figures.new(7, 4)
        axes = figure.subplots()
        found = [times for times in TIMES if results.rows(name_of(times))]
        means = [results.mean(name_of(times)) for times in found]
        each = [[row.eval_loss for row in results.rows(name_of(times))] for times in found]
        figures.with_errors(axes, found, means, figures.GREY, "dense", each)
        for number, name in enumerate(("MoE++", "vanilla")):
            if (loss := results.mean(name)) is not None:
                figures.level(axes, loss, f"C{number}", name)
                means.append(loss)
        axes.set(xlabel="active parameters relative to MoE++'s (x)", xticks=TIMES)
        axes.set(ylabel=f"held-out loss, nats a token\n{figures.averaged(means)}")
        axes.grid(alpha=0.3)
        figures.legend(axes)
        return figure


def _width(config: Config, times: int) -> int:
    """Of the dense FFN that, with attention, has so many times MoE++'s active parameters."""
    m, e = config.model, config.moe
    attention = 2 * m.hidden_size * m.head_width * (m.num_heads + m.num_kv_heads)
    active = attention + 3 * m.hidden_size * e.ffn_size * e.rule.most
    return round((times * active - attention) / (3 * m.hidden_size))
