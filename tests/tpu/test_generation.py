"""Generation compiled for TPUs that are not there: `make test-tpu-compile`."""

import pytest

from tests.tpu.test_pods import compile_for

pytestmark = pytest.mark.tpu_compile

SMALL = {
    "model__num_layers": 2,
    "data__seq_len": 1024,
    "moe__group_size": 1024,
    "train__batch_size": 8,
    "mesh__expert": 4,
}


@pytest.fixture(scope="module")
def generation(tmp_path_factory) -> tuple[dict, dict]:
    """What one chip needs, and each of a host's four."""
    folder = tmp_path_factory.mktemp("generation")
    one, host = compile_for("v5p:2x2x1", "moepp_0p6b", folder, "--generation", **SMALL)[
        "generation"
    ]
    assert (one["devices"], host["devices"]) == (1, 4) and one["fits"] and host["fits"]
    return one, host


def test_experts_are_read_where_they_lie(generation):
    """Token by token on one chip: the caches lie there twice more, the experts never."""
    one, _ = generation
    assert one["decode"]["temporary_bytes"] < 2.2 * one["cache_bytes"] < one["parameter_bytes"]


def test_a_host_has_a_part_of_parameters_and_caches_on_each_chip(generation):
    one, host = generation
    assert host["cache_bytes"] == one["cache_bytes"] / 4
    assert host["parameter_bytes"] < 1.01 * one["parameter_bytes"] / 4
    for program in ("prefill", "decode"):
        assert host[program]["hbm_bytes"] < one[program]["hbm_bytes"]
