"""The picture in the README: an equation of the built book with its badge, and its check opened.

After `make book`: `python -m tools.screenshot [--label nb-reversed]`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

from tools.notebooks import chapters, labels, text_path

PICTURE = Path("book", "_static", "page.png")
WIDTH, MARGIN = 1400, 14
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def take(root: Path, label: str) -> None:
    """Write `PICTURE`: equation `label`, its check opened, under the paragraph that leads to it."""
    home = [name for name in chapters(root) if label in labels(text_path(root, name).read_text(encoding="utf-8"))]
    if not home:
        raise SystemExit(f"--label {label}: no chapter has an equation of that name")
    address = (root / "_build" / "html" / "notebooks" / f"{home[0]}.html").resolve().as_uri()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        size = {"width": WIDTH, "height": 1000}
        page = browser.new_page(viewport=size, color_scheme="light", device_scale_factor=1.5)
        page.goto(address)
        page.evaluate("Promise.all([document.fonts.ready, MathJax.startup.promise])")
        equation = page.locator(f".ledger-equation:has(#equation-{label})")
        check = equation.locator("xpath=following-sibling::*[1]")
        check.locator("summary").click()
        page.mouse.move(0, 0)  # a link under the mouse looks different
        # The bar at the top of the page would lie over the text.
        page.add_style_tag(content=".bd-header-article, .copybtn { display: none !important; }")
        first = equation.locator("xpath=preceding-sibling::p[1]").bounding_box()
        last = check.bounding_box()
        clip = {
            "x": first["x"] - MARGIN,
            "y": first["y"] + page.evaluate("window.scrollY") - MARGIN,
            "width": first["width"] + 2 * MARGIN,
            "height": last["y"] + last["height"] - first["y"] + 2 * MARGIN,
        }
        page.screenshot(path=root / PICTURE, full_page=True, clip=clip)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.screenshot", description=__doc__.split("\n")[0])
    parser.add_argument("--label", default="nb-reversed", help="the equation to show (its check directly beneath it)")
    take(Path(), parser.parse_args().label)


if __name__ == "__main__":
    main()
