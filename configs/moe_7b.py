"""The vanilla twin 7B/16E of configs/moepp_7b.py: the same without zero-computation experts.

    moepp train --config=moe_7b:/corpora --workdir=gs://.../moe_7b

Expected (paper, table 3): 52.3 on average over nine tasks.
"""

from ml_collections import ConfigDict

from moepp_jax.configs import base, moepp_7b


def get_config(corpora: str = "") -> ConfigDict:
    c = base.variant(moepp_7b.get_config(corpora), "moe")
    c.model.remat = "w_in"  # its experts have a third more rows, for which memory goes
    return c
