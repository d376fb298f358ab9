"""Where an array's axes lie in memory, said to a compiler that else would choose, and copy."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint


def in_order(x: jax.Array, *axes: int) -> jax.Array:
    """x, and its gradient, with these axes from the outermost to the innermost in memory."""
    return with_layout_constraint(x, Layout(major_to_minor=axes))


def as_written(x: jax.Array) -> jax.Array:
    """`in_order` of its shape."""
    return in_order(x, *range(x.ndim))
