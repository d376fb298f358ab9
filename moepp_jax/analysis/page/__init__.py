"""The routing page: a text with every token coloured by how many FFN experts it used."""

from moepp_jax.analysis.page.build import build

__all__ = ["build"]
