"""Prints the training step as the compiler leaves it: tests.tpu.compiled TOPOLOGY FIELD=VALUE ...

In a process of its own, as the TPU compiler serves one at a time.
"""

import ast
import sys

from moepp_jax import mesh as mesh_lib
from moepp_jax.compile import step
from moepp_jax.compile.topology import Topology, devices
from moepp_jax.config import Config
from moepp_jax.configs import base


def main(topology: str, *changes: str) -> None:
    there = devices(Topology.parse(topology))
    fields = base.get_config()
    pairs = (change.split("=") for change in changes)
    fields.update_from_flattened_dict({name: ast.literal_eval(value) for name, value in pairs})
    config = Config.parse(fields)
    print(step.compile_step(config, mesh_lib.make_mesh(config, there)).as_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
