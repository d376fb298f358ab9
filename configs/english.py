"""The default job on a mixture of its three domains, and how to mix sources of one's own.

    moepp train --config=english --workdir=runs/english

Expected: the run's first lines say that Shakespeare is gone through 0.22 times, the Bible 0.20 and
Wikipedia 0.59; held-out loss is told for each domain and for the mixture of the three.
"""

from ml_collections import ConfigDict

from moepp_jax.configs import base, tiny


def get_config(variant: str = "moepp") -> ConfigDict:
    c = tiny.get_config(variant)
    c.data.sources = {
        "wikipedia": base.source("default/wikipedia", weight=60.0),
        "shakespeare": base.source("default/shakespeare", weight=25.0),
        "king_james": base.source("default/king_james", weight=15.0),
    }
    return c
