"""LongCat-Flash's routing: copy experts, and biases that keep to a budget of FFN experts.

    moepp train --config=routing/longcat --workdir=runs/longcat

Expected: after 300 steps a held-out loss of 5.51 with 1.17 FFN experts a token (MoE++ has 5.43
with 0.95). 1.2 within the first hundred steps, held there by the biases; a balance loss near 1.
Dropless, as nothing balances the copies one by one.
"""

from ml_collections import ConfigDict

from moepp_jax.configs import tiny


def get_config() -> ConfigDict:
    c = tiny.get_config()
    c.moe.update(n_ffn=8, n_const=0, n_copy=4, n_zero=0, dispatch="dropless")
    c.moe.rule = ConfigDict(
        dict(
            type="longcat",
            top_k=2,
            ffn_experts=1.2,
            scale=1.0,
            rate=0.1,
            rate_decay=0.9995,
            groups=1,
            balance_weight=1e-3,
            router_layers=1,
            residual="none",
            logit_norm=0.0,
            z_weight=0.0,
            zero_offset=0.0,
        )
    )
    return c
