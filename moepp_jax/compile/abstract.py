"""What programs are compiled for, without any of it there."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moepp_jax import mesh as mesh_lib
from moepp_jax.config import Config

_TYPES = {name: jnp.int32 for name in ("tokens", "targets", "segments", "positions")}
_TYPES |= {"loss_mask": jnp.float32}


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    shape = (config.train.batch_size, config.data.seq_len)
    sharding = mesh_lib.batch_sharding(mesh)
    return {k: jax.ShapeDtypeStruct(shape, t, sharding=sharding) for k, t in _TYPES.items()}
