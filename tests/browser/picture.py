"""A picture of a routing page, small enough to be committed.

python -m tests.browser.picture runs/tiny/moepp/analysis/page.html docs/routing/page.png
"""

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

SIZE = {"width": 1280, "height": 880}
COLORS = 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--token", type=int, default=40, help="whose way is shown")
    given = parser.parse_args()
    with sync_playwright() as driver:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        scheme = "dark" if given.dark else "light"
        page = browser.new_page(viewport=SIZE, color_scheme=scheme)
        page.goto(given.page.resolve().as_uri())
        page.wait_for_selector("body[data-ready]")
        page.locator("#text .t").nth(given.token).hover()
        page.wait_for_timeout(300)
        taken = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    taken.convert("RGB").quantize(COLORS).save(given.out, optimize=True)


if __name__ == "__main__":
    main()
