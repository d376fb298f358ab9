"""The examples run as a reader would run them, and learn."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["plain_jax", "flax_nnx"])
def test_loss_falls(name):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device, as a reader has
    ran = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py"],
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", ran.stdout)]
    ffn = [float(x) for x in re.findall(r"FFN experts per token ([\d.]+)", ran.stdout)]
    assert len(losses) == len(ffn) > 5
    assert losses[-1] < losses[0] / 5
    assert all(0 < x < 2 for x in ffn)
