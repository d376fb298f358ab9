"""LongCat-Flash's routing: copy experts, and biases that keep to a budget of FFN experts.

    python -m moepp_jax.main train --config=configs/routing/longcat.py --workdir=runs/longcat

Expected: 1.2 FFN experts a token within the first hundred steps, as the default job has, held there
by the biases; a balance loss near 1. Dropless, as nothing balances the copies one by one.
"""

from ml_collections import ConfigDict

from configs import tiny


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
        )
    )
    return c
