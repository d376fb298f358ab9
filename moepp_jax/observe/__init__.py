"""Runs a model over text and writes how each token was routed: what `moepp_jax.analysis` reads.

texts    held-out text, files and benchmark items, in rows as training reads them
routed   a batch through the model; what is found of each token
beside   what is found on a sample: kinds of experts switched off, earlier checkpoints
analyze  a run's checkpoint and text to a file: `main analyze`
loaded   the same of a loaded model, in memory: `moepp_jax.load(...).routing(text)`
"""

from moepp_jax.observe.analyze import Text, analyze

__all__ = ["Text", "analyze"]
