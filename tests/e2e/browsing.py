"""A service as a process and a browser that looks at it: nothing here knows what the page shows."""

import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Playwright

from tests.end_to_end.drivers import ROOT, environment, free_port, wait_until

SERVE = ROOT / "launch" / "serve.py"
SHOTS = ROOT / "runs" / "e2e"  # what the tests saw, for people
WIDE, NARROW = 1400, 390
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


def launch(playwright: Playwright) -> Browser:
    """Start the machine's own Chromium, headless. Fails, saying how to install it, where there is none."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("no chromium on the path: `apt-get install chromium` on Debian, then run again")
    return playwright.chromium.launch(executable_path=path, args=FLAGS)


@contextmanager
def serving(log: Path, *arguments: str) -> Iterator[str]:
    """Run launch/serve.py on a free port of this machine and give its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, SERVE, *arguments, "--port", str(port)], cwd=ROOT, env=environment(OMP_NUM_THREADS="1"),
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_until(lambda: process.poll() is not None or is_up(url), "the service")
        assert process.poll() is None, log.read_text()
        yield url
    finally:
        process.terminate()
        process.wait(30)


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/page/login", timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@dataclass
class Visitor:
    """One reader with a browser window of their own; remembers what must never happen."""

    browser: Browser
    url: str
    wrong: list[str] = field(default_factory=list)
    pages: list[Page] = field(default_factory=list)

    def page(self, width: int = WIDE, scheme: str = "light") -> Page:
        """Open a window without cookies."""
        context = self.browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if scheme == "dark" else "light"
        )
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda m: self.wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: self.wrong.append(str(e)))
        page.on("request", lambda r: None if self.own(r.url) else self.wrong.append(f"foreign request {r.url}"))
        page.on("websocket", lambda s: None if self.own(s.url) else self.wrong.append(f"foreign socket {s.url}"))
        self.pages.append(page)
        return page

    def own(self, url: str) -> bool:
        host = self.url.removeprefix("http://")
        return url.startswith((f"http://{host}/", f"ws://{host}/", "data:", f"blob:http://{host}/"))

    def go(self, address: str, width: int = WIDE, scheme: str = "light") -> Page:
        """Open an address below the page's folder in a new window, and wait until it stands."""
        page = self.page(width, scheme)
        page.goto(f"{self.url}/page/{address}")
        settled(page)
        return page

    def leave(self) -> None:
        """Close every window. AssertionError for a console error, a script's failure or a request to another host."""
        for page in self.pages:
            page.context.close()
        assert not self.wrong, self.wrong


def settled(page: Page) -> None:
    """Wait until the page's socket is there, so that a press is heard."""
    page.wait_for_function("window.socket && window.socket.connected && document.querySelector('main')")


def shoot(page: Page, name: str) -> None:
    """Keep what the window shows as runs/e2e/<name>.png."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(SHOTS / f"{name}.png"))
