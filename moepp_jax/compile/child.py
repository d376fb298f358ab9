"""What `scheduled` starts: the training step of a configuration, compiled for a topology.

python -m moepp_jax.compile.child CONFIG.json v5p:4x4x4
"""

import json
import sys
from pathlib import Path

from moepp_jax import mesh as mesh_lib
from moepp_jax.compile import step, topology
from moepp_jax.config import Config


def main(file: str, text: str) -> None:
    config = Config.parse(json.loads(Path(file).read_text()))
    there = topology.devices(topology.Topology.parse(text))
    step.compile_step(config, mesh_lib.make_mesh(config, there))


if __name__ == "__main__":
    main(*sys.argv[1:])
