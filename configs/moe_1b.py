"""The vanilla twin 1B/16E of configs/moepp_1b.py: the same without zero-computation experts.

    moepp train --config=moe_1b:/corpora --workdir=gs://.../moe_1b

Expected (paper, table 3): 45.3 on average over nine tasks.
"""

from ml_collections import ConfigDict

from moepp_jax.configs import base, moepp_1b


def get_config(corpora: str = "") -> ConfigDict:
    return base.variant(moepp_1b.get_config(corpora), "moe")
