"""How long is a training step, part by part, by what the compiler schedules?

Question  where the time of the paper's models goes on TPU v5p that need not be there, MoE++ and
          vanilla: each size at each tau, and the 7B from 8 to 4,096 chips.
Paper     section 3.4: FFN experts take tau N_FFN / (tau N_FFN + N_ZC) of a vanilla MoE's time;
          table 3 measures expert forward alone, and says nothing of a whole step.
Claim     the 7B's experts follow that theory within 3 % at every tau, and at tau = 0.75 a whole
          step is faster than the vanilla one by at least a third of what the experts are.
Refuted   if either is not so with links at their peak.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from moepp_jax import compile, flops, markdown
from moepp_jax.chips import GIB
from moepp_jax.compile import choice, parts
from moepp_jax.compile.topology import Topology, devices
from moepp_jax.config import Config
from moepp_jax.experiments import figures
from moepp_jax.experiments.measure import Measurement
from moepp_jax.experiments.scale import MOEPP, PAPER, VANILLA, Scale, Variant
from moepp_jax.experiments.studies import pods
from moepp_jax.experiments.study import FAILS, HOLDS, MISSING, Results, Study, Verdict

TAUS = (0.1, 0.25, 0.5, 0.75, 1.0)
AT = "v5p:4x4x4"
USUAL = 0.75
_OTHERS = {"0.6B": "8+4", "1B": "16+4", "2B": "32+8"}
LARGEST = "16+4, larger"
_EXPERTS = {"7B": LARGEST} | _OTHERS
# What is spared where a token's choice costs nothing; all else is of every token.
_SPARED = (parts.DISPATCH, parts.EXPERTS, parts.COMBINE, parts.EXCHANGE)
_LEAST_SHARE, _MARGIN = 1 / 3, 0.03

# Of the parts, in their order.
COLORS = (*(f"C{number}" for number in range(10)), "0.25", "0.6")

Row = Mapping[str, float]


def named(model: str, tau: float | None, topology: str = AT) -> str:
    """Of a row; tau is None for the vanilla twin."""
    return f"{model}, {topology}, {'vanilla' if tau is None else f'tau {tau:g}'}"


class StepTime(Study):
    scales = (PAPER.name,)

    def variants(self, scale: Scale) -> list[Variant]:
        return []

    def measurements(self, scale: Scale) -> list[Measurement]:
        wanted = {}
        for model, size in _EXPERTS.items():
            for tau in (None, *TAUS):
                wanted[named(model, tau)] = config_of(scale, size, tau), AT
        for topology, lies in pods.SIZES.items():
            for tau in (None, USUAL):
                config = pods.on(config_of(scale, LARGEST, tau), lies)
                wanted.setdefault(named("7B", tau, topology), (config, topology))
        return [
            Measurement(name, None, functools.partial(predict_fastest, *what))
            for name, what in wanted.items()
        ]

    def verdicts(self, results: Results) -> list[Verdict]:
        rows = _rows(results)
        vanilla, usual = rows.get(named("7B", None)), rows.get(named("7B", USUAL))
        ours = {tau: rows[named("7B", tau)] for tau in TAUS if named("7B", tau) in rows}
        if vanilla is None or usual is None or len(ours) < len(TAUS):
            return [Verdict(MISSING, "some of the 7B's rows are not there yet")]
        ratios = {tau: _faster(vanilla, row, "experts") for tau, row in ours.items()}
        off = {tau: ratio / _theory(results.scale, "7B", tau) - 1 for tau, ratio in ratios.items()}
        said = ", ".join(f"{ratios[tau]:.2f} at {tau:g} ({off[tau]:+.1%})" for tau in TAUS)
        follows = max(map(abs, off.values())) <= _MARGIN
        step, experts = _faster(vanilla, usual, "step"), ratios[USUAL]
        share = (step - 1) / (experts - 1)
        told = f"a step at {USUAL:g} is {step:.2f} times as fast, {share:.0%} of the experts' gain"
        return [
            Verdict(HOLDS if follows else FAILS, f"experts, beside the theory: {said}"),
            Verdict(HOLDS if share >= _LEAST_SHARE else FAILS, told),
        ]

    def figure(self, results: Results) -> Figure:
        """The parts of a step of the 7B, stacked, and how its speed grows with chips."""
        rows = _rows(results)
        figure = figures.new(12, 5)
        stacked, grown = figure.subplots(1, 2, width_ratios=(3, 2))
        shown = [named("7B", tau) for tau in (None, *TAUS) if named("7B", tau) in rows]
        bottom = [0.0] * len(shown)
        for number, part in enumerate(parts.ALL):
            heights = [rows[name][column(part)] for name in shown]
            stacked.bar(shown, heights, bottom=bottom, label=part, color=COLORS[number], width=0.7)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        stacked.set_xticks(range(len(shown)), [name.rpartition(", ")[2] for name in shown])
        stacked.set(title=f"The 7B's step on {AT}, links at their peak", ylabel="ms, predicted")
        handles, labels = stacked.get_legend_handles_labels()
        stacked.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5))
        for tau, label in ((None, "vanilla"), (USUAL, "MoE++")):
            there = [(pods.SIZES[at].chips, rows[named("7B", tau, at)]) for at in _sizes(rows, tau)]
            chips = [n for n, _ in there]
            color = "C0" if tau is None else "C1"
            name = f"{label}, tau {tau:g}" if tau else label
            for end, style in zip(_ENDS, ("o-", "o--"), strict=True):
                mfu = [row[f"mfu_{end}"] for _, row in there]
                shown = name if end == "peak" else ""
                grown.plot(chips, mfu, style, markersize=4, color=color, label=shown)
        for style, said in (("-", "links at their peak"), ("--", "links at a quarter of it")):
            grown.plot([], [], style, color=figures.GREY, label=said)
        grown.set(title="The 7B, by chips", ylabel="MFU, predicted", ylim=(0, None))
        figures.by_chips(grown, [size.chips for size in pods.SIZES.values()])
        grown.grid(alpha=0.3)
        figures.legend(grown)
        return figure

    def more(self, results: Results) -> list[str]:
        rows = _rows(results)
        if not rows:
            return []
        at = [named("7B", tau) for tau in (None, *TAUS)]
        others = [named(model, tau) for model in _OTHERS for tau in (None, *TAUS)]
        usual = [named(model, tau) for model in _OTHERS for tau in (None, USUAL)]
        shown = [*at, *usual]
        grown = [named("7B", tau, size) for size in pods.SIZES for tau in (None, USUAL)]
        every = [*at, *others, *(name for name in grown if name not in at)]
        return [
            f"Each on {AT}, ms with links at their peak:",
            "",
            *markdown.table(["part", *map(_short, filter(rows.get, shown))], _by_part(rows, shown)),
            "",
            *markdown.table(["", *_COLUMNS], _totals(results.scale, rows, every)),
            "",
            _NOTES,
            "",
        ]


_NOTES = """\
Of two numbers the first is with links at their peak, the second with links at a quarter of it. The
speed-ups are over the vanilla row of the same model and slice, at most by the theory: if dispatch,
experts, combine and the exchange took no more than FFN experts' share of the vanilla row's, and all
else as long as there, zero-computation experts nothing. Nothing here ran on a TPU: the step is
compiled as far as its schedule, and the slowest of what each instruction needs is added up, as
`moepp compile --profile` does and says (docs/PODS.md). Each row has the `model.remat` that makes it
fastest of those that fit: what MoE++ need not hold for experts is held for backward. The batch is
the paper's 2,048 sequences, or one a chip where there are more chips.

The compiler of TPUs has to be there (`make pods` puts it beside the environment)."""
_COLUMNS = ("step, ms", "speed-up", "at most, peak links", "experts' speed-up", "tokens/s a chip")
_COLUMNS += (
    "MFU, nominal",
    "MFU, realised",
    "exchange in full, ms",
    "not hidden, ms",
    "GiB a chip",
    "`model.remat`",
)

# Of what a row may keep for backward, from most to least.
POLICIES = ("none", "qkv", "residual", "w_in", "attention", "exchanged")


def config_of(
    scale: Scale, size: str, tau: float | None, changes: Mapping[str, Any] | None = None
) -> Config:
    """Of a size of the scale; tau is None for the vanilla twin."""
    fields = ({} if tau is None else {"moe.rule.tau": tau}) | dict(changes or {})
    kind = VANILLA if tau is None else MOEPP
    return scale.variant("", kind, fields, of=scale.sizes[size]).config


def _theory(scale: Scale, model: str, tau: float) -> float:
    """How much faster the experts are than the vanilla twin's (paper, section 3.4)."""
    ours, vanilla = (config_of(scale, _EXPERTS[model], t) for t in (tau, None))
    return 1 / flops.cost_ratio(ours, vanilla)


def _at_most(vanilla: Row, theory: float) -> float:
    """A step's speed-up if all that is spared is spared in full, with links at their peak."""
    step = vanilla["predicted_ms_peak"]
    spared = sum(vanilla[column(part)] for part in _SPARED) * (1 - 1 / theory)
    return step / (step - spared) if spared < step else math.inf


def predict(config: Config, text: str, folder: Path | None) -> Row:
    """What a step takes on a topology, and of a chip's memory, as a row."""
    return _row(_examine(config, text))


def predict_fastest(config: Config, text: str, folder: Path | None) -> Row:
    """As `predict`, with what of `POLICIES` makes the step fastest."""
    chosen, found = choice.fastest(config, lambda c: _examine(c, text), POLICIES)
    return _row(found) | {f"remat_{p}": float(p == chosen.model.remat) for p in POLICIES}


def _examine(config: Config, text: str) -> Mapping[str, Any]:
    topology = Topology.parse(text)
    return compile.examine(config, devices(topology), topology, profiled="fast")


def _row(found: Mapping[str, Any]) -> Row:
    values = {"fits": float(found["fits"]), "hbm_gib": found["hbm_bytes"] / GIB}
    if "parts_ms" not in found:
        return values
    values |= {column(part): ms[0] for part, ms in found["parts_ms"].items()}
    slow = {part: found["parts_ms"][part][1] for part in (parts.EXCHANGE, parts.COLLECTIVES)}
    values |= {f"{column(part)}_slow": ms for part, ms in slow.items()}
    for name in ("predicted_ms", "exchange_ms", "tokens_per_second_per_chip", "mfu_realised"):
        values |= {f"{name}_{end}": ms for end, ms in zip(_ENDS, found[name], strict=True)}
    values |= {f"mfu_{end}": mfu for end, mfu in zip(_ENDS, found["mfu_nominal"], strict=True)}
    return values | {"kernels_not_estimated": float(sum(found["not_estimated"].values()))}


_ENDS = ("peak", "slow")


def column(part: str) -> str:
    """Of a part, in a row."""
    return f"{part.replace(' ', '_')}_ms"


def _faster(vanilla: Row, row: Row, what: str, end: str = "peak") -> float:
    name = f"predicted_ms_{end}" if what == "step" else column(what)
    return vanilla[name] / row[name]


def _rows(results: Results) -> dict[str, Row]:
    """What was found of those that fit, by name."""
    return {row.name: row.values for row in results.measured if row.values["fits"]}


def _sizes(rows: Mapping[str, Row], tau: float | None) -> list[str]:
    return [at for at in pods.SIZES if named("7B", tau, at) in rows]


def _short(name: str) -> str:
    model, _, which = name.split(", ")
    return f"{model}, {which}"


def _by_part(rows: Mapping[str, Row], names: list[str]) -> list[list[str]]:
    shown = [rows[name] for name in names if name in rows]
    return [[part, *(f"{row[column(part)]:,.1f}" for row in shown)] for part in parts.ALL]


def _totals(scale: Scale, rows: Mapping[str, Row], names: list[str]) -> list[list[str]]:
    lines = []
    for name in names:
        if name not in rows:
            continue
        row, model_at = rows[name], name.rpartition(", ")[0]
        vanilla = rows.get(f"{model_at}, vanilla")

        def ends(column: str, form: str, row: Row = row) -> str:
            return " to ".join(format(row[f"{column}_{end}"], form) for end in _ENDS)

        faster, most, experts = "", "", ""
        if vanilla and vanilla is not row:
            model, _, tau = name.split(", ")
            most = (
                f"{_at_most(vanilla, _theory(scale, model, float(tau.removeprefix('tau ')))):.2f}"
            )
            faster = " to ".join(f"{_faster(vanilla, row, 'step', end):.2f}" for end in _ENDS)
            experts = f"{_faster(vanilla, row, 'experts'):.2f}"
        hidden = column(parts.EXCHANGE)
        lines.append(
            [
                name,
                ends("predicted_ms", ",.0f"),
                faster,
                most,
                experts,
                ends("tokens_per_second_per_chip", ",.0f"),
                ends("mfu", ".1%"),
                ends("mfu_realised", ".1%"),
                ends("exchange_ms", ",.1f"),
                f"{row[hidden]:,.1f} to {row[f'{hidden}_slow']:,.1f}",
                f"{row['hbm_gib']:.1f}",
                next((p for p in POLICIES if row.get(f"remat_{p}")), ""),
            ]
        )
    return lines
