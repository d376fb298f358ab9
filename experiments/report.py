"""results/SCALE/NAME/REPORT.md and its figures, from rows alone: the same bytes every time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from moepp_jax import flops, markdown
from moepp_jax.analysis import drawing
from moepp_jax.config import Config
from moepp_jax.experiments import compiled, gain, measure, runs, stats, study
from moepp_jax.experiments.results import RESULTS, Row
from moepp_jax.experiments.scale import Scale, Variant
from moepp_jax.experiments.study import Results, Study
from moepp_jax.storage import write_atomic

README = "README.md"
# What stands between these in the project's README is made of rows.
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
SHOWN = "moe_vs_moepp"  # the experiment whose figure is there
_MEANS = ("eval_loss", "bits_per_byte", "ffn_experts", "realised_flops", "drop_rate")
_MEANS += ("step_seconds",)


def write(
    of: Study,
    scale: Scale,
    rows: Sequence[Row],
    results: Path = RESULTS,
    seeds: int | None = None,
) -> Path:
    """The report's file, written with its figures.

    Args:
      seeds: instead of each variant's own number.
    """
    folder = results / scale.name / of.name
    folder.mkdir(parents=True, exist_ok=True)
    found = study.results_of(of, scale, rows, measured(of, scale, results), seeds)
    for kind in drawing.FORMATS:
        file = folder / f"figure.{kind}"
        if _compares(found):
            write_atomic(file, drawing.drawn(of.figure(found), kind))
        else:
            file.unlink(missing_ok=True)
    compiled_for = compiled.read(scale.name, results)
    write_atomic(folder / "REPORT.md", page(of, found, compiled_for))
    return folder / "REPORT.md"


def measured(of: Study, scale: Scale, results: Path) -> list[measure.Measured]:
    """What the experiment measured beside training."""
    return measure.read(measure.file_of(scale.name, of.name, results))


def _compares(found: Results) -> bool:
    """Whether there is anything to draw: measurements, or two variants."""
    return bool(found.measured) or sum(bool(found.rows(v.name)) for v in found.variants) > 1


def page(of: Study, found: Results, compiled_for: Sequence[measure.Measured] = ()) -> str:
    """REPORT.md.

    Args:
      compiled_for: rows of `experiments.compiled`, other experiments' too.
    """
    said = of.judged(found)
    lines = [f"# {of.title}", "", f"    {command(of, found)}", ""]
    for name, text in of.sections().items():
        lines += [f"**{name}.** {text}", ""]
    lines += [f"**Verdict: the claim {study.outcome(said)}.**", ""]
    lines += [f"- {v.said}: {v.outcome}" for v in said]
    if (parts := sum(v.p is not None for v in said)) > 1:
        lines += ["", _PARTS.format(parts=parts, percent=100 * (1 - stats.CONFIDENCE) / parts)]
    if found.variants:
        lines += ["", *table(found), "", *_notes(found), *_differences(found)]
    lines += [""]
    if _compares(found):
        lines += [f"![{of.title}](figure.png)", ""]
    lines += [*of.more(found), *_compiled(found, compiled_for)]
    lines += [*_missing(of, found), *_diverged(found), *_made(found)]
    return "\n".join(lines).rstrip() + "\n"


_PARTS = (
    "Of {parts} parts one can look refuted by chance: a part does not hold where numbers like "
    "these had a probability of at most {percent:.2g} % at its bound."
)


def command(of: Study, found: Results) -> str:
    text = f"python -m experiments.run {of.name} --scale={found.scale.name}"
    return text if found.asked is None else f"{text} --seeds={found.asked}"


def table(found: Results) -> list[str]:
    """A line a variant: means over seeds."""
    curve = found.curve
    usual = Config.parse(found.scale.recipe())
    head = ["variant", "held-out loss", "difference", "bits a byte", "FFN experts"]
    head += ["training FLOPs", "compute gain", "drops", "s a step", "seeds"]
    lines = []
    for variant in found.variants:
        name = variant.name
        rows = found.rows(name)
        if not rows:
            lines.append([name, *[""] * (len(head) - 2), f"0 of {variant.seeds}"])
            continue
        mean = {column: found.mean(name, column).value for column in _MEANS}
        loss = found.mean(name)
        gained = ""
        if curve and _same_shape(variant.config, usual):
            gained = str(gain.gain(curve, rows) or "")
        cells = [
            name,
            f"{loss.value:.4f}" + ("" if math.isnan(loss.error) else f" ± {loss.error:.4f}"),
            _difference(found, name),
            f"{mean['bits_per_byte']:.4f}",
            f"{mean['ffn_experts']:.3f}",
            f"{mean['realised_flops']:.3g}",
            gained,
            f"{mean['drop_rate']:.1%}",
            f"{mean['step_seconds']:.3g}",
            f"{len(rows)} of {variant.seeds}",
        ]
        lines.append(cells)
    return [*markdown.table(head, lines), *_by_source(found)]


def _by_source(found: Results) -> list[str]:
    """The held-out loss of every source, where there are several."""
    each = {
        v.name: [row.by_source for row in found.rows(v.name)]
        for v in found.variants
        if found.rows(v.name)
    }
    names = list(dict.fromkeys(name for rows in each.values() for row in rows for name in row))
    if len(names) < 2:
        return []
    head = ["held-out loss of", *names]
    lines = []
    for variant, rows in each.items():
        means = [f"{sum(row[name] for row in rows) / len(rows):.4f}" for name in names]
        lines.append([variant, *means])
    return ["", *markdown.table(head, lines)]


def _difference(found: Results, name: str) -> str:
    d = found.difference(name)
    if d is None:
        return ""
    against = dict.fromkeys(v.against for v in found.variants if v.against)
    to = f" to {found.against(name)}" if len(against) > 1 else ""
    if d.count == 1:
        return f"{d.value:+.4f}{to}"
    return f"{d.value:+.4f} [{d.low:+.4f}, {d.high:+.4f}]{to}"


def _same_shape(config: Config, usual: Config) -> bool:
    """Whether the vanilla curve of the usual size is the one to compare with: that of its depth and
    width.

    How constant experts begin does not tell: a vanilla MoE has none.
    """
    return usual.model == dataclasses.replace(config.model, const_std=usual.model.const_std)


def _notes(found: Results) -> list[str]:
    """What the table's columns are."""
    return [
        f"Means over seeds, with standard errors. Differences{_to(found)} are paired by seed (the "
        "same rows of text in",
        "the same order, the same initial values of what both have), in brackets their 95 % "
        "interval (Student's t). Held-out",
        "loss is in nats a token, over all held-out text; FFN experts a token there. Training "
        "FLOPs are forward and",
        "backward, with the FFN experts that tokens had in training; capacity's empty slots are "
        "not in them. Compute gain:",
        "the training FLOPs that the vanilla MoE of the usual size and pool would need for this "
        "loss, between its runs of",
        "several lengths (the experiment `scaling`), over those used, seed by seed; at least or at "
        "most, if none of those runs",
        "ended as low or as high; none of models of another width or depth. Drops are of the last "
        "fifth of training.",
        "Seconds a step are of each run's own minutes, in which the machine may have had other "
        "work, and on the cores",
        "it was given: times that can be compared are those of the experiment `throughput`.",
        "",
        *_sizes(found),
    ]


def _sizes(found: Results) -> list[str]:
    """Parameters and length of training, once for all variants that have the same."""
    alike: dict[tuple[int, int], list[Variant]] = {}
    for variant in found.variants:
        alike.setdefault(flops.parameters(variant.config), []).append(variant)
    lines = []
    for (total, active), variants in alike.items():
        first, *others = variants
        also = f" and {len(others)} more variants" if others else ""
        steps = sorted({v.config.train.steps for v in variants})
        lines.append(
            f"- {first.name}{also}: {total / 1e6:.3g} M parameters, {active / 1e6:.3g} M active a "
            f"token at most; {', '.join(f'{n:,}' for n in steps)} steps of "
            f"{first.config.batch_tokens:,} tokens"
        )
    return lines


def _differences(found: Results) -> list[str]:
    """Those that seeds tell apart, whether or not the claim is of them."""
    each = {v.name: d for v in found.variants if (d := found.difference(v.name)) and d.count > 1}
    if len(each) < 2:
        return []
    clear = [name for name, d in each.items() if d.low > 0 or d.high < 0]
    lines = [
        "",
        f"Of the {len(each)} differences in the table these leave out 0, where one in twenty does "
        f"by chance: {_named(found, clear)}.",
    ]
    alike = _alike(found)
    pooled = stats.pooled([{r.seed: r.eval_loss for r in found.rows(name)} for name in alike])
    if pooled is not None:
        beyond = [n for n in alike if n in each and abs(each[n].value) > pooled.half]
        lines += [
            "",
            f"If the {len(alike)} variants of one size and length scatter alike, a standard "
            f"deviation of {pooled.deviation:.3f} nats with {pooled.freedom} degrees of freedom, a "
            f"difference is known to ±{pooled.half:.3f}. Beyond that: {_named(found, beyond)}. No "
            "verdict hangs on this.",
        ]
    return lines


def _named(found: Results, names: Sequence[str]) -> str:
    return ", ".join(f"{n} {found.difference(n).value:+.3f}" for n in names) or "none"


def _alike(found: Results) -> list[str]:
    """Variants as long as the first with as large a model, of which no run is missing."""
    first = found.variants[0].config
    return [
        v.name
        for v in found.variants
        if v.config.train.steps == first.train.steps
        and _same_shape(v.config, first)
        and len(found.rows(v.name)) == v.seeds
    ]


def _to(found: Results) -> str:
    """Whose differences they are, if all are to the same variant."""
    against = list(dict.fromkeys(v.against for v in found.variants if v.against))
    return f" to {against[0]}" if len(against) == 1 else ""


def _compiled(found: Results, rows: Sequence[measure.Measured]) -> list[str]:
    """What the runs need of devices that they were compiled for."""
    named = {runs.fingerprint(v.config): v.name for v in found.variants}
    if not any(row.fingerprint in named for row in rows):
        return []
    said = "Compiled for devices that need not be there; the hours of a run are at least:"
    return [said, "", *compiled.table(rows, named), ""]


def _missing(of: Study, found: Results) -> list[str]:
    lines = []
    for v in found.variants:
        there = {row.seed for row in found.by_variant[v.name]}
        seeds = [str(s) for s in range(v.seeds) if s not in there]
        if seeds:
            lines.append(f"- {v.name}: seed {', '.join(seeds)}")
    left = measure.missing(of.measurements(found.scale), found.measured)
    if left:
        lines.append(f"- measurements: {', '.join(dict.fromkeys(one.name for one in left))}")
    if not lines:
        return []
    head = f"What has no row yet, and `{command(of, found)}` makes:"
    return [head, "", *lines, ""]


def _diverged(found: Results) -> list[str]:
    lines = [
        f"- {name}, seed {row.seed}, after {row.tokens:,} tokens"
        for name, rows in found.by_variant.items()
        for row in rows
        if not row.done
    ]
    return ["Runs that diverged, which no mean has:", "", *lines, ""] if lines else []


def _made(found: Results) -> list[str]:
    """The machines."""
    rows = [row for rows in found.by_variant.values() for row in rows]
    machines = sorted({row.machine for row in (*rows, *found.measured)})
    if not machines:
        return []
    said = f"Machine: {'; '.join(machines)}. Numerics {runs.NUMERICS}."
    hours = sum(row.seconds for row in rows) / 3600
    return [said + (f" These {len(rows)} runs took {hours:.2f} hours." if rows else "")]


def in_readme(text: str, scale: Scale, rows: Sequence[Row], results: Path = RESULTS) -> str:
    """The project's README with the results between its two marks as the rows have them.

    Raises:
      ValueError: the marks are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there is no {BEGIN} with an {END} after it")
    answers = []
    for of in study.at(scale):
        found = study.results_of(of, scale, rows, measured(of, scale, results))
        said = of.judged(found)
        if any(v.outcome != study.MISSING for v in said):
            there = f"experiments/results/{scale.name}/{of.name}/REPORT.md"
            answers.append([f"[{of.title}]({there})", answer(said)])
    figure = f"experiments/results/{scale.name}/{SHOWN}/figure.png"
    lines = [BEGIN, "", *markdown.table(["question", "what the runs say"], answers)]
    lines += ["", f"![{study.find(SHOWN).title}]({figure})", "", END]
    return before + "\n".join(lines) + after


def answer(said: Sequence[study.Verdict]) -> str:
    """The outcome of a claim, and the first of the parts that decide it."""
    outcome = study.outcome(said)
    deciding = [v.said for v in said if v.outcome == outcome]
    if len(said) == 1:
        return f"**{outcome}**: {deciding[0]}"
    holding = sum(v.outcome == study.HOLDS for v in said)
    parts = f"{len(said)} parts" if holding == len(said) else f"{holding} of {len(said)} parts hold"
    return f"**{outcome}** ({parts}): {'' if len(deciding) == 1 else 'among others, '}{deciding[0]}"


def overview(scale: Scale, rows: Sequence[Row], results: Path = RESULTS) -> str:
    """README.md of a scale's results: each experiment's verdict, and rows that are in none."""
    head = ["experiment", "question", "verdict", "runs", "measurements"]
    answers = []
    known: set[str] = set()
    for of in study.at(scale):
        found = study.results_of(of, scale, rows, measured(of, scale, results))
        wanted = runs.plan(found.variants)
        known |= {run.key[0] for run in wanted}
        done = len(wanted) - len(runs.missing(wanted, (row.key for row in rows)))
        measured_too = f"{len(found.measured)} of {len(of.measurements(scale))}"
        verdict = study.outcome(of.judged(found))
        told = [f"[{of.name}]({of.name}/REPORT.md)", of.title, verdict]
        answers.append([*told, f"{done} of {len(wanted)}", measured_too])
    lines = [f"# Experiments at scale {scale.name}", "", *markdown.table(head, answers)]
    others = [row for row in rows if row.fingerprint not in known]
    if others:
        lines += ["", "Rows of other code or configurations, which no table has:", ""]
        lines += [f"- {r.fingerprint}, seed {r.seed}: {r.changes or 'MoE++'}" for r in others]
    hours = sum(row.seconds for row in rows) / 3600
    if rows:
        lines += ["", f"{len(rows)} runs, {hours:.1f} hours; rows in `runs.csv`."]
    return "\n".join(lines) + "\n"
