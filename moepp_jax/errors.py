"""The error that most rooms raise, and a hint; they stand alone, so that analysis needs no JAX."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field, its value and the remedy."""


def did_you_mean(name: str, there: Iterable[str], otherwise: str = "") -> str:
    """Ends a message about an unknown name: with the one it is like, else with `otherwise`."""
    near = difflib.get_close_matches(name, list(there), n=1)
    hint = f"did you mean {near[0]}?" if near else otherwise
    return hint and f"; {hint}"
