"""The paper's text and its authors' code differ in seven places: which of them matter?

Question  held-out loss when one of the seven is changed at a time: gates as they are or over the
          sum of those that are not zero experts', logits divided by their standard deviation, the
          experts' input times K, a router of two layers, the balance loss without its factor N or
          summed over layers, constants that start small, one constant expert.
Paper     its text has raw gates, one matrix, no normalisation, an unscaled input, and equation 10
          gives 1 constant expert for 8 FFN experts, where table 2 has 2; scale of the balance loss
          and initial values are not stated. The code renormalises; the released model divides
          logits by their deviation.
Claim     no one of them moves the held-out loss by more than 0.02 nats.
Refuted   if the interval of the paired difference of one lies beyond 0.02, either way.
"""

from __future__ import annotations

from moepp_jax.experiments.scale import Scale, Variant
from moepp_jax.experiments.study import Results, Study, Verdict

OURS = "MoE++"
_NATS = 0.02


class PaperVsCode(Study):
    def variants(self, scale: Scale) -> list[Variant]:
        usual = scale.variant(OURS)
        rule, size = usual.config.moe.rule, usual.config.moe.num_experts
        layers = usual.config.model.num_layers
        ways = {
            "raw gates": {"moe.rule.gate": "raw"},
            "logits normalised": {"moe.rule.logit_norm": 1.0},
            "input times K": {"moe.input_scale": float(rule.most)},
            "two-layer router": {"moe.rule.router_layers": 2},
            "balance without N": {"moe.rule.balance_weight": rule.balance_weight / size},
            "balance, layers summed": {"moe.rule.balance_weight": rule.balance_weight * layers},
            "constants from 0.01": {"model.const_std": 0.01},
            "1 constant": {"moe.n_const": 1},
        }
        each = [scale.variant(name, fields=how, against=OURS) for name, how in ways.items()]
        return [usual, *each]

    def verdicts(self, results: Results) -> list[Verdict]:
        return [results.within(v.name, OURS, _NATS) for v in results.variants if v.against]
