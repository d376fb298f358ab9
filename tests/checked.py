"""How signatures are checked: in the core an int is no float, in what lies beside it it is one."""

import pkgutil
from pathlib import Path

from beartype import BeartypeConf, beartype

_PACKAGE = Path(__file__).parents[1] / "moepp_jax"
BESIDE = [f"moepp_jax.{name}" for name in ("benchmarks", "configs", "experiments")]
_EVERY = [f"moepp_jax.{module.name}" for module in pkgutil.iter_modules([str(_PACKAGE)])]
STRICTLY = [name for name in _EVERY if name not in BESIDE]

# As the typing of Python has it (PEP 484).
signature = beartype(conf=BeartypeConf(is_pep484_tower=True))
