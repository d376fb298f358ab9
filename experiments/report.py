"""results/SCALE/NAME/REPORT.md and its figures, from rows alone: the same bytes every time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from moepp_jax import flops, markdown
from moepp_jax.analysis import drawing
from moepp_jax.config import Config
from moepp_jax.experiments import compiled, gain, measure, runs, study
from moepp_jax.experiments.results import RESULTS, Row
from moepp_jax.experiments.scale import Scale
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
    said = of.verdicts(found)
    lines = [f"# {of.title}", "", f"    {command(of, found.scale)}", ""]
    for name, text in of.sections().items():
        lines += [f"**{name}.** {text}", ""]
    lines += [f"**Verdict: the claim {study.outcome(said)}.**", ""]
    lines += [f"- {v.said}: {v.outcome}" for v in said]
    if found.variants:
        lines += ["", *table(found), "", *_notes(found)]
    lines += [""]
    if _compares(found):
        lines += [f"![{of.title}](figure.png)", ""]
    lines += [*of.more(found), *_compiled(found, compiled_for)]
    lines += [*_missing(of, found), *_diverged(found), *_made(found)]
    return "\n".join(lines).rstrip() + "\n"


def command(of: Study, scale: Scale) -> str:
    return f"python -m experiments.run {of.name} --scale={scale.name}"


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
            gained = str(gain.gain(curve, loss, mean["realised_flops"]))
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
    """Whether the vanilla curve of the usual size is the one to compare with.

    How constant experts begin does not tell: a vanilla MoE has none.
    """
    model = dataclasses.replace(config.model, const_std=usual.model.const_std)
    return model == usual.model and config.moe.ffn_size == usual.moe.ffn_size


def _notes(found: Results) -> list[str]:
    """What the table's columns are."""
    config = found.variants[0].config
    total, active = flops.parameters(config)
    return [
        f"Means over seeds, with standard errors. Differences{_to(found)} are paired by seed (the "
        "same rows of text in",
        "the same order, the same initial values of what both have), in brackets their 95 % "
        "interval (Student's t). Held-out",
        "loss is in nats a token, over all held-out text; FFN experts a token there. Training "
        "FLOPs are forward",
        "and backward, with the FFN experts that tokens had in training. Compute gain: the "
        "training FLOPs that the",
        "vanilla MoE of the usual size would need for this loss, by its fitted curve (the "
        "experiment `scaling`), over",
        "those used; in brackets 95 % of what its seeds, its distance from its own points and the "
        "variant's seeds",
        "leave open. Drops are of the last fifth of training.",
        "Seconds a step are of each run's own minutes, in which the machine may have had other "
        "work, and on the cores",
        "it was given: times that can be compared are those of the experiment `throughput`.",
        "",
        f"{found.variants[0].name}: {total / 1e6:.3g} M parameters, {active / 1e6:.3g} M active a "
        f"token at most; {config.train.steps:,} steps of {config.batch_tokens:,} tokens.",
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
    head = f"What has no row yet, and `{command(of, found.scale)}` makes:"
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
        said = of.verdicts(found)
        known = [v.said for v in said if v.outcome != study.MISSING]
        if known:
            there = f"experiments/results/{scale.name}/{of.name}/REPORT.md"
            answer = f"{study.outcome(said)}: {'; '.join(known[:2])}"
            answers.append([f"[{of.title}]({there})", answer])
    figure = f"experiments/results/{scale.name}/{SHOWN}/figure.png"
    lines = [BEGIN, "", *markdown.table(["question", "what the runs say"], answers)]
    lines += ["", f"![{study.find(SHOWN).title}]({figure})", "", END]
    return before + "\n".join(lines) + after


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
        verdict = study.outcome(of.verdicts(found))
        told = [f"[{of.name}]({of.name}/REPORT.md)", of.title, verdict]
        answers.append([*told, f"{done} of {len(wanted)}", measured_too])
    lines = [f"# Experiments at scale {scale.name}", "", *markdown.table(head, answers)]
    others = [row for row in rows if row.fingerprint not in known]
    if others:
        lines += ["", "Rows of other code or configurations, which no table has:", ""]
        lines += [f"- {r.fingerprint}, seed {r.seed}: {r.changes or 'MoE++'}" for r in others]
    hours = sum(row.seconds for row in rows) / 3600
    lines += ["", f"{len(rows)} runs, {hours:.1f} hours; rows in `runs.csv`."]
    return "\n".join(lines) + "\n"
