"""Does a checkpoint in the released layout, converted, compute the authors' numbers?

Claim: everything that the authors' arithmetic gives for a checkpoint, ours computes from its
conversion, to 2e-5 of the largest value in float32; choices of experts and greedy tokens are the
same. A larger difference in any row refutes it, and ends the command with status 1.

    python -m experiments.reference                    # the three of tests/data/reference
    python -m experiments.reference FOLDER [FOLDER]    # others, each with its expected.npz

expected.npz holds input_ids and what was computed of them: logits, router_logits, gates, selected,
hidden_states (the last one after the final norm), lm_loss; padded_ids, padded_mask, padded_logits
(padding on the left); greedy_prompt and greedy_tokens.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import moepp_jax
from moepp_jax import cli, interop, vocabulary
from moepp_jax import model as model_lib
from moepp_jax.config import Config
from moepp_jax.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1] / "tests" / "data" / "reference"
TOLERANCE = 2e-5


class Difference(NamedTuple):
    """Between our numbers and the expected ones.

    Attributes:
      largest: absolute difference; of tokens and choices, how many differ.
      relative: to the largest expected value; of tokens and choices, the share that differs.
    """

    largest: float
    relative: float


def of_repository(checkpoint: str = "") -> Path:
    """A reference checkpoint, or the folder of all.

    Raises:
      ConfigError: this is the package, which comes without them.
    """
    if not ROOT.is_dir():
        raise ConfigError(
            "the reference checkpoints are in tests/data of the repository, and not in the "
            "package: run this there"
        )
    return ROOT / checkpoint


def differences(folder: Path, workdir: Path) -> dict[str, Difference]:
    """What our model of the work directory makes of the inputs of the folder's expected.npz."""
    want = dict(np.load(folder / "expected.npz"))
    model = moepp_jax.load(workdir)
    model.tokenizer, model.ends = None, frozenset()  # greedy tokens go on behind a text's end
    got = _forward(model.config, model.params, want["input_ids"])
    real = want["padded_mask"].astype(bool)
    padded = np.asarray(model.logits(want["padded_ids"], want["padded_mask"]))
    prompt, end = want["greedy_prompt"], want["greedy_tokens"].shape[1]
    cached = model.generate(prompt.tolist(), max_new_tokens=end - prompt.shape[1])
    got |= {
        "padded_logits": padded[real],
        "greedy_tokens": np.concatenate([prompt, cached], axis=1),
        "greedy_tokens, no cache": _greedy(model, prompt, end),
    }
    want |= {
        "padded_logits": want["padded_logits"][real],
        "greedy_tokens, no cache": want["greedy_tokens"],
    }
    return {name: _difference(np.asarray(value), want[name]) for name, value in got.items()}


def _forward(config: Config, params: dict[str, Any], tokens: np.ndarray) -> dict[str, Any]:
    """The authors' names of what one pass without cache computes."""
    model = model_lib.build(config, dispatch="dropless")
    pool = config.moe.pool
    # What the layers made of their logits: their rule, with nothing before the logits.
    rule = dataclasses.replace(config.moe.rule, residual="none", router_layers=1)
    as_given = {"w": jnp.eye(pool.size)}
    if rule.bias_rate:
        as_given["bias"] = jnp.zeros(pool.size)

    @jax.jit
    def run(params, tokens):
        B, L = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(L), (B, L))
        out = model(params, tokens, positions, jnp.zeros_like(tokens))
        logits = vocabulary.logits(out.matrix, out.hidden)
        nll = vocabulary.token_losses(out.matrix, out.hidden, jnp.roll(tokens, -1, axis=1), chunk=L)

        def routed(logits_BLN):
            return rule.route(logits_BLN, jnp.zeros_like(logits_BLN), as_given)

        return out, logits, nll[:, :-1].mean(), jax.lax.map(routed, out.router_logits)

    out, logits, loss, routing = jax.device_get(run(params, tokens))
    one_hot = routing.experts[..., None] == np.arange(pool.size)
    return {
        "router_logits": out.routed.routing.logits,
        "selected": one_hot.any(axis=-2),
        "gates": (one_hot * routing.gates[..., None]).sum(axis=-2),
        "hidden_states": np.concatenate([out.states, out.hidden[None]]),
        "logits": logits,
        "lm_loss": loss,
    }


def _greedy(model: moepp_jax.Model, prompt: np.ndarray, end: int) -> np.ndarray:
    """The likeliest continuations, every token by a pass over all before it."""
    tokens = np.zeros((len(prompt), end), prompt.dtype)  # causal: what is to come is not seen
    tokens[:, : prompt.shape[1]] = prompt
    for i in range(prompt.shape[1], end):
        tokens[:, i] = np.argmax(model.logits(tokens)[:, i - 1], axis=-1)
    return tokens


def _difference(got: np.ndarray, want: np.ndarray) -> Difference:
    if got.shape != want.shape:
        raise ConfigError(f"expected.npz has numbers of shape {want.shape}, ours are {got.shape}")
    if want.dtype.kind in "iub":
        return Difference(float(np.sum(got != want)), float(np.mean(got != want)))
    largest = float(np.abs(got - want.astype(np.float64)).max())
    return Difference(largest, largest / float(np.abs(want).max()))


def main(argv: Sequence[str]) -> None:
    folders = [Path(name) for name in argv[1:]] or sorted(of_repository().iterdir())
    for folder in folders:
        if not (folder / "expected.npz").exists():
            raise ConfigError(f"{folder} has no expected.npz: there is nothing to compare with")
    print("| checkpoint | numbers | largest difference | relative to the largest |")
    print("|---|---|---|---|")
    agree = True
    for folder in folders:
        with tempfile.TemporaryDirectory() as temporary:
            workdir = Path(temporary) / "run"
            interop.from_hf(folder, workdir, dtype="float32", report=lambda line: None)
            for name, difference in differences(folder, workdir).items():
                largest, relative = (f"{value:.2g}" for value in difference)
                print(f"| {folder.name} | {name} | {largest} | {relative} |")
                agree &= difference.relative <= TOLERANCE
    if not agree:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
