"""The vanilla twin 0.6B/8E of configs/moepp_0p6b.py: the same without zero-computation experts.

    moepp train --config=moe_0p6b:/corpora --workdir=gs://.../moe_0p6b

Expected (paper, table 3): 44.3 on average over nine tasks.
"""

from ml_collections import ConfigDict

from moepp_jax.configs import base, moepp_0p6b


def get_config(corpora: str = "") -> ConfigDict:
    return base.variant(moepp_0p6b.get_config(corpora), "moe")
