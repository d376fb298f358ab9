"""Log-probabilities of given continuations, in batches of rows of like length, over a mesh.

Shapes: B rows, L tokens of a row, Q queries of a row (places whose next token is asked for), and
the letters of `moepp_jax.moe`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from moepp_jax import mesh as mesh_lib
from moepp_jax import model as model_lib
from moepp_jax import vocabulary
from moepp_jax.config import Config
from moepp_jax.processes import Rows

# Lengths are rounded up to 64, 96, 128, 192, 256 and so on, two steps an octave: a suite compiles
# some ten programs, and pads its rows by a fifth of their tokens (by half with one step).
_SHORTEST = 64


class Row(NamedTuple):
    """Tokens, and queries: how probable is targets[i] after tokens[: places[i] + 1]?"""

    tokens: Sequence[int]
    places: Sequence[int]
    targets: Sequence[int]


class Score(NamedTuple):
    """The answers to a row's queries, and where its tokens went.

    Attributes:
      log_probs: of the targets, nats.
      greedy: whether the target is the most probable token.
      served: how many of the row's tokens each expert served, by layer.
    """

    log_probs: np.ndarray  # (Q,)
    greedy: np.ndarray  # (Q,)
    served: np.ndarray  # (layers, N)


def next_tokens(
    w_VD: Float[Array, "V D"],
    hidden_BQD: Float[Array, "B Q D"],
    targets_BQ: Int[Array, "B Q"],
    chunk: int,
) -> tuple[Float[Array, "B Q"], Bool[Array, "B Q"]]:
    """Log-probability of each target, and whether it is the best; `chunk` queries at a time."""
    B, Q, D = hidden_BQD.shape
    size = math.gcd(Q, chunk)

    def of_chunk(_, given):
        hidden, targets = given
        z = vocabulary.logits(w_VD, hidden)
        at_target = jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
        return None, (at_target - jax.nn.logsumexp(z, axis=-1), jnp.argmax(z, axis=-1) == targets)

    chunks = (
        hidden_BQD.reshape(B, Q // size, size, D).swapaxes(0, 1),
        targets_BQ.reshape(B, Q // size, size).swapaxes(0, 1),
    )
    _, (log_probs, greedy) = jax.lax.scan(of_chunk, None, chunks)
    return log_probs.swapaxes(0, 1).reshape(B, Q), greedy.swapaxes(0, 1).reshape(B, Q)


def make_score(config: Config, mesh: Mesh) -> Callable[[dict[str, Any], dict[str, Any]], Score]:
    """A function (params, batch) -> Score with a leading axis of rows, alike in all processes.

    The batch: tokens (B, L), lengths (B,), places and targets (B, Q). Rows are padded on the right,
    where no real token sees the padding; no assignment is dropped, so that none misses a place for
    it either.
    """
    config = config.replace("moe", exchange_buffer=0.0)
    # Groups of one token: the statistics are then each token's own, and padding can be left out.
    model = model_lib.build(config, mesh, "dropless")
    model = replace(model, block=replace(model.block, group_size=1))

    def on_device(params, batch):
        tokens = batch["tokens"]
        B, L = tokens.shape
        positions = jnp.arange(L) + jnp.zeros_like(tokens)
        out = model(params, tokens, positions, jnp.zeros_like(tokens))
        asked = jnp.take_along_axis(out.hidden, batch["places"][..., None], axis=1)
        answers = next_tokens(out.matrix, asked, batch["targets"], config.model.loss_chunk)
        kept = out.statistics.kept.reshape(-1, B, L, out.statistics.kept.shape[-1])
        real = (positions < batch["lengths"][:, None]).astype(kept.dtype)
        return Score(*answers, jnp.einsum("lbtn,bt->bln", kept, real))

    def score(params, batch):
        specs = (mesh_lib.specs(model.described), mesh_lib.BATCH)
        run = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=mesh_lib.BATCH)
        return run(params, batch)

    return jax.jit(score, out_shardings=NamedSharding(mesh, P()))


class Scorer:
    """Scores rows with one model; each shape of a batch is compiled once.

    Args:
      batch_size: rows of max_length in a batch; of shorter ones there are as many more as make the
        same number of tokens. It is rounded up to a multiple of the devices.
      max_length: tokens that a row may have.
    """

    def __init__(
        self, config: Config, mesh: Mesh, params: dict[str, Any], batch_size: int, max_length: int
    ):
        self.score = make_score(config, mesh)
        self._params = params
        self._sharding = mesh_lib.batch_sharding(mesh)
        self._devices = mesh.size
        self._tokens = batch_size * max_length
        self._max_length = max_length

    def __call__(
        self, rows: Sequence[Row], done: Callable[[int], None] = lambda rows: None
    ) -> list[Score]:
        """The scores of the rows, in their order.

        Args:
          done: called with the number of rows scored since it was called last.

        Raises:
          ValueError: a row is empty, longer than max_length, or asks nothing.
        """
        for row in rows:
            if not 0 < len(row.tokens) <= self._max_length or not row.places:
                raise ValueError(
                    f"a row of {len(row.tokens)} tokens and {len(row.places)} queries: there must "
                    f"be 1 to {self._max_length} tokens and at least one query"
                )
        scores: list[Score | None] = [None] * len(rows)

        def collect(indices, batch):
            arrays = [np.asarray(a) for a in batch]
            for i, log_probs, greedy, served in zip(indices, *arrays, strict=False):
                asked = len(rows[i].places)
                scores[i] = Score(log_probs[:asked], greedy[:asked], served)
            done(len(indices))

        running: deque = deque()
        for indices, shape in self._batches(rows):
            batch = padded([rows[i] for i in indices], *shape)
            placed = Rows(self._sharding, shape[0])
            here = {name: array[placed.indices] for name, array in batch.items()}
            running.append((indices, self.score(self._params, placed.place(here))))
            if len(running) > 1:  # the devices have the next batch while this one is read
                collect(*running.popleft())
        for last in running:
            collect(*last)
        return scores

    def _batches(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], tuple[int, int, int]]]:
        """Indices of rows, and the shape (B, L, Q) of their batch; the longest first."""
        shapes: dict[tuple[int, int], list[int]] = {}
        for i, row in enumerate(rows):
            length = min(rounded(len(row.tokens)), self._max_length)
            shapes.setdefault((length, rounded(len(row.places))), []).append(i)
        for (length, queries), indices in sorted(shapes.items(), reverse=True):
            indices.sort(key=lambda i: len(rows[i].tokens), reverse=True)
            parts = max(1, self._tokens // length)
            batch = -(-parts // self._devices) * self._devices
            for start in range(0, len(indices), batch):
                yield indices[start : start + batch], (batch, length, queries)


def rounded(n: int) -> int:
    """The length that rows of n tokens, or of n queries, are padded to."""
    power = max(_SHORTEST, 1 << (n - 1).bit_length())
    between = 3 * power // 4
    return between if between > _SHORTEST and n <= between else power


def padded(rows: Sequence[Row], B: int, L: int, Q: int) -> dict[str, np.ndarray]:
    """The batch of `make_score`, with empty rows at its end."""
    batch = {
        "tokens": np.zeros((B, L), np.int32),
        "lengths": np.zeros(B, np.int32),
        "places": np.zeros((B, Q), np.int32),
        "targets": np.zeros((B, Q), np.int32),
    }
    for i, row in enumerate(rows):
        batch["tokens"][i, : len(row.tokens)] = row.tokens
        batch["lengths"][i] = len(row.tokens)
        batch["places"][i, : len(row.places)] = row.places
        batch["targets"][i, : len(row.targets)] = row.targets
    return batch
