"""Which routing rule makes the most of its computation?

Question  held-out loss of every rule's recipe (configs/routing) in the place of MoE++'s, at equal
          tokens; and at equal training FLOPs, steps being fewer where a token costs more than with
          MoE++ when both are at balance. No rule was tuned: all have MoE++'s learning rate.
Paper     compares with a vanilla top-2 MoE alone.
Claim     at equal training FLOPs every rule has a higher held-out loss than MoE++.
Refuted   if the interval of a rule's paired difference to MoE++ is below 0.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from moepp_jax import flops
from moepp_jax.experiments import figures
from moepp_jax.experiments.scale import Scale, Variant, rule_names
from moepp_jax.experiments.study import Results, Study, Verdict

_EQUAL = ", equal FLOPs"


class RoutingRules(Study):
    def variants(self, scale: Scale) -> list[Variant]:
        ours = scale.variant("MoE++")
        each = [scale.routed_by(name, against="MoE++") for name in rule_names()]
        shorter = [_shortened(v, ours) for v in each]
        return [ours, *each, *(v for v in shorter if v is not None)]

    def verdicts(self, results: Results) -> list[Verdict]:
        names = {v.name for v in results.variants}
        rules = [name + _EQUAL if name + _EQUAL in names else name for name in rule_names()]
        return [results.below("MoE++", name) for name in rules]

    def figure(self, results: Results) -> Figure:
        figure = figures.new(8, 5)
        axes = figure.subplots()
        names = [v.name for v in results.variants if results.rows(v.name)]
        points = {
            name: (results.mean(name, "realised_flops").value, results.mean(name).value)
            for name in names
        }
        for name, short in ((n, n + _EQUAL) for n in points if n + _EQUAL in points):
            axes.plot(*zip(points[name], points[short], strict=True), color="C0", lw=0.8, alpha=0.5)
        for name, (x, y) in points.items():
            color = "C1" if name == "MoE++" else "C0"
            face = "none" if name.endswith(_EQUAL) else color
            axes.plot(x, y, "o", color=color, mfc=face, ms=7)
        shown = {name: point for name, point in points.items() if not name.endswith(_EQUAL)}
        axes.plot([], [], "o", color="C0", mfc="none", label="steps for equal training FLOPs")
        axes.set(xlabel="training FLOPs", ylabel="held-out loss, nats a token")
        axes.grid(alpha=0.3)
        figures.legend(axes)
        figures.labelled(axes, shown)
        return figure

    def more(self, results: Results) -> list[str]:
        ours = results.mean("MoE++", "realised_flops")
        short = [
            v.name for v in results.variants if v.name.endswith(_EQUAL) and results.rows(v.name)
        ]
        if ours is None or not short:
            return []
        realised = {name: results.mean(name, "realised_flops").value / ours.value for name in short}
        said = ", ".join(f"{n.removesuffix(_EQUAL)} {ratio:.2f}" for n, ratio in realised.items())
        return [
            "Training FLOPs are equal where each rule has as many FFN experts as at its balance; "
            f"those that it had took, over MoE++'s: {said}. The rule vanilla has Switch's loss as "
            "configs/routing has it, not the twin's of other experiments.",
            "",
        ]


def _shortened(variant: Variant, ours: Variant) -> Variant | None:
    """Trained for so many steps that it costs what ours does, each rule being at its balance.

    None of one that costs the same in as many steps.
    """
    ratio = flops.per_token(ours.config).train / flops.per_token(variant.config).train
    steps = round(variant.config.train.steps * ratio)
    if steps == variant.config.train.steps:
        return None
    config = variant.config.replace("train", steps=steps, eval_every=steps)
    return variant._replace(name=f"{variant.name}{_EQUAL}", config=config)
