"""Eight virtual CPU devices for every test, set before JAX starts; without them nothing runs."""

import dataclasses
import gc
import os

from tests import checked, hurry

# Collectives block threads of JAX's CPU pools: with fewer threads than this they can deadlock.
os.environ.setdefault("PJRT_NPROC", "32")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        hurry.XLA_FLAGS,
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

# Shapes and types in signatures are checked whenever a test calls a function of the package.
install_import_hook(checked.STRICTLY, "beartype.beartype")
install_import_hook(checked.BESIDE, f"{checked.__name__}.signature")

# Tracing makes many objects and few cycles: looking for those was an eighth of all tests' time.
gc.set_threshold(20_000, 20, 20)

import jax  # noqa: E402
import pytest  # noqa: E402

from moepp_jax.interop import safetensors_file  # noqa: E402
from moepp_jax.moe import Blocked, kernels  # noqa: E402


def pytest_collection_finish(session):
    gc.freeze()  # what the imports made stays


def pytest_sessionfinish(session):
    gc.freeze()  # or pytest would look five times through what all tests have left


def pytest_sessionstart(session):
    if jax.device_count() < 8:
        raise RuntimeError(f"the tests need 8 devices and JAX has {jax.devices()}")


@pytest.fixture(autouse=True, scope="session")
def small_blocks():
    """Few sizes of a block are few branches to compile: half of the time of dropless models.

    The tests' few rows then make full blocks too, beside the odd ones.
    """
    chosen = kernels.grouped_function

    def small(platform, scanned=False):
        grouped = chosen(platform, scanned)
        return dataclasses.replace(grouped, block=16) if isinstance(grouped, Blocked) else grouped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "grouped_function", small)
        yield


@pytest.fixture
def twentieth_read_fails(monkeypatch):
    """Of a checkpoint's tensors; what was read so far is in the list."""
    reads = []

    def read(file, entry, real=safetensors_file.read):
        reads.append(entry)
        if len(reads) == 20:
            raise OSError(5, "Input/output error")
        return real(file, entry)

    monkeypatch.setattr(safetensors_file, "read", read)
    return reads
