"""ZEDA's routing, from scratch: zero experts, balanced as a group with the FFN experts.

    moepp train --config=routing/zeda --workdir=runs/zeda

Expected: after 300 steps a held-out loss of 5.55 with 1.12 FFN experts a token (MoE++ has 5.43
with 0.95). 1.14 is the balance; both balance losses near 1. Dropless, as nothing balances the zero
experts one by one: of a capacity they would seem dropped.
"""

from ml_collections import ConfigDict

from moepp_jax.configs import tiny


def get_config() -> ConfigDict:
    c = tiny.get_config()
    c.moe.update(n_ffn=8, n_const=0, n_copy=0, n_zero=3, dispatch="dropless")
    c.moe.rule = ConfigDict(
        dict(
            type="zeda",
            top_k=2,
            gate="renormalise_all",
            zero_weight=2.0,
            balance_weight=0.1,
            ffn_balance_weight=0.01,
            router_layers=1,
            residual="none",
            logit_norm=0.0,
            z_weight=0.0,
            zero_offset=0.0,
        )
    )
    return c
