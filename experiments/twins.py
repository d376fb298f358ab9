"""Is MoE++ better than the vanilla MoE of the same FFN experts, and cheaper? (paper, table 3)

    python -m experiments.twins --config=tiny --workdir=runs/tiny

Question   same data, same steps, same FFN experts: held-out loss, and time in the experts.
Claim      MoE++ has the lower loss, and its experts' forward time falls towards the theory,
           tau N_FFN / (tau N_FFN + N_ZC) of the vanilla's.
Refuted    if the loss is higher by more than seeds differ, or the time does not fall.

Trains both (each resumes by itself), evaluates both on all held-out text beside n-gram baselines,
times one layer and a training step of each by turns, and writes into the work directory:
summary.json, curves.png, sample.txt, and a run's usual files in moepp/ and moe/; moepp/analysis
has a page that shows where every token of held-out text went.
"""

from __future__ import annotations

from moepp_jax import host_memory

if __name__ == "__main__":
    host_memory.keep_freed_on_cpu()  # before an import starts a thread

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

import moepp_jax
from moepp_jax import cli, flops, moe, observe
from moepp_jax import mesh as mesh_lib
from moepp_jax import model as model_lib
from moepp_jax import state as state_lib
from moepp_jax.analysis import draw
from moepp_jax.analysis.curves import plot_curves
from moepp_jax.analysis.ngram import ngram_loss
from moepp_jax.benchmarks import timing
from moepp_jax.config import Config
from moepp_jax.configs import base
from moepp_jax.data import Dataset, describe, prepare
from moepp_jax.evaluate import evaluate_run
from moepp_jax.train import train
from moepp_jax.workdir import write_atomic

TWINS = ("moepp", "moe")
NAMES = {"moepp": "MoE++", "moe": "vanilla MoE"}
BASELINES = {"unigram": 1, "bigram": 2, "trigram": 3}
PAGE_TOKENS = 20_000  # of held-out text, whose routing is shown
PROMPTS = ("In the beginning", "The village of", "KING HENRY\n")


def twins(recipe: ConfigDict, workdir: Path, report: Callable[[str], None] = print) -> dict:
    """Runs the experiment; returns what summary.json holds."""
    start = time.perf_counter()
    configs = {name: Config.parse(base.variant(copy.deepcopy(recipe), name)) for name in TWINS}
    dataset = prepare(configs["moepp"], report)
    report(describe(dataset, configs["moepp"].train.steps))
    folders = {name: workdir / name for name in TWINS}
    results = {}
    for name, config in configs.items():
        report(f"\n{NAMES[name]}: training in {folders[name]}")
        train(config, folders[name], report)
        results[name] = evaluate_run(config, folders[name], config.train.steps)
    report("\ncounting n-grams, and timing one layer and a training step of each")
    baselines = n_gram_losses(configs["moepp"], dataset)
    seconds = time_layers(configs, folders)
    step_seconds = time_steps(configs, dataset)
    summary = {
        "held_out_loss": {n: results[n]["eval_loss"] for n in TWINS} | baselines,
        "held_out_perplexity": {n: results[n]["eval_perplexity"] for n in TWINS},
        "held_out_bits_per_byte": {n: results[n]["eval_bits_per_byte"] for n in TWINS},
        "held_out_tokens": results["moepp"]["eval_tokens"],
        "ffn_experts_per_token": {n: results[n]["eval_ffn_experts_per_token"] for n in TWINS},
        "expert_forward_seconds": {n: seconds[n].median for n in TWINS},
        "time_ratio": seconds["moepp"].median / seconds["moe"].median,
        "theory": flops.cost_ratio(configs["moepp"], configs["moe"]),
        "step_seconds": {n: step_seconds[n].median for n in TWINS},
        "tokens_per_s": {n: configs[n].batch_tokens / step_seconds[n].median for n in TWINS},
        "steps": configs["moepp"].train.steps,
        "machine": timing.machine(),
        "seconds": time.perf_counter() - start,
    }
    write_atomic(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    labels = {NAMES[n]: folders[n] for n in TWINS}
    plot_curves(labels, workdir / "curves.png", baselines)
    write_atomic(workdir / "sample.txt", sample(folders["moepp"]))
    report("showing where the tokens of held-out text went")
    show_routing(configs["moepp"], folders["moepp"])
    return summary


def n_gram_losses(config: Config, dataset: Dataset) -> dict[str, float]:
    """Nats a token of add-k n-gram models on the held-out targets, the best k for each."""
    batches = list(dataset.eval_batches())
    vocabulary = config.model.vocab_size
    return {
        name: ngram_loss(dataset.train_documents(), batches, vocabulary, order).loss
        for name, order in BASELINES.items()
    }


def time_layers(configs: dict[str, Config], folders: dict[str, Path]) -> dict[str, timing.Seconds]:
    """Forward of each model's first trained MoE layer, whole, on a batch's worth of rows."""
    return timing.interleaved(
        {name: layer_case(config, folders[name]) for name, config in configs.items()},
        rounds=40,
        label="timing",
    )


def layer_case(config: Config, folder: Path) -> timing.Case:
    layer = model_lib.moe_of(config, config.moe.dispatch, jax.default_backend())
    params = moepp_jax.load(folder, config.train.steps).params["layers"]["moe"]
    params = jax.tree.map(lambda p: p[0], params)
    S = config.data.seq_len
    G = config.batch_tokens // S
    x = jax.random.normal(jax.random.key(0), (G, S, config.model.hidden_size))
    previous = jnp.zeros((G, S, config.moe.num_experts))
    return timing.Case(jax.jit(lambda *a: moe.local(*a, layer)[0]), (x, previous, params))


def time_steps(configs: dict[str, Config], dataset: Dataset) -> dict[str, timing.Seconds]:
    """Training steps from fresh parameters.

    The logs have rates too, but of different minutes, in which a machine is not the same. Both
    models' states are on the devices at once.
    """
    return timing.interleaved(
        {name: step_case(config, dataset) for name, config in configs.items()},
        rounds=15,
        label="timing",
    )


def step_case(config: Config, dataset: Dataset) -> timing.Case:
    mesh = mesh_lib.make_mesh(config)
    parts = state_lib.assemble(config, mesh)
    train_step, state = state_lib.make_train_step(parts), state_lib.init_state(parts)
    batch = jax.device_put(dataset.train_batch(0), mesh_lib.batch_sharding(mesh))

    def step():
        nonlocal state  # each step is given what the one before left
        state, metrics = train_step(state, batch)
        return state, metrics

    return timing.Case(step, ())


def sample(folder: Path) -> str:
    """Continuations of a few prompts, sampled from the best checkpoint."""
    model = moepp_jax.load(folder)
    texts = model.generate(list(PROMPTS), max_new_tokens=80, temperature=0.8, top_p=0.95, seed=1)
    return "\n\n".join(p + t for p, t in zip(PROMPTS, texts, strict=True)) + "\n"


def show_routing(config: Config, folder: Path) -> Path:
    """The routing page of held-out text, in the run's folder, with what it shows as tables."""
    where, text = folder / "analysis", observe.Text(tokens=PAGE_TOKENS)
    command = f"moepp analyze --workdir={folder} --tokens={PAGE_TOKENS} --page"
    files = [where / draw.RECORD]
    observe.analyze(config, folder, config.train.steps, text, files, command=command)
    return draw.draw(where, PAGE_TOKENS)[-1]


def show(summary: dict[str, Any], workdir: Path, console: Console) -> None:
    table = Table(title=f"held-out text, {summary['held_out_tokens']:,} tokens")
    for column in ("", "loss", "perplexity", "bits/byte", "FFN experts/token"):
        table.add_column(column, justify="right")
    for column in ("expert forward", "ratio", "theory", "train tok/s"):
        table.add_column(column, justify="right")
    ratios = {
        "moepp": (f"{summary['time_ratio']:.3f}", f"{summary['theory']:.3f}"),
        "moe": ("1", "1"),
    }
    for name in TWINS:
        table.add_row(
            NAMES[name],
            f"{summary['held_out_loss'][name]:.3f}",
            f"{summary['held_out_perplexity'][name]:.1f}",
            f"{summary['held_out_bits_per_byte'][name]:.3f}",
            f"{summary['ffn_experts_per_token'][name]:.3f}",
            f"{1e3 * summary['expert_forward_seconds'][name]:.2f} ms",
            *ratios[name],
            f"{summary['tokens_per_s'][name]:,.0f}",
        )
    nats_to_bits = summary["held_out_bits_per_byte"]["moe"] / summary["held_out_loss"]["moe"]
    for name in BASELINES:
        loss = summary["held_out_loss"][name]
        table.add_row(name, f"{loss:.3f}", f"{np.exp(loss):.1f}", f"{loss * nats_to_bits:.3f}")
    console.print(table)
    console.print(
        f"theory's speed-up in the experts {1 / summary['theory']:.2f}, measured "
        f"{1 / summary['time_ratio']:.2f}; in a whole training step "
        f"{summary['step_seconds']['moe'] / summary['step_seconds']['moepp']:.2f}\n"
        f"machine  {summary['machine']}; {summary['seconds']:.0f} s in all\n"
        f"curves   {workdir / 'curves.png'}\n"
        f"numbers  {workdir / 'summary.json'}\n"
        f"logs     {workdir}/*/metrics.jsonl, and tensorboard --logdir={workdir}\n"
        f"routing  {workdir / 'moepp' / 'analysis' / draw.PAGE}, and REPORT.md beside it\n"
        f"sample   {workdir / 'sample.txt'}\n",
        highlight=False,
    )
    console.print((workdir / "sample.txt").read_text(), markup=False, highlight=False)


def main(argv: list[str]) -> None:
    workdir = Path(_WORKDIR.value)
    show(twins(_CONFIG.value, workdir), workdir, Console(width=120))


if __name__ == "__main__":
    _CONFIG = cli.define_config("configs/tiny.py")
    _WORKDIR = flags.DEFINE_string("workdir", "runs/tiny", "folder of the experiment")
    cli.run(main)
