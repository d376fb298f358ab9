"""Draws an analysis anew from its file, without JAX.

python -m moepp_jax.analysis FOLDER           # REPORT.md, tables and figures
python -m moepp_jax.analysis FOLDER --page    # and page.html
"""

import argparse
import sys
from pathlib import Path

from moepp_jax.analysis import draw
from moepp_jax.errors import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="that has a routing.parquet")
    parser.add_argument("--page", action="store_true", help="write page.html too")
    parser.add_argument("--page_tokens", type=int, default=50_000, help="of the page, at most")
    given = parser.parse_args()
    if given.page_tokens < 1:
        parser.error(f"--page_tokens={given.page_tokens} must be at least 1")
    try:
        for written in draw.draw(given.folder, given.page_tokens if given.page else 0):
            print(f"written {written}")
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
