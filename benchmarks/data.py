"""How fast text becomes token ids on disk, and those become batches on the device.

    python -m benchmarks.data [--json FILE] [--rounds N] [--dir DATA] [--megabytes N]

In one process, interleaved, with warm file caches:

raw        the token files read whole and thrown away: what the disk or its cache gives
records    the records that rows touch, in the order of a shuffle, and the rows' tokens out of them
packed     batches: records, packed, mixed, read ahead on threads
processes  the same, read ahead in two worker processes
device     what training gets: batches in arrays on the device, read ahead on threads

for the shapes of the default job and of one host of the paper's 7B model on 64 TPU v5p, beside the
tokens a second that these take; and batches out of books. Then text (JSON lines) to token files,
with two processes, beside reading that text; and what a batch far into a run costs.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from moepp_jax.benchmarks import timing
from moepp_jax.config import Config
from moepp_jax.configs import tiny
from moepp_jax.data import Dataset, open_dataset, prepare
from moepp_jax.data.prepare import prepare_sources, prepared_sources
from moepp_jax.mesh import batch_sharding, make_mesh
from moepp_jax.processes import Rows

PODS = (
    Path(__file__).resolve().parents[1]
    / "experiments"
    / "results"
    / "paper"
    / "pods"
    / "measured.csv"
)
POD, CHIPS, CHIPS_A_HOST = "v5p:4x4x4", 64, 4
DEFAULT_JOB = 10_000  # tokens a second that the default job trains with on two CPU cores
FAR = 10**6  # a step
BOOKS = 4


class Shape(NamedTuple):
    """Rows and their length as one process reads them, and the tokens a second it needs."""

    name: str
    batch_size: int
    seq_len: int
    needed: float


def shapes() -> list[Shape]:
    with PODS.open(newline="") as file:
        (row,) = (r for r in csv.DictReader(file) if r["name"] == POD)
    hosts = CHIPS // CHIPS_A_HOST
    needed = float(row["tokens_per_second"]) / hosts  # an upper bound
    return [
        Shape("default job", 8, 256, DEFAULT_JOB),
        Shape(f"7B, 1 of {hosts} v5p hosts", 2048 // hosts, 2048, needed),
    ]


def config_of(folder: Path, **fields: Any) -> Config:
    c = tiny.get_config()
    c.data.dir = str(folder)
    c.update_from_flattened_dict(fields)
    return Config.parse(c)


def reading(config: Config, shape: Shape, tokens: int, rounds: int) -> list[dict]:
    """Rows of the table for one shape.

    Args:
      tokens: about how many each case reads a time.
    """
    sizes = {"train.batch_size": shape.batch_size, "data.seq_len": shape.seq_len}
    config = config_with(config, sizes)
    dataset = open_dataset(config)
    documents = dataset.sources["text"].train_documents
    files = sorted(prepared_sources(config).tokens["text"].glob("*-train.array_record-*"))
    total, size = int(documents.starts[-1]), sum(file.stat().st_size for file in files)
    num_batches = max(1, tokens // (shape.batch_size * shape.seq_len))
    order = np.random.default_rng(0).permutation(total // shape.seq_len)
    begin = order[: tokens // shape.seq_len] * shape.seq_len
    sizes = np.full(begin.shape, shape.seq_len)
    rows = Rows(batch_sharding(make_mesh(config)), shape.batch_size)

    def raw() -> None:
        for file in files:
            file.read_bytes()

    with contextlib.ExitStack() as stack:

        def taking(config: Config, place: Callable = lambda batch: batch) -> Callable[[], list]:
            batches = open_dataset(config).train_batches()
            stack.enter_context(contextlib.closing(batches))
            return lambda: [place(next(batches)) for _ in range(num_batches)]

        of_batches = num_batches * shape.batch_size * shape.seq_len
        in_processes = config_with(config, {"data.worker_processes": 2})
        cases = {
            "raw": (raw, total),
            "records": (lambda: documents.read(begin, sizes), int(sizes.sum())),
            "packed": (taking(config), of_batches),
            "processes": (taking(in_processes), of_batches),
            "device": (taking(config, rows.place), of_batches),
        }
        functions = {name: timing.Case(function, ()) for name, (function, _) in cases.items()}
        taken = timing.interleaved(functions, rounds, shape.name)
    return [
        # Told in bytes of the file too, of which a token is so many.
        _row(shape.name, name, taken[name], of_case, of_case * size / total, shape.needed)
        for name, (_, of_case) in cases.items()
    ]


def config_with(config: Config, fields: dict[str, Any]) -> Config:
    for name, value in fields.items():
        group, field = name.split(".")
        config = config.replace(group, **{field: value})
    return config


def of_books(folder: Path, shape: Shape, tokens: int, rounds: int) -> list[dict]:
    """As `reading`, of a few documents of about a million tokens each."""
    dataset = open_dataset(config_of(folder))
    text = "".join(dataset.tokenizer.decode(ids) for ids in dataset.train_documents())
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "tokenizer.model"
        dataset.tokenizer.save(model)
        for i in range(BOOKS):
            part = text[len(text) * i // BOOKS : len(text) * (i + 1) // BOOKS]
            (Path(temporary) / f"{i}.txt").write_text(part)
        fields = {"data.sources.text.path": f"{temporary}/*.txt", "data.tokenizer": str(model)}
        config = config_of(Path(temporary) / "data", **fields)
        prepare(config, lambda line: None)
        shape = shape._replace(name=f"{BOOKS} books, {shape.batch_size} x {shape.seq_len}")
        return reading(config, shape, tokens, rounds)


def _row(what: str, case: str, seconds: timing.Seconds, tokens: int, size: float, needed) -> dict:
    return {
        "what": what,
        "case": case,
        "tokens_per_s": tokens / seconds.median,
        "tokens_per_s_quartiles": [tokens / seconds.high, tokens / seconds.low],
        "mb_per_s": size / seconds.median / 1e6,
        "needed_tokens_per_s": needed,
    }


def preparing(folder: Path, megabytes: float, rounds: int) -> list[dict]:
    """Text to token files with two processes, the default corpus over and over."""
    dataset = open_dataset(config_of(folder))
    texts = [dataset.tokenizer.decode(ids) for ids in dataset.train_documents()]
    with tempfile.TemporaryDirectory() as temporary:
        source, model = Path(temporary) / "text", Path(temporary) / "tokenizer.model"
        dataset.tokenizer.save(model)
        size = write_text(texts, source, megabytes * 1e6)
        fields = {"data.sources.text.path": str(source), "data.tokenizer": str(model)}
        made: list[int] = []

        def make() -> None:
            with tempfile.TemporaryDirectory(dir=temporary) as target:
                config = config_of(Path(target), **fields)
                prepare_sources(config, lambda line: None, workers=2)
                made.append(tokens_in(open_dataset(config)))

        def raw() -> None:
            for file in source.iterdir():
                file.read_bytes()

        cases = {"raw": timing.Case(raw, ()), "prepare": timing.Case(make, ())}
        taken = timing.interleaved(cases, rounds, "prepare")
    return [_row("text to tokens", n, taken[n], made[-1], size, None) for n in cases]


def write_text(texts: list[str], folder: Path, size: float) -> int:
    """JSON lines in files of a fair size; returns the bytes of the text in them."""
    folder.mkdir()
    written = number = 0
    while written < size:
        with (folder / f"{number:05}.jsonl").open("w", encoding="utf-8") as file:
            for i, text in enumerate(texts):
                file.write(json.dumps({"text": f"{number} {i}\n{text}"}, ensure_ascii=False) + "\n")
                written += len(text.encode())
                if written >= size:
                    break
        number += 1
    return written


def tokens_in(dataset: Dataset) -> int:
    return sum(s.train.num_tokens + s.eval.num_tokens for s in dataset.sources.values())


def far_into_a_run(folder: Path, rounds: int) -> list[dict]:
    """Opening the data and the first batch of step 0 and of a far one: there is no replay."""
    config = config_of(folder)

    def first(step: int) -> Callable[[], Any]:
        return lambda: open_dataset(config).train_batch(step)

    cases = {f"step {step:,}": timing.Case(first(step), ()) for step in (0, FAR)}
    taken = timing.interleaved(cases, rounds, "far")
    return [
        {"what": "open, first batch", "case": name, "ms": 1e3 * s.median, "ms_quartiles": ms}
        for name, s in taken.items()
        for ms in [[1e3 * s.low, 1e3 * s.high]]
    ]


def show(rows: list[dict], console: Console) -> None:
    table = Table(title=f"Data, {timing.machine()}")
    for name in ("what", "case", "M tokens/s (quartiles)", "MB/s", "times what is needed", "ms"):
        table.add_column(name, justify="right")
    for r in rows:
        if "ms" in r:
            table.add_row(r["what"], r["case"], "", "", "", f"{r['ms']:.1f}")
            continue
        low, high = (t / 1e6 for t in r["tokens_per_s_quartiles"])
        needed = r["needed_tokens_per_s"]
        table.add_row(
            r["what"],
            r["case"],
            f"{r['tokens_per_s'] / 1e6:,.2f} ({low:,.2f} to {high:,.2f})",
            f"{r['mb_per_s']:,.0f}",
            f"{r['tokens_per_s'] / needed:,.0f}" if needed else "",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dir", type=Path, default=Path("data"), help="of the prepared data")
    parser.add_argument("--tokens", type=int, default=16_000_000, help="read in each round")
    parser.add_argument("--megabytes", type=float, default=60, help="of text to prepare")
    args = parser.parse_args()
    prepare(config_of(args.dir))
    config, of_shapes = config_of(args.dir), shapes()
    rows = [r for s in of_shapes for r in reading(config, s, args.tokens, args.rounds)]
    rows += of_books(args.dir, of_shapes[-1], args.tokens, args.rounds)
    rows += far_into_a_run(args.dir, args.rounds)
    rows += preparing(args.dir, args.megabytes, max(1, args.rounds // 3))
    show(rows, Console(width=130))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
