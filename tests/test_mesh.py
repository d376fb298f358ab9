"""Meshes that fit, meshes that do not, and where every parameter lies."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moepp_jax import mesh as mesh_lib
from moepp_jax import model
from moepp_jax.errors import ConfigError
from moepp_jax.moe.param import path_of
from tests import tiny

BOTH = ("fsdp", "expert")


def shaped(data, fsdp, expert, **changes):
    axes = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.expert": expert}
    return tiny.config(**axes, **changes)


@pytest.mark.parametrize(
    ("axes", "devices", "expected"),
    [
        ((1, 1, 1), 1, (1, 1, 1)),
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((-1, 1, 2), 8, (4, 1, 2)),
        ((2, -1, 2), 8, (2, 2, 2)),
        ((1, 2, -1), 8, (1, 2, 4)),
        ((8, 1, -1), 8, (8, 1, 1)),
    ],
)
def test_the_open_axis_takes_the_rest(axes, devices, expected):
    config = shaped(*axes)
    assert mesh_lib.mesh_shape(config, devices) == expected
    mesh = mesh_lib.make_mesh(config, jax.devices()[:devices])
    assert mesh.axis_names == ("data", "fsdp", "expert") and mesh.devices.shape == expected


@pytest.mark.parametrize(
    ("axes", "changes", "said"),
    [
        ((2, 1, 1), {}, r"data=2 x fsdp=1 x expert=1 does not multiply to the 8 devices .*-1"),
        ((16, 1, 1), {}, "data=16 x fsdp=1 x expert=1 does not multiply to the 8 devices"),
        ((-1, 3, 1), {}, "data=-1 x fsdp=3 x expert=1 does not multiply to the 8 devices"),
        ((-1, -1, 1), {}, "data=-1 x fsdp=-1 x expert=1 leaves more than one axis open"),
        (
            (1, 1, -1),
            {"moe.n_ffn": 6},
            r"config.mesh.expert = 8 must divide the FFN experts, config.moe.n_ffn = 6",
        ),
        (
            (1, -1, 1),
            {"model.hidden_size": 36, "model.num_heads": 2, "model.num_kv_heads": 2},
            r"fsdp=8 x expert=1 cuts .* 8 parts along config.model.hidden_size = 36",
        ),
        (
            (8, 1, 1),
            {"train.batch_size": 12},
            r"config.train.batch_size = 12 in config.train.accumulate = 1 parts gives 12 sequences"
            r", which must be a multiple of the 8 devices",
        ),
        (
            (8, 1, 1),
            {"train.batch_size": 24, "moe.group_size": 64},
            r"config.moe.group_size = 64 is 2 sequences, and of a part .* 8 devices has 3, which",
        ),
        (
            (8, 1, 1),
            {"train.batch_size": 8, "train.accumulate": 2},
            r"config.train.batch_size = 8 in config.train.accumulate = 2 parts gives 4 sequences",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_named(axes, changes, said):
    with pytest.raises(ConfigError, match=said):
        mesh_lib.make_mesh(shaped(*axes, **changes))


def test_parameters_stay_on_one_slice():
    assert mesh_lib.across_slices(2, (4, 2, 2)) == ((2, 2, 2), (2, 1, 1))
    with pytest.raises(ConfigError, match=r"config.mesh.data = 1 .* multiple of the 2 slices"):
        mesh_lib.across_slices(2, (1, 4, 2))


@pytest.mark.parametrize(
    ("axes", "devices"),
    [((-1, 1, 1), 1), ((-1, 1, 2), 2), ((-1, 2, 4), 8), ((2, 1, 4), 1), ((1, 1, 1), 1)],
)
def test_virtual_devices_are_made_for_an_open_axis_only(axes, devices):
    assert mesh_lib.virtual_cpu_devices(shaped(*axes)) == devices


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("embedding", P(BOTH, None)),
        ("output", P(BOTH, None)),
        ("layers/attention/q", P(None, BOTH, None)),
        ("layers/attention/q_norm/norm", P()),
        ("layers/dense_0_attention/o", P(None, BOTH, None)),
        ("layers/moe/ffn/w_in", P(None, "expert", None, "fsdp", None)),
        ("layers/moe/ffn/w_out", P(None, "expert", None, "fsdp")),
        ("layers/dense_0_dense/w_in", P(None, None, BOTH, None)),
        ("layers/dense_0_dense/w_out", P(None, BOTH, None)),
        ("layers/moe/router/w", P(None, None, BOTH)),
        ("layers/moe/router/w_residual", P()),
        ("layers/moe/router/bias", P()),
        ("layers/moe/const/v", P(None, None, BOTH)),
        ("layers/moe/const/w", P(None, None, None, BOTH)),
        ("layers/ffn_norm/norm", P(None, BOTH)),
        ("final/norm", P(BOTH)),
    ],
)
def test_where_each_parameter_lies(path, spec):
    changes = {"model.moe_every": 2, "model.qk_norm": "head", "moe.rule.bias_rate": 0.1}
    described = jax.tree_util.tree_leaves_with_path(model.describe(tiny.config(**changes)))
    of_path = {path_of(key_path): p for key_path, p in described}
    assert mesh_lib.spec_of(of_path[path]) == spec


def test_sequences_of_a_batch_lie_on_devices_in_mesh_order():
    mesh = mesh_lib.make_mesh(shaped(2, 2, 2))
    rows = jax.device_put(np.arange(8)[:, None], mesh_lib.batch_sharding(mesh))
    where = {shard.device: int(shard.data[0, 0]) for shard in rows.addressable_shards}
    assert [where[device] for device in mesh.devices.flat] == list(range(8))
