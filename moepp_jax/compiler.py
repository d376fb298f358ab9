"""What the compiler is told on each platform: the one place where its options stand.

The exchange of tokens is meant to run beside the arithmetic that needs none of it. For that the
compiler has to split it into a start and a done, and to put other work between the two.
"""

from __future__ import annotations

_OPTIONS: dict[str, dict[str, bool | str]] = {
    "tpu": {
        # It moves the sum of gradients out of the loop over parts of a batch, and fails with an
        # internal error where what is summed comes from a reduce-scatter.
        "xla_disable_hlo_passes": "while-loop-all-reduce-code-motion",
        "xla_tpu_enable_async_all_to_all": True,
        "xla_tpu_enable_async_ragged_all_to_all": True,
        "xla_tpu_enable_latency_hiding_scheduler": True,
    },
    # Not xla_gpu_enable_pipelined_all_gather: more exchanges of the 7B have products beside them,
    # and gigabytes more are taken where a batch comes in parts. Nobody has timed it.
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "cpu": {},
}
# Scores of plain attention go through memory: with more of a TPU's own beside the products XLA
# fuses more of what is done with them.
_OF_PLAIN_ATTENTION: dict[str, dict[str, bool | str]] = {
    "tpu": {"xla_tpu_scoped_vmem_limit_kib": "65536"}
}
_ASYNCHRONOUS = ("xla_tpu_enable_async_all_to_all", "xla_tpu_enable_async_ragged_all_to_all")
_NAMES = {"cuda": "gpu", "rocm": "gpu"}


def options(
    platform: str, limited_routing: bool = False, plain_attention: bool = False
) -> dict[str, bool | str]:
    """For `jax.jit(..., compiler_options=...)`.

    Args:
      platform: `jax.Device.platform`.
      limited_routing: `moe.kernels.limited_routing` of the mesh: nothing is exchanged there while
        something else runs.
      plain_attention: attention is no fused kernel (`attend.chosen`).
    """
    platform = _NAMES.get(platform, platform)
    chosen = _OPTIONS[platform]
    if plain_attention:
        chosen = chosen | _OF_PLAIN_ATTENTION.get(platform, {})
    return {k: v for k, v in chosen.items() if not (limited_routing and k in _ASYNCHRONOUS)}
