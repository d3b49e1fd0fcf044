"""The README's pictures, taken of a service over the demo's run.

python launch/serve.py runs/demo/run &
python -m tests.e2e.screenshots http://127.0.0.1:8000
"""

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.e2e.browsing import NARROW, WIDE, Visitor, launch

DOCS = Path(__file__).parents[2] / "docs"
PICTURES = {
    "query": ("query?id=277&k=5", WIDE, 860, "light"),
    "label-errors": ("examples?percent=5", WIDE, 860, "light"),
    "graph": ("graph?queries=262,55,277,149,186&k=3", WIDE, 860, "dark"),
    "narrow": ("query?id=277&k=5", NARROW, 844, "light"),
}


def main(url: str) -> None:
    """Write docs/<name>.png of every picture."""
    DOCS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = launch(playwright)
        visitor = Visitor(browser, url)
        for name, (address, width, height, scheme) in PICTURES.items():
            page = visitor.go(address, width, scheme)
            page.set_viewport_size({"width": width, "height": height})
            page.wait_for_timeout(500)  # a chart fits itself to the window
            page.screenshot(path=str(DOCS / f"{name}.png"))
        visitor.leave()
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
