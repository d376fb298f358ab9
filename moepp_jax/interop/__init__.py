"""Checkpoints in and out, in the layouts of Hugging Face: MoE++'s, and other models' upcycled."""

from moepp_jax.interop.convert import LAYOUTS, from_hf, to_hf
from moepp_jax.interop.errors import ConversionError
from moepp_jax.interop.upcycle import upcycle

__all__ = ["LAYOUTS", "ConversionError", "from_hf", "to_hf", "upcycle"]
