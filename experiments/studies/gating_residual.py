"""Do gating residuals help, and would they help a vanilla MoE too?

Question  held-out loss of MoE++ with gating residuals, without them, and with no gradient through
          them; and of the vanilla MoE with and without, which reviewers asked for.
Paper     1B, average of seven tasks: 47.7 with, 47.5 without. Whether its vanilla baselines have
          them is not stated.
Claim     MoE++ has a lower held-out loss with gating residuals than without, and a vanilla MoE that
          is given them stays above MoE++.
Refuted   if the interval of one of these paired differences is above 0.
"""

from __future__ import annotations

from experiments.scale import VANILLA, Scale, Variant
from experiments.study import Results, Study, Verdict


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
        ]
