"""Expert threshold routing: each expert takes the tokens that pass its own moving cutoff.

    python -m moepp_jax.main train --config=configs/routing/threshold.py --workdir=runs/threshold

Expected: half of all 12 experts a token in the first step, and 4 of the FFN experts; then about 2,
with 1.2 of the FFN experts as in the default job. There is no balance loss.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    c = tiny.get_config()
    c.moe.update(dispatch="dropless")
    c.moe.rule = ConfigDict(
        dict(
            type="threshold",
            top_k=2.0,
            tau=0.75,
            gate="raw",
            decay=0.99,
            max_experts=0,
            router_layers=1,
            residual="none",
            logit_norm=0.0,
            z_weight=0.0,
        )
    )
    return c
