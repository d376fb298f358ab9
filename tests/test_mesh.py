"""Meshes that fit, meshes that do not, and where every parameter lies."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moepp_jax import mesh as mesh_lib
from moepp_jax.config import ConfigError
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
    ("path", "ndim", "spec"),
    [
        ("embedding", 2, P(BOTH, None)),
        ("output", 2, P(BOTH, None)),
        ("layers/attention/q", 3, P(None, BOTH, None)),
        ("layers/dense_0_attention/o", 3, P(None, BOTH, None)),
        ("layers/moe/ffn/w_in", 5, P(None, "expert", None, "fsdp", None)),
        ("layers/moe/ffn/w_out", 4, P(None, "expert", None, "fsdp")),
        ("layers/dense_0_dense/w_out", 3, P(None, BOTH, None)),
        ("layers/moe/router/w", 3, P(None, None, BOTH)),
        ("layers/moe/router/w_residual", 3, P()),
        ("layers/moe/const/v", 3, P(None, None, BOTH)),
        ("final/norm", 1, P(BOTH)),
        ("opt_state/1/0/mu/layers/moe/ffn/w_in", 5, P(None, "expert", None, "fsdp", None)),
    ],
)
def test_the_table(path, ndim, spec):
    assert mesh_lib.spec_of(path, ndim) == spec


def test_a_parameter_without_a_row_is_an_error():
    with pytest.raises(KeyError, match="layers/new matches 0 rows"):
        mesh_lib.spec_of("layers/new", 3)


def test_an_ambiguous_parameter_is_an_error(monkeypatch):
    monkeypatch.setattr(mesh_lib, "TABLE", (*mesh_lib.TABLE, ("embed", P())))
    with pytest.raises(KeyError, match="embedding matches 2 rows"):
        mesh_lib.spec_of("embedding", 2)


def test_sequences_of_a_batch_lie_on_devices_in_mesh_order():
    mesh = mesh_lib.make_mesh(shaped(2, 2, 2))
    rows = jax.device_put(np.arange(8)[:, None], mesh_lib.batch_sharding(mesh))
    where = {shard.device: int(shard.data[0, 0]) for shard in rows.addressable_shards}
    assert [where[device] for device in mesh.devices.flat] == list(range(8))
