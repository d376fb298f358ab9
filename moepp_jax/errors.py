"""The error that most rooms raise; it stands alone, so that analysis goes without JAX."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field, its value and the remedy."""
