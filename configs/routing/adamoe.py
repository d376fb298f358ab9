"""AdaMoE's routing: 3 of 8 FFN and 12 null experts, gates of the FFN experts alone.

    moepp train --config=routing/adamoe --workdir=runs/adamoe

Expected: after 300 steps a held-out loss of 5.61 with 1.16 FFN experts a token (MoE++ has 5.43
with 0.95). 1.2 would be balance; a balance loss near 3 (K). Dropless, as nulls are not balanced
one by one: of a capacity they would seem to be dropped.
"""

from ml_collections import ConfigDict

from moepp_jax.configs import tiny


def get_config() -> ConfigDict:
    c = tiny.get_config()
    c.moe.update(n_ffn=8, n_const=0, n_copy=0, n_zero=12, dispatch="dropless")
    c.moe.rule = ConfigDict(
        dict(
            type="adamoe",
            top_k=3,
            gate="renormalise_nonzero",
            balance_weight=0.01,
            router_layers=1,
            residual="none",
            logit_norm=0.0,
            z_weight=0.0,
            zero_offset=0.0,
        )
    )
    return c
