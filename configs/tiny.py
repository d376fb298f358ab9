"""The default job: a tiny MoE++ language model on 14 MB of English, on a laptop in minutes.

    moepp train --config=tiny --workdir=runs/moepp
    moepp train --config=tiny:moe --workdir=runs/moe   # vanilla twin

`make train` runs both and compares them; what it printed on our machine stands in the README.
"""

from ml_collections import ConfigDict

from moepp_jax.configs import base


def get_config(variant: str = "moepp") -> ConfigDict:
    c = base.get_config()
    c.model.update(
        num_layers=4,
        hidden_size=128,
        num_heads=2,
        num_kv_heads=2,
        vocab_size=4096,
        dense_ffn_size=512,
        init_std=0.06,
        dtype="float32",
    )
    # Dropless: models so young send their experts very unequal loads, and what is dropped of them
    # bends a comparison (docs/ARCHITECTURE.md, "Fair comparisons").
    c.moe.update(ffn_size=384, dispatch="dropless", group_size=8 * 256)
    c.data.seq_len = 256
    c.optim.update(lr=3e-3, warmup_steps=50)
    c.train.update(
        steps=700, batch_size=8, log_every=20, eval_every=140, eval_batches=40, save_every=140
    )  # 40 batches are all of the default corpus's held-out text
    return base.variant(c, variant)
