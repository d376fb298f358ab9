"""A vanilla top-K mixture of experts with Switch's balance loss.

    moepp train --config=routing/vanilla --workdir=runs/vanilla

Expected: after 300 steps a held-out loss of 5.44 with 2.00 FFN experts a token (MoE++ has 5.43
with 0.95). About what the default job's vanilla twin (configs/tiny.py:moe) gives, whose balance
loss weighs twice as much; a balance loss that comes down to about 1.
"""

from ml_collections import ConfigDict

from moepp_jax.configs import tiny


def get_config() -> ConfigDict:
    c = tiny.get_config()
    c.moe.update(n_ffn=8, n_const=0, n_copy=0, n_zero=0)
    c.moe.rule = ConfigDict(
        dict(
            type="vanilla",
            top_k=2,
            gate="renormalise_all",
            balance_weight=0.01,
            router_layers=1,
            residual="none",
            logit_norm=0.0,
            z_weight=0.0,
            zero_offset=0.0,
        )
    )
    return c
