"""The one error of this room."""

from moepp_jax.errors import ConfigError


class ConversionError(ConfigError):
    """A checkpoint that cannot be converted; the message names the file, the field or tensor."""
