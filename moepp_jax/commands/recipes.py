"""recipes: lists the recipes of the package, for --config=NAME.

A recipe of your own is a file with a function get_config, as in `moepp_jax/configs/tiny.py`.
"""

from rich.console import Console
from rich.table import Table

from moepp_jax import recipes
from moepp_jax.commands import options


def run(arguments: list[str]) -> None:
    options.no_more(arguments)
    table = Table.grid(padding=(0, 2, 0, 0))
    for name in recipes.names():
        table.add_row(name, recipes.summary(name))
    Console(highlight=False).print(table)
    print(f"\nThey lie in {recipes.FOLDER}.")
