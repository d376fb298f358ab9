"""The harness's own command line with the model `moepp_jax` in it.

    python -m moepp_jax.harness run --model moepp_jax --model_args workdir=runs/x --tasks sciq

Releases of lm_eval after 0.4.13 find the model themselves, by this package's entry point; there
`lm_eval run --model moepp_jax ...` is the same command.
"""

import importlib
import sys

from moepp_jax.checkpoint import CheckpointError
from moepp_jax.errors import ConfigError
from moepp_jax.harness.needed import require


def main() -> None:
    try:
        require("lm_eval")
        importlib.import_module("moepp_jax.harness.model")  # registers the model
        importlib.import_module("lm_eval.__main__").cli_evaluate()
    except (ConfigError, CheckpointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
