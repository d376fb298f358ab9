"""compile --config=RECIPE --topology=v5p:4x4x4: the training step for devices you do not have.

--topology=h100:8x8 is eight hosts of eight GPUs. Prints memory, communication and bounds on the
step time. Exits with status 2 if it does not fit.

compile ... --profile predicts the step's time by part, for TPUs: compiled as far as its schedule,
within seconds. --profile=full compiles to the end and tells the compiler's own numbers beside.
With --figure=FILE.png, or beside the file of --json, it draws them next to the vanilla twin's.

compile ... --profile --choose_remat predicts it with every model.remat, and names the fastest that
fits.

compile ... --generation compiles what `generate` runs too, for one device and for all of a host.
"""

import sys

from absl import flags

from moepp_jax import compile
from moepp_jax.commands import options
from moepp_jax.compile import topology
from moepp_jax.errors import ConfigError

for _name in ("config", "topology", "json", "profile", "figure", "generation", "choose_remat"):
    flags.declare_key_flag(_name)

_PROFILES = {None: None, "false": None, "true": "fast", "fast": "fast", "full": "full"}


def run(arguments: list[str]) -> None:
    options.no_more(arguments)
    if not options.TOPOLOGY.value:
        raise ConfigError(f"no --topology was given: write --topology={topology.EXAMPLES}")
    if not compile.run(
        options.given_config(),
        options.TOPOLOGY.value,
        options.JSON.value,
        profiled(options.PROFILE.value),
        options.FIGURE.value,
        options.GENERATION.value,
        options.CHOOSE_REMAT.value,
    ):
        sys.exit(2)


def profiled(given: str | None) -> str | None:
    """What --profile asks `compile.run` for.

    Raises:
      ConfigError: it asks for something else.
    """
    if given not in _PROFILES:
        raise ConfigError(f"--profile={given}: of compile it is --profile or --profile=full")
    return _PROFILES[given]
