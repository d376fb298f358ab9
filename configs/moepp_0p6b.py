"""MoE++ 0.6B/(8+4)E of the paper: 0.582 B parameters, strategy 1 (100 B tokens).

    moepp train --config=moepp_0p6b:/corpora --workdir=gs://.../moepp_0p6b

`/corpora` is where the paper's text is: configs/data/paper_mixture.py says what belongs there.

Expected (paper, table 3): 45.6 on average over nine tasks, its vanilla twin 44.3.
"""

from ml_collections import ConfigDict

from moepp_jax.configs import base
from moepp_jax.configs.data import paper_mixture


def get_config(corpora: str = "") -> ConfigDict:
    c = base.get_config()
    c.data.sources = paper_mixture.sources(corpora)
    c.moe.update(n_ffn=8, n_const=2, n_copy=1, n_zero=1)
    return c
