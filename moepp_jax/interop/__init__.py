"""Released MoE++ checkpoints in, and ours out, in the layout of Hugging Face."""

from moepp_jax.interop.convert import from_hf, to_hf
from moepp_jax.interop.errors import ConversionError

__all__ = ["ConversionError", "from_hf", "to_hf"]
