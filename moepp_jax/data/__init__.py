"""Text to batches: corpus -> tokenizer -> tokens -> packed rows -> mixture -> `Dataset`."""

from moepp_jax.data.dataset import Dataset
from moepp_jax.data.loader import (
    describe,
    describe_batch,
    open_dataset,
    prepare,
    summarise_batch,
)
from moepp_jax.data.packing import Batch, PackedRows
from moepp_jax.data.storage import DataError
from moepp_jax.data.tokenizer import Tokenizer

__all__ = [
    "Batch",
    "DataError",
    "Dataset",
    "PackedRows",
    "Tokenizer",
    "describe",
    "describe_batch",
    "open_dataset",
    "prepare",
    "summarise_batch",
]
