"""Text to batches: corpus -> tokenizer -> tokens -> packed rows -> `Dataset`."""

from moepp_jax.data.loader import Batch, Dataset, open_dataset, prepare
from moepp_jax.data.packing import PackedRows
from moepp_jax.data.tokenizer import Tokenizer

__all__ = ["Batch", "Dataset", "PackedRows", "Tokenizer", "open_dataset", "prepare"]
