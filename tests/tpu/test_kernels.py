"""Which kernels are in the step that the TPU compiler makes: `make test-tpu-compile`."""

import re
import subprocess
import sys

import pytest

from tests.tpu.test_pods import ENVIRONMENT, ROOT

pytestmark = pytest.mark.tpu_compile

SMALL = {
    "model.num_layers": 2,
    "model.remat": "exchanged",
    "data.seq_len": 1024,
    "moe.group_size": 1024,
    "train.batch_size": 8,
    "mesh.expert": 4,
}


DROPLESS = {"moe.dispatch": "dropless", "moe.exchange_buffer": 0.35}


def kernels(topology: str = "v5p:2x2x1", **changes) -> list[str]:
    """Names of the Pallas kernels and the compiler's own, as often as they stand in the program."""
    fields = [f"{name}={value!r}" for name, value in (SMALL | changes).items()]
    command = [sys.executable, "-m", "tests.tpu.compiled", topology, *fields]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = [line for line in done.stdout.splitlines() if '"tpu_custom_call"' in line]
    return [re.match(r"\s*(?:ROOT )?%?([a-z_-]+)", line)[1] for line in calls]


@pytest.mark.parametrize(
    ("width", "heads", "kv_heads", "window", "length"),
    [(64, 4, 4, 0, 1024), (96, 4, 2, 0, 1024), (128, 4, 2, 512, 8192)],
)
def test_attention_is_one_kernel(width, heads, kv_heads, window, length):
    """Forward, once more in backward, and the gradient; of a long sequence in two kernels."""
    shape = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": width}
    model = {f"model.{name}": value for name, value in shape.items()}
    model |= {"model.sliding_window": window, "data.seq_len": length, "moe.group_size": length}
    found = [name for name in kernels(**model) if name.startswith("splash")]
    gradient = ["splash_mha_dkv_segmented_no_residuals"]
    gradient += ["splash_mha_dq_segmented_no_residuals"] * (length > 4096)
    assert sorted(found) == [*gradient, *["splash_mha_fwd_segmented_residuals"] * 2]


def test_kept_answers_of_attention_are_not_computed_again():
    found = kernels(**{"model.remat": "attention"})
    assert sum(name.startswith("splash_mha_fwd") for name in found) == 1


def test_plain_products_where_they_are_asked_for():
    assert kernels(**{"model.attention": "xla"}) == []


def test_a_bounded_exchange_keeps_the_kernel_of_the_experts():
    """0.35 x 2 x 2,048 are no whole tiles, of which alone XLA makes its kernel: five products."""
    found = kernels(**DROPLESS)
    assert found.count("ragged-dot-none") == 5


def test_between_products_only_filled_rows_are_gone_through():
    """The activation forward, and once more with its gradient; h itself is a product."""
    assert kernels(**DROPLESS).count("experts_rows") == 2
