"""What does a capacity drop, where, and what does that cost?

Question  held-out loss and dropped choices of MoE++ and its vanilla twin with a capacity factor of
          1.1 and 1.5, over groups of one and of eight sequences, and dropless; evaluation is
          dropless.
Paper     trains with gamma = 1.1; over how many tokens, and what it drops, is not stated.
Claim     MoE++ has the lower held-out loss dropless, and with eight sequences to a group it still
          has at gamma = 1.1; groups of eight lose less to drops than groups of one.
Refuted   if the interval of one of these paired differences is above 0.
"""

from __future__ import annotations

import dataclasses

from moepp_jax import flops, markdown
from moepp_jax.experiments import gain
from moepp_jax.experiments.scale import MOEPP, VANILLA, Scale, Variant
from moepp_jax.experiments.study import Results, Study, Verdict

NAMES = {MOEPP: "MoE++", VANILLA: "vanilla"}
DROPLESS = "dropless"


def _how(gamma: float, sequences: int) -> str:
    return f"gamma {gamma:g}, {sequences} a group"


class Capacity(Study):
    def variants(self, scale: Scale) -> list[Variant]:
        length = scale.recipe().data.seq_len
        ways = {DROPLESS: {"moe.dispatch": "dropless"}}
        for gamma in (1.1, 1.5):
            for sequences in (1, 8):
                ways[_how(gamma, sequences)] = {
                    "moe.dispatch": "capacity",
                    "moe.gamma": gamma,
                    "moe.group_size": sequences * length,
                }
        balanced = {"moe.rule.balance_weight": 0.04}
        ways[f"{_how(1.1, 8)}, balance .04"] = ways[_how(1.1, 8)] | balanced
        found = []
        for how, fields in ways.items():
            vanilla = f"vanilla, {how}"
            found.append(scale.variant(vanilla, VANILLA, fields))
            found.append(scale.variant(f"MoE++, {how}", MOEPP, fields, against=vanilla))
        return found

    def verdicts(self, results: Results) -> list[Verdict]:
        eight, one = _how(1.1, 8), _how(1.1, 1)
        return [
            *(results.below(f"MoE++, {how}", f"vanilla, {how}") for how in (DROPLESS, eight)),
            *(results.below(f"{name}, {eight}", f"{name}, {one}") for name in NAMES.values()),
        ]

    def more(self, results: Results) -> list[str]:
        head = ["variant", "drops", "of the worst eighth of a sequence", "costs, to dropless"]
        head += ["FFN experts computed", "compute gain with them"]
        lines = []
        for v in results.variants:
            if not results.rows(v.name):
                continue
            kind = v.name.partition(",")[0]
            d = results.difference(v.name, f"{kind}, {DROPLESS}")
            drops, worst = (results.mean(v.name, c).value for c in ("drop_rate", "worst_eighth"))
            cost = "" if d is None or v.name.endswith(DROPLESS) else f"{d.value:+.4f}"
            lines.append([v.name, f"{drops:.1%}", f"{worst:.1%}", cost, *_computed(results, v)])
        said = (
            "Drops are of the last fifth of training, costs in nats a token. FFN experts computed "
            "are those a token in training whether or not a token filled the slot; dropless "
            "dispatch computes no empty ones."
        )
        return [said, "", *markdown.table(head, lines), ""]


def _computed(results: Results, variant: Variant) -> list[str]:
    """FFN experts a token with empty slots, and the compute gain if those count too."""
    config, rows = variant.config, results.rows(variant.name)
    if config.moe.dispatch != "capacity":
        experts = results.mean(variant.name, "training_ffn_experts").value
    else:
        experts = flops.executed_ffn_experts(config)
        train = flops.per_token(config, experts).train
        rows = [dataclasses.replace(r, realised_flops=r.tokens * train) for r in rows]
    gained = results.curve and gain.gain(results.curve, rows)
    return [f"{experts:.3f}", str(gained or "")]
