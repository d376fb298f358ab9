r"""MoE++ 7B/(16+4)E of the paper on 1T tokens: strategy 3, the last 100 B of them.

    moepp train --config=moepp_7b_1t_final:/corpora \
        --init_from=gs://.../moepp_7b_1t@214577 --workdir=gs://.../moepp_7b_1t_final

It starts from the parameters of configs/moepp_7b_1t.py and goes on with another mixture of the same
sources, in which books, articles and Wikipedia have 2.6 to 3.3 times their shares. `/corpora` is
the same folder as there. Whether the authors took the optimizer along is not said; with
--init_optimizer it is.

Expected (paper): 56.2 on average over eleven tasks.
"""

from ml_collections import ConfigDict

from moepp_jax.configs import moepp_7b
from moepp_jax.configs.data import paper_mixture


def get_config(corpora: str = "") -> ConfigDict:
    c = moepp_7b.get_config()
    c.data.sources = paper_mixture.sources(corpora, "last 100B")
    c.optim.update(lr=1e-4, final_lr_ratio=0.1, warmup_steps=200)  # 1e-4 to 1e-5
    c.train.steps = 23_842  # 100 B tokens in batches of 4 M
    # Past what strategy 2 has read of every source, where this mixture had been read from the
    # start: the Pile's share falls most, from 12.48 % to 6.96 %.
    c.train.first_batch = 384_760
    return c
