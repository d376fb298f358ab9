"""A model that compiles in seconds, batches for it, and the folder of a run that holds one."""

from pathlib import Path

import jax
import numpy as np

from moepp_jax import run_data
from moepp_jax import state as state_lib
from moepp_jax.checkpoint import Checkpoints
from moepp_jax.config import Config
from moepp_jax.configs import base
from moepp_jax.data import PackedRows, prepare
from moepp_jax.mesh import make_mesh
from moepp_jax.workdir import open_workdir

TEXT = Path(__file__).parent / "data" / "text"

CHANGES = {
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 4,
    "model.vocab_size": 384,
    "model.dense_ffn_size": 48,
    "model.init_std": 0.2,  # big enough that routing and text differ from token to token
    "model.dtype": "float32",
    "model.loss_chunk": 16,
    "moe.ffn_size": 24,
    "moe.group_size": 16,
    "moe.dispatch": "capacity",
    "data.sources.text.path": str(TEXT),
    "data.eval_fraction": 0.2,
    "data.seq_len": 32,
    "optim.lr": 2e-3,
    "optim.warmup_steps": 2,
    "train.steps": 6,
    "train.batch_size": 8,
    "train.log_every": 1,
    "train.eval_every": 100,
    "train.eval_batches": 1,
    "train.save_every": 100,
    "generate.max_new_tokens": 8,
}


def config(**changes) -> Config:
    """The configuration with changes: config(**{"moe.rule.tau": 0.5})."""
    fields = base.get_config()
    fields.update_from_flattened_dict(CHANGES | changes)
    return Config.parse(fields)


def batch(c: Config, rows: int | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """Random documents of 1 to 40 tokens, packed: the rows have unequal numbers of targets."""
    rng = np.random.default_rng(seed)
    rows = rows or c.train.batch_size
    lengths = rng.integers(1, 40, size=rows * c.data.seq_len)
    documents = [rng.integers(3, c.model.vocab_size, n).astype(np.int32) for n in lengths]
    return packed(documents, c.data.seq_len, drop_last=True).read(np.arange(rows))


def packed(documents: list[np.ndarray], row_length: int, **options) -> PackedRows:
    """Rows of documents in memory."""
    return PackedRows(InMemory(documents), row_length, **({"pad_id": 0} | options))


class InMemory(list):
    """Documents in a list, read as those on disk are."""

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self)])

    def read(self, begin: np.ndarray, size: np.ndarray) -> np.ndarray:
        stream = np.concatenate(self)
        spans = [stream[b : b + n] for b, n in zip(begin, size, strict=True)]
        return np.concatenate([stream[:0], *spans])


def run_folder(folder: Path, c: Config, step: int = 3) -> Path:
    """A run's folder as training leaves it, with the fresh parameters as its checkpoint."""
    dataset = prepare(c, report=lambda line: None)
    open_workdir(folder, c, run_data.files(dataset))
    mesh = make_mesh(config(), jax.devices()[:1])
    with Checkpoints(folder, c.train.keep) as checkpoints:
        checkpoints.save(step, state_lib.init_state(state_lib.assemble(c, mesh)))
        checkpoints.wait()
    return folder
