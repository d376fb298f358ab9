"""moepp_jax: the open training system for MoE++ language models, in JAX.

`load(workdir)` gives a trained model; `moepp_jax.moe` is the layer for models of one's own. The
command line is `moepp`, or `python -m moepp_jax.main`.
"""

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str):
    # The layer alone, `moepp_jax.moe`, must not bring in data sets and checkpoints.
    if name == "load":
        from moepp_jax.api import load

        return load
    raise AttributeError(f"module 'moepp_jax' has no attribute {name!r}")
