"""The benchmark of conversion in small: that it measures what it says."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from moepp_jax.benchmarks import conversion
from tests import tiny

CONFIG = tiny.config(**{"model.num_layers": 2, "model.dtype": "bfloat16"})


def test_the_checkpoint_is_one_of_ours_of_that_size(tmp_path):
    size, layer = conversion.checkpoint(tmp_path / "source", CONFIG)
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    assert {a.dtype.name for a in tensors.values()} == {"bfloat16"}
    stored = sum(a.nbytes for a in tensors.values()) / 1e9
    assert stored < size < 1.2 * stored + 1e-4  # and names
    first = [a.size for name, a in tensors.items() if name.startswith("model.layers.0.")]
    assert layer == pytest.approx(4 * sum(first) / 1e9)
    fields = json.loads((tmp_path / "source" / "config.json").read_text())
    assert (fields["num_hidden_layers"], fields["torch_dtype"]) == (2, "bfloat16")
    assert np.isfinite(tensors["model.norm.weight"].astype(np.float32)).all()


def test_memory_is_that_of_the_process_at_its_peak():
    small, large = (conversion.run("-c", f"len(bytearray({n}))") for n in (10, 80_000_000))
    assert 0.07 < large.peak_gb - small.peak_gb < 0.09
    assert small.seconds > 0


@pytest.mark.slow
def test_conversion_is_measured(tmp_path):
    found = conversion.measure(CONFIG, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "run", "back"}
    for way in ("from-hf", "to-hf"):
        assert found[way].seconds > 0 and found[way].peak_gb >= 0.9 * found["imports alone"].peak_gb
