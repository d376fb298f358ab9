"""How fast text becomes token ids on disk, and those become batches on the device.

    python -m benchmarks.data [--json FILE] [--rounds N] [--dir DATA] [--megabytes N]

In one process, interleaved, with warm file caches:

raw      the token files read whole and thrown away: what the disk or its cache gives
records  every document read at random, in the order of a shuffle
batches  what training gets: records, packed, mixed, in arrays on the device, read ahead

for the shapes of the default job and of one host of the paper's 7B model on 64 TPU v5p, beside the
tokens a second that these take. Then text (JSON lines) to token files, with two processes, beside
reading that text; and what a batch far into a run costs.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import timing
from configs import tiny
from moepp_jax.config import Config
from moepp_jax.data import Dataset, open_dataset, prepare
from moepp_jax.data.prepare import prepare_sources, prepared_sources

SCALING = Path(__file__).parents[1] / "docs" / "scaling" / "scaling.csv"
CHIPS, CHIPS_A_HOST = 64, 4
DEFAULT_JOB = 10_000  # tokens a second that the default job trains with on two CPU cores
FAR = 10**6  # a step


class Shape(NamedTuple):
    """Rows and their length as one process reads them, and the tokens a second it needs."""

    name: str
    batch_size: int
    seq_len: int
    needed: float


def shapes() -> list[Shape]:
    with SCALING.open() as file:
        (row,) = (r for r in csv.DictReader(file) if int(r["chips"]) == CHIPS)
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


def reading(folder: Path, shape: Shape, tokens: int, rounds: int) -> list[dict]:
    """Rows of the table for one shape.

    Args:
      tokens: about how many each case reads a time.
    """
    sizes = {"train.batch_size": shape.batch_size, "data.seq_len": shape.seq_len}
    config = config_of(folder, **sizes)
    dataset = open_dataset(config)
    documents = dataset.sources["text"].train_documents
    files = sorted(prepared_sources(config).tokens["text"].glob("*-train.array_record-*"))
    num_batches = max(1, tokens // (shape.batch_size * shape.seq_len))
    order = np.random.default_rng(0).permutation(len(documents))
    order = order[: int(np.searchsorted(np.cumsum(documents.lengths[order]), tokens)) + 1].tolist()
    batches = dataset.train_batches()

    def raw() -> None:
        for file in files:
            file.read_bytes()

    def on_device() -> list[Any]:
        return [jax.device_put(next(batches)) for _ in range(num_batches)]

    cases = {
        "raw": (raw, int(documents.starts[-1]), sum(file.stat().st_size for file in files)),
        "records": (lambda: documents.__getitems__(order), int(documents.lengths[order].sum()), 0),
        "batches": (on_device, num_batches * shape.batch_size * shape.seq_len, 0),
    }
    # What a token is on disk, so that all are told in bytes of the file too.
    bytes_a_token = cases["raw"][2] / cases["raw"][1]
    taken = timing.interleaved(
        {name: timing.Case(function, ()) for name, (function, *_) in cases.items()},
        rounds,
        shape.name,
    )
    return [
        _row(shape.name, name, taken[name], tokens, tokens * bytes_a_token, shape.needed)
        for name, (_, tokens, _) in cases.items()
    ]


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
    parser.add_argument("--tokens", type=int, default=4_000_000, help="read in each round")
    parser.add_argument("--megabytes", type=float, default=60, help="of text to prepare")
    args = parser.parse_args()
    prepare(config_of(args.dir))
    rows = [r for s in shapes() for r in reading(args.dir, s, args.tokens, args.rounds)]
    rows += far_into_a_run(args.dir, args.rounds)
    rows += preparing(args.dir, args.megabytes, max(1, args.rounds // 3))
    show(rows, Console(width=130))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
