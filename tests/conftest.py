"""Eight virtual CPU devices for every test, set before JAX starts; without them nothing runs."""

import os

# Collectives block threads of JAX's CPU pools: with fewer threads than this they can deadlock.
os.environ.setdefault("PJRT_NPROC", "32")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Compiling is most of what tests do: this takes a third of the time for the same sums.
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

# Shapes in signatures are checked whenever a test calls a function of these packages.
install_import_hook("moepp_jax", "beartype.beartype")

import jax  # noqa: E402


def pytest_sessionstart(session):
    if jax.device_count() < 8:
        raise RuntimeError(f"the tests need 8 devices and JAX has {jax.devices()}")
