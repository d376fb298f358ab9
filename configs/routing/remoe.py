"""ReMoE: ReLU routing, made sparse by an L1 penalty whose coefficient follows the sparsity.

    moepp train --config=routing/remoe --workdir=runs/remoe

Expected: after 300 steps a held-out loss of 5.23 with 2.14 FFN experts a token (MoE++ has 5.43
with 0.95). About half of the 8 FFN experts a token at first, so slow steps, until the coefficient
has grown, after a hundred steps or more.
"""

from ml_collections import ConfigDict

from moepp_jax.configs import tiny


def get_config() -> ConfigDict:
    c = tiny.get_config()
    c.moe.update(n_ffn=8, n_const=0, n_copy=0, n_zero=0, dispatch="dropless")
    c.moe.rule = ConfigDict(
        dict(
            type="remoe",
            top_k=2,
            max_experts=0,
            lambda_start=1e-8,
            alpha=1.2,
            router_layers=1,
            residual="none",
            logit_norm=0.0,
            z_weight=0.0,
            zero_offset=0.0,
        )
    )
    return c
