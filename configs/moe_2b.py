"""The vanilla twin 2B/32E of configs/moepp_2b.py: the same without zero-computation experts.

    moepp train --config=moe_2b:/corpora --workdir=gs://.../moe_2b

Expected (paper, table 3): 45.9 on average over nine tasks.
"""

from ml_collections import ConfigDict

from moepp_jax.configs import base, moepp_2b


def get_config(corpora: str = "") -> ConfigDict:
    return base.variant(moepp_2b.get_config(corpora), "moe")
