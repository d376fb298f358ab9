"""Which of the zero, copy and constant experts does it take?

Question  held-out loss with each of the eight combinations of the three kinds of zero-computation
          experts; none of them is a vanilla MoE with gating residuals.
Paper     1B, average of seven tasks: none 46.6; zero 47.0, copy 47.2, constant 47.4; zero and copy
          47.2, zero and constant 47.3, copy and constant 47.5; all 47.7.
Claim     all three kinds together have a lower held-out loss than none, and than any one alone.
Refuted   if the interval of one of these paired differences is above 0.
"""

from __future__ import annotations

from moepp_jax import markdown
from moepp_jax.experiments.scale import Scale, Variant
from moepp_jax.experiments.study import Results, Study, Verdict

NONE, ALL = "none", "zero, copy and constant"
_KINDS = {
    NONE: (0, 0, 0),
    "zero": (1, 0, 0),
    "copy": (0, 1, 0),
    "constant": (0, 0, 1),
    "zero and copy": (1, 1, 0),
    "zero and constant": (1, 0, 1),
    "copy and constant": (0, 1, 1),
    ALL: (1, 1, 1),
}


class ExpertKinds(Study):
    def variants(self, scale: Scale) -> list[Variant]:
        usual = scale.recipe().moe
        counts = (usual.n_zero, usual.n_copy, usual.n_const)
        found = []
        for name, has in _KINDS.items():
            pool = zip(("n_zero", "n_copy", "n_const"), counts, has, strict=True)
            fields = {f"moe.{kind}": count * there for kind, count, there in pool}
            if name == NONE:
                fields["moe.rule.tau"] = 1.0  # all its experts are FFN experts
            against = "" if name == NONE else NONE
            found.append(scale.variant(name, fields=fields, against=against))
        return found

    def verdicts(self, results: Results) -> list[Verdict]:
        alone = ("zero", "copy", "constant")
        return [results.below(ALL, other) for other in (NONE, *alone)]

    def more(self, results: Results) -> list[str]:
        lines = [
            [v.name, f"{d.value:+.4f} [{d.low:+.4f}, {d.high:+.4f}]"]
            for v in results.variants
            if v.name != ALL and (d := results.difference(v.name, ALL)) and d.count > 1
        ]
        if not lines:
            return []
        return [*markdown.table(["variant", f"held-out loss less that of {ALL}"], lines), ""]
