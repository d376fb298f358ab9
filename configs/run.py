"""The configuration of a run that is there, to be used again or changed by flags.

    moepp train --config=run:runs/x --config.seed=1 --workdir=runs/y
    moepp evaluate --config=run:runs/x --config.mesh.expert=1 --workdir=runs/x

Expected: the same run from another beginning; what evaluate says without --config, on another mesh.
"""

from ml_collections import ConfigDict

from moepp_jax.workdir import read_config


def get_config(workdir: str = "") -> ConfigDict:
    if not workdir:
        raise ValueError("of which run? write --config=run:WORKDIR")
    return ConfigDict(read_config(workdir).to_dict())
