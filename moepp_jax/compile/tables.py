"""What `compile` found, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from moepp_jax.chips import GIB
from moepp_jax.compile import choice, parts, profile


def show(report: dict[str, Any], console: Console) -> None:
    """Prints the tables, and last whether the step fits."""
    console.print(_step(report))
    console.print(_memory(report))
    if "flops" in report:
        console.print(_collectives(report))
        if report["exchanges"]:
            console.print(_exchanges(report))
        if report["kernels"]:
            show_kernels(report["kernels"], console)
        console.print(_bounds(report))
        if "roofline" in report:
            console.print(_roofline(report))
        if "parts_ms" in report:
            show_profile(report, console)
        if loops := report["loops_counted_once"]:
            said = f"{len(loops)} loops depend on data and are counted as one round: what is in"
            console.print(f"{said} them runs more often than the tables say.", soft_wrap=True)
    if "generation" in report:
        console.print(_generation(report))
    if "remat_choices" in report:
        console.print(_remat(report))
    sentences = (verdict(report), of_evaluation(report), of_generation(report), of_remat(report))
    for said in sentences:
        if said:
            console.print(said, highlight=False, soft_wrap=True, markup=False)


def show_profile(report: dict[str, Any], console: Console) -> None:
    """Prints what `profile.predict` found, and the limits of it."""
    console.print(_parts(report))
    console.print(_predicted(report))
    said = [f"{name}, {times:,} times" for name, times in report["not_estimated"].items()]
    if said:
        console.print(f"Kernels not estimated: {'; '.join(said)}.", soft_wrap=True)
    console.print(profile.LIMITS, highlight=False, soft_wrap=True)


def _parts(r: dict[str, Any]) -> Table:
    columns = ("part", "ms, links at peak", "at a quarter", "share", "bound by")
    table = _table("Predicted time of a step, by part", *columns)
    step, slow = r["predicted_ms"]
    for part, (low, high) in r["parts_ms"].items():
        if part == parts.EXCHANGE:
            full, longer = r["exchange_ms"]
            table.add_row("(exchange in full)", f"({full:,.1f})", f"({longer:,.1f})", "", "links")
        bound = r["bound_by"].get(part, "")
        table.add_row(part, f"{low:,.1f}", f"{high:,.1f}", f"{low / step:.1%}", bound)
    table.add_section()
    table.add_row("step", f"{step:,.1f}", f"{slow:,.1f}", "100.0%", "")
    return table


def _predicted(r: dict[str, Any]) -> Table:
    columns = ("links at peak", "at a quarter")
    table = _table("What follows, if nothing else gets in the way", "", *columns)
    table.add_row("step, s", *(f"{ms / 1e3:,.3f}" for ms in r["predicted_ms"]))
    table.add_row("tokens/s a chip", *(f"{n:,.0f}" for n in r["tokens_per_second_per_chip"]))
    table.add_row("MFU, nominal", *(f"{mfu:.1%}" for mfu in r["mfu_nominal"]))
    table.add_row("MFU, with the slots that stay empty", *(f"{m:.1%}" for m in r["mfu_realised"]))
    if twin := r.get("vanilla"):
        pairs = zip(twin["predicted_ms"], r["predicted_ms"], strict=True)
        kept = "" if twin["remat"] == r["remat"] else f", model.remat {twin['remat']}"
        label = f"speed-up over the vanilla twin{kept}"
        table.add_row(label, *(f"{a / b:.2f}" for a, b in pairs))
    if found := r.get("by_the_compiler"):
        table.add_section()
        for label, name in _BY_THE_COMPILER.items():
            table.add_row(f"by the compiler: {label}", f"{found[name]:,.1f}", "")
    return table


_BY_THE_COMPILER = {
    "optimal time of all instructions, each once, ms": "optimal_ms",
    "its cycles of products, loops counted, ms": "products_ms",
}


def _remat(r: dict[str, Any]) -> Table:
    columns = ("GiB a chip", "step, s", "at a quarter", "MFU, nominal", "")
    table = _table("Each model.remat, links at peak", "model.remat", *columns)
    for row in r["remat_choices"]:
        times = [f"{ms / 1e3:,.3f}" for ms in row.get("predicted_ms", ())] or ["", ""]
        mfu = f"{row['mfu_nominal'][0]:.1%}" if "mfu_nominal" in row else ""
        fits = "" if row["fits"] else "does not fit"
        table.add_row(row["remat"], f"{row['hbm_bytes'] / GIB:,.1f}", *times, mfu, fits)
    return table


def show_kernels(rows: Sequence[dict[str, Any]], console: Console) -> None:
    console.print(_kernels(rows))
    if unread := [
        f"{row['name']} ({row['times']:,} times)" for row in rows if row["flops"] is None
    ]:
        said = "Not counted, as the program does not tell what they compute"
        console.print(f"{said}: {', '.join(unread)}.", soft_wrap=True, markup=False)


def verdict(report: dict[str, Any]) -> str:
    """One sentence: does it fit, and if not, what would."""
    needed, limit = report["hbm_bytes"], report["hbm_limit_bytes"]
    if limit is None:
        return f"The step needs {_gib(needed)} a device; a CPU device has no limit of its own."
    if report["fits"]:
        fits = f"It fits: {_gib(needed)} of {_gib(limit)} a chip ({needed / limit:.0%})."
        return " ".join([fits, *_preallocated(report)])
    said = f"It does not fit: {_gib(needed)} or more a chip, which has {_gib(limit)}."
    remedy = report.get("remedy")
    if remedy is None:
        return f"{said} Nor does any other mesh, remat or accumulate tried: use more chips."
    found = f"{' '.join(remedy['flags'])}: {_gib(remedy['hbm_bytes'])}, found by compiling it."
    return f"{said} This fits: {found}"


def of_evaluation(report: dict[str, Any]) -> str:
    """One sentence on whether a run could evaluate there, if that was compiled and cannot be."""
    found = report.get("evaluation", {"fits": True})
    if found["fits"]:
        return ""
    if "error" in found:
        what = f"Its evaluation cannot be compiled: {found['error']}"
    else:
        needed, limit = _gib(found["hbm_bytes"]), _gib(report["hbm_limit_bytes"])
        what = f"Its evaluation does not fit: {needed} a chip, which has {limit}."
    return (
        f"{what} A larger --config.train.accumulate, which evaluation follows, makes its parts "
        "smaller; --config.moe.eval_dispatch=capacity exchanges fixed slots, and drops."
    )


def of_remat(report: dict[str, Any]) -> str:
    """One sentence: which policy is the fastest that fits, if all were tried."""
    if "remat_choices" not in report:
        return ""
    chosen = choice.best(report["remat_choices"])
    if chosen is None:
        return "With no model.remat does it fit."
    return f"The fastest that fits, by this prediction: --config.model.remat={chosen['remat']}"


def of_generation(report: dict[str, Any]) -> str:
    """What kept generation from being compiled, if something did, or that it fits nowhere."""
    ways = report.get("generation", [])
    if not ways or any(way["fits"] for way in ways):
        return ""
    errors = (way[name].get("error") for way in ways for name in ("prefill", "decode"))
    if error := next(filter(None, errors), None):
        return f"Generation cannot be compiled: {error}"
    return "Generation does not fit: give more chips a host, or make fewer texts at once."


def _preallocated(report: dict[str, Any]) -> list[str]:
    """On GPUs: whether it fits what JAX takes of a card when it starts."""
    taken = report.get("preallocated_bytes")
    if taken is None:
        return []
    share = f"Of that JAX takes {_gib(taken)} when it starts"
    if report["hbm_bytes"] <= taken:
        return [f"{share}: enough."]
    return [
        f"{share}: too little; set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 for the run. What "
        "libraries and NCCL need besides is in none of these numbers."
    ]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=i == 0)
    return table


def _step(r: dict[str, Any]) -> Table:
    table = _table(f"Training step on {r['topology']}", "", "")
    table.add_row("devices", f"{r['devices']:,} x {r['chip'] or 'CPU'}")
    table.add_row("mesh", " x ".join(f"{axis}={size}" for axis, size in r["mesh"].items()))
    table.add_row("dispatch", r["dispatch"])
    table.add_row("remat", r["remat"])
    table.add_row("parts of the batch", str(r["accumulate"]))
    table.add_row("tokens a step", f"{r['tokens_per_step']:,}")
    table.add_row("parameters", f"{r['parameters']:,}")
    table.add_row("active a token, at most", f"{r['active_parameters']:,}")
    return table


def _memory(r: dict[str, Any]) -> Table:
    table = _table("Memory of a device", "", "GiB", "of the limit")
    rows = [("parameters", "parameter_bytes"), ("optimizer state", "optimizer_bytes")]
    rows += [("activations and temporaries", "temporary_bytes"), ("program", "code_bytes")]
    rows += [("all, as the compiler lays it out", "hbm_bytes"), ("limit", "hbm_limit_bytes")]
    for name, key in rows:
        if r.get(key) is not None:
            limit = r["hbm_limit_bytes"]
            share = f"{r[key] / limit:.1%}" if limit else ""
            table.add_row(name, _number(r[key] / GIB), share)
    if "hbm_bytes" in (evaluation := r.get("evaluation", {})):
        table.add_section()
        for name, key in (("temporaries", "temporary_bytes"), ("all", "hbm_bytes")):
            share = f"{evaluation[key] / limit:.1%}" if limit else ""
            table.add_row(f"evaluation: {name}", _number(evaluation[key] / GIB), share)
    return table


def _generation(r: dict[str, Any]) -> Table:
    first = r["generation"][0]
    title = f"Generation of texts of {first['places']:,} tokens, half of them the prompt: GiB"
    peaks = {"prefill": "peak, prompt", "decode": "peak, new tokens"}
    table = _table(title, "", "texts at once", "parameters", "cache", *peaks.values(), "fits")
    for way in r["generation"]:
        alone = way["devices"] == 1
        needed = [way[name].get("hbm_bytes") for name in peaks]
        table.add_row(
            "one device" if alone else f"{way['devices']} of a host, --all_devices",
            str(way["texts"]),
            _number(way["parameter_bytes"] / GIB),
            _number(way["cache_bytes"] / GIB),
            *("-" if size is None else _number(size / GIB) for size in needed),
            "yes" if way["fits"] else "no",
        )
    return table


def _collectives(r: dict[str, Any]) -> Table:
    columns = ("collective", "mesh axes", "type", "times", "async", "MB sent", "least", "ms alone")
    table = _table("Collectives of a device and step", *columns)
    least = dict(r["least_wire_bytes"])
    for row in r["collectives"]:
        table.add_row(
            row["kind"],
            ", ".join(row["axes"]) or "-",
            ", ".join(row["types"]),
            f"{row['count']:,}",
            f"{row['asynchronous']:,}",
            _number(row["bytes"] / 1e6),
            _megabytes(least.pop(row["kind"].removeprefix("ragged-"), None)),
            "" if row["seconds"] is None else _number(1e3 * row["seconds"]),
        )
    for kind, size in least.items():
        if size:
            table.add_row(kind, "-", "-", "0", "0", "0.00", _megabytes(size), "")
    ratio = "" if r["wire_ratio"] is None else f"ratio {r['wire_ratio']:.3f}"
    table.add_section()
    total = sum(r["least_wire_bytes"].values())
    table.add_row("all", "", "", "", ratio, _number(r["wire_bytes"] / 1e6), _megabytes(total), "")
    return table


def _exchanges(r: dict[str, Any]) -> Table:
    columns = ("exchange", "pass", "times", "instructions", "zero-computation", "GFLOP")
    table = _table("What is scheduled while tokens are exchanged", *columns)
    for row in r["exchanges"]:
        table.add_row(
            "/".join(row["scope"].split("/")[-2:]),
            "backward" if row["backward"] else "forward",
            f"{row['count']:,}",
            f"{row['instructions']:,}",
            f"{row['zero_computation']:,}",
            f"{row['flops'] / 1e9:,.1f}",
        )
    return table


def _kernels(rows: Sequence[dict[str, Any]]) -> Table:
    columns = ("kernel", "arithmetic", "times", "TFLOP", "ms at least")
    table = _table("Kernels that multiply matrices, of a device and step", *columns)
    for row in rows:
        known = row["flops"] is not None
        table.add_row(
            row["name"],
            row["arithmetic"],
            f"{row['times']:,}",
            _number(row["flops"] / 1e12) if known else "?",
            _number(1e3 * row["seconds"]) if known else "?",
        )
    return table


def _megabytes(size: float | None) -> str:
    return "" if size is None else _number(size / 1e6)


def _number(value: float) -> str:
    """With two places, or what is below one with two digits that say something."""
    return f"{value:,.2f}" if value >= 1 or value == 0 else f"{value:.2g}"


def _roofline(r: dict[str, Any]) -> Table:
    table = _table("Each part of a step, at peak figures", "part", "ms at least", "bound by")
    for part, least in r["roofline"].items():
        table.add_row(part, f"{least['ms']:,.1f}", least["bound_by"])
    table.caption = "Parts that run beside each other do not add up."
    return table


def _bounds(r: dict[str, Any]) -> Table:
    table = _table("Work of a device and step, and what bounds it", "", "amount", "ms at least")
    bounds = r.get("bounds", {})

    def row(name: str, amount: str, bound: str) -> None:
        table.add_row(name, amount, f"{1e3 * bounds[bound]:,.1f}" if bound in bounds else "")

    row(
        "matrix products compiled, loops counted",
        f"{_number(r['flops'] / 1e12)} TFLOP",
        "arithmetic",
    )
    row("  of the model itself, by hand", f"{_number(r['model_flops'] / 1e12)} TFLOP", "")
    row("main memory", f"{_number(r['hbm_traffic_bytes'] / 1e9)} GB", "hbm")
    row("interconnect", f"{_number(r['wire_bytes'] / 1e9)} GB", "interconnect")
    if "mfu" in r:
        table.add_section()
        table.add_row("tokens/s, at most", f"{r['tokens_per_second']:,.0f}", "")
        table.add_row("MFU, at most", f"{r['mfu']:.1%}", "")
        table.caption = f"Peak figures: {r['peak_source']}"
    return table
