"""Dynamic top-p routing: a token has as many experts as make up p = 0.4 of its probability.

    moepp train --config=routing/top_p --workdir=runs/top_p

Expected: after 300 steps a held-out loss of 5.50 with 1.91 FFN experts a token (MoE++ has 5.43
with 0.95). As many as the default job's vanilla twin has, and fewer the surer the router grows.
"""

from ml_collections import ConfigDict

from moepp_jax.configs import tiny


def get_config() -> ConfigDict:
    c = tiny.get_config()
    c.moe.update(n_ffn=8, n_const=0, n_copy=0, n_zero=0, dispatch="dropless")
    c.moe.rule = ConfigDict(
        dict(
            type="top_p",
            p=0.4,
            max_experts=0,
            expected=2.0,
            gate="raw",
            balance_weight=1e-2,
            entropy_weight=1e-4,
            router_layers=1,
            residual="none",
            logit_norm=0.0,
            z_weight=0.0,
            zero_offset=0.0,
        )
    )
    return c
