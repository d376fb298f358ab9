"""Is MoE++ better than a vanilla MoE with as many FFN experts, in each of the paper's pools?

Question  held-out loss of MoE++ and of its vanilla twin, trained on the same rows: 8, 16 and 32 FFN
          experts at one width, and 16 in a larger model.
Paper     table 3, 100 B tokens, average of nine tasks: 45.6 (vanilla 44.3) with 8+4 experts, 46.1
          (45.3) with 16+4, 47.3 (45.9) with 32+8, 53.1 (52.3) of the 7B.
Claim     MoE++ has the lower held-out loss in every pool, with fewer FFN experts a token.
Refuted   in a pool where the 95 % interval of the paired difference is above 0.
"""

from __future__ import annotations

from moepp_jax.experiments.scale import VANILLA, Scale, Variant
from moepp_jax.experiments.study import Results, Study, Verdict


class MoEVsMoEPP(Study):
    def variants(self, scale: Scale) -> list[Variant]:
        found = []
        for number, (size, recipe) in enumerate(scale.sizes.items()):
            # The default pool is the baseline of most experiments.
            seeds = 5 if number == 0 and scale.seeds > 1 else None
            pool, _, rest = size.partition(",")
            vanilla = f"vanilla {pool.partition('+')[0]}{',' + rest if rest else ''}"
            found.append(scale.variant(vanilla, VANILLA, of=recipe, seeds=seeds))
            found.append(scale.variant(f"MoE++ {size}", of=recipe, seeds=seeds, against=vanilla))
        return found

    def verdicts(self, results: Results) -> list[Verdict]:
        found = [results.below(v.name, v.against) for v in results.variants if v.against]
        return [*found, *(_fewer_experts(results, v) for v in results.variants if v.against)]


def _fewer_experts(results: Results, variant: Variant) -> Verdict:
    ours, theirs = (
        {row.seed: row.ffn_experts for row in results.rows(name)}
        for name in (variant.name, variant.against)
    )
    more = {seed: ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()}
    what = f"FFN experts a token, {variant.name} less {variant.against}"
    return results.measured_below(more, 0.0, what, variant.name, variant.against)
