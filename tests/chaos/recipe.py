"""The job that is broken: seconds long, with a save and an evaluation every few steps.

--config=tests/chaos/recipe.py:FOLDER, where its prepared data are kept.
"""

from ml_collections import ConfigDict

from moepp_jax.configs import base
from tests import tiny

STEPS, SAVE_EVERY, EVAL_EVERY = 15, 5, 3

CHANGES = {
    "model.num_layers": 1,
    "train.steps": STEPS,
    "train.save_every": SAVE_EVERY,
    "train.eval_every": EVAL_EVERY,
    "train.keep": 3,
}


def get_config(data: str) -> ConfigDict:
    c = base.get_config()
    c.update_from_flattened_dict(tiny.CHANGES | CHANGES | {"data.dir": data})
    return c
