"""The examples run as a reader would run them, and learn."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests import hurry

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["plain_jax", "flax_nnx"])
def test_loss_falls(name):
    # One device, as a reader has, but compiled in a hurry.
    env = os.environ | {"XLA_FLAGS": hurry.XLA_FLAGS, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py"],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", ran.stdout)]
    ffn = [float(x) for x in re.findall(r"FFN experts per token ([\d.]+)", ran.stdout)]
    assert len(losses) == len(ffn) > 5
    assert losses[-1] < losses[0] / 5
    assert all(0 < x < 2 for x in ffn)


def test_the_layer_of_the_readme_runs_as_it_stands():
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"The layer in a model of your own.*?\n\n(.*?)\n\nAn FFN", readme, re.DOTALL)
    names = {}
    exec(textwrap.dedent(block[1]), names)
    assert names["y"].shape == names["x_GSD"].shape
    assert names["logits"].shape == names["previous_logits_GSN"].shape
    assert "balance_loss" in names["losses"]
    assert all(loss.value.shape == () for loss in names["losses"].values())
