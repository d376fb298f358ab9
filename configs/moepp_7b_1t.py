"""MoE++ 7B/(16+4)E of the paper on 1T tokens: strategy 2, the first 900 B of them.

    moepp train --config=moepp_7b_1t:/corpora --workdir=gs://.../moepp_7b_1t

`/corpora` is where the paper's text is: configs/data/paper_mixture.py says what belongs there. The
last 100 B tokens are a run of their own: configs/moepp_7b_1t_final.py.

Expected: the paper gives numbers after all 1T tokens only; see there.
"""

from ml_collections import ConfigDict

from moepp_jax.configs import moepp_7b


def get_config(corpora: str = "") -> ConfigDict:
    c = moepp_7b.get_config(corpora)
    c.optim.warmup_steps = 500  # 5e-4 to 5e-5, as every model of the paper
    c.train.steps = 214_577  # 900 B tokens in batches of 4 M
    return c
