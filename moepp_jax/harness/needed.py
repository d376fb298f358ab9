"""The packages that only benchmarks need."""

import importlib.util

from moepp_jax.errors import ConfigError


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def require(package: str) -> None:
    """
    Raises:
      ConfigError: the package is not installed; the message says how to install it.
    """
    if not is_installed(package):
        raise ConfigError(
            f"benchmarks need the package {package}: pip install lm-eval, or "
            "pip install moepp_jax[eval]"
        )
