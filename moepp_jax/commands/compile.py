"""compile --config=RECIPE --topology=v5p:4x4x4: the training step for devices you do not have.

--topology=h100:8x8 is eight hosts of eight GPUs. Prints memory, communication and bounds on the
step time. Exits with status 2 if it does not fit.
"""

import sys

from absl import flags

from moepp_jax import compile
from moepp_jax.commands import options
from moepp_jax.compile import topology
from moepp_jax.errors import ConfigError

for _name in ("config", "topology", "json"):
    flags.declare_key_flag(_name)


def run(arguments: list[str]) -> None:
    options.no_more(arguments)
    if not options.TOPOLOGY.value:
        raise ConfigError(f"no --topology was given: write --topology={topology.EXAMPLES}")
    if not compile.run(options.given_config(), options.TOPOLOGY.value, options.JSON.value):
        sys.exit(2)
