"""DeepSeek-V3's routing: sigmoid scores, balanced by a bias that no gradient moves.

    moepp train --config=routing/deepseek --workdir=runs/deepseek

Expected: after 300 steps a held-out loss of 5.47 with 2.00 FFN experts a token (MoE++ has 5.43
with 0.95). None is dropped; a sequence loss somewhat above 1, for the bias balances the whole
batch and not each sequence.
"""

from ml_collections import ConfigDict

from moepp_jax.configs import tiny


def get_config() -> ConfigDict:
    c = tiny.get_config()
    c.moe.update(n_ffn=8, n_const=0, n_copy=0, n_zero=0, dispatch="dropless")  # V3 drops nothing
    c.moe.rule = ConfigDict(
        dict(
            type="deepseek",
            top_k=2,
            gate="renormalise_all",
            scale=1.0,
            bias_rate=1e-3,
            sequence_weight=1e-4,
            router_layers=1,
            residual="none",
            logit_norm=0.0,
            z_weight=0.0,
            zero_offset=0.0,
        )
    )
    return c
