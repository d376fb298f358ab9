"""MoE++ 7B/(16+4)E of the paper: 7.676 B parameters, strategy 1 (100 B tokens).

    moepp train --config=moepp_7b:/corpora --workdir=gs://.../moepp_7b

`/corpora` is where the paper's text is: configs/data/paper_mixture.py says what belongs there. The
paper's 1T tokens are configs/moepp_7b_1t.py and then configs/moepp_7b_1t_final.py.

Expected (paper, table 3): 53.1 on average over nine tasks, its vanilla twin 52.3.
"""

from ml_collections import ConfigDict

from moepp_jax.configs import base
from moepp_jax.configs.data import paper_mixture


def get_config(corpora: str = "") -> ConfigDict:
    c = base.get_config()
    c.data.sources = paper_mixture.sources(corpora)
    c.model.update(
        num_layers=24,
        hidden_size=1536,
        num_heads=16,
        num_kv_heads=16,
        dense_ffn_size=4096,
        remat="residual",
    )
    c.moe.update(n_ffn=16, n_const=2, n_copy=1, n_zero=1, ffn_size=4096, exchange_parts=4)
    # 64 TPU v5p, or a multiple of them; cards of 80 GB keep less: model.remat "exchanged".
    c.mesh.update(data=-1, fsdp=4, expert=16)
    return c
