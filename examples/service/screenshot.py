"""A picture of the page of a running service, after it has spoken: `python -m service.screenshot URL FILE.png`.

Needs: pip install 'accelerate_tts[screenshots]', and a Chromium (Debian's package `chromium`)
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")
# A page of this machine needs nothing of the network, and a sandbox is not to be had in most containers.
_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--autoplay-policy=no-user-gesture-required",
)  # fmt: skip
_MILLISECONDS = 60_000


def find_browser() -> str | None:
    """Return the path of an installed Chromium, or `None`."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


@contextmanager
def opened(url: str, width: int = 760, height: int = 1000) -> Generator[Any, None, None]:
    """Open a service's page in a headless Chromium. Yields playwright's page, ready to speak.

    Raises:
        FileNotFoundError: No Chromium is installed.
    """
    path = find_browser()
    if path is None:
        raise FileNotFoundError(f"none of {', '.join(_NAMES)} is installed; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(_FLAGS))
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(_MILLISECONDS)
            page.goto(url)
            wait_for(page, "Ready.")
            yield page
        finally:
            browser.close()


def wait_for(page: Any, status: str) -> None:
    """Wait until the page says something."""
    page.get_by_role("status").get_by_text(status, exact=True).wait_for()


def main(arguments: list[str]) -> None:
    """Speak, and write the picture."""
    url, file = arguments
    with opened(url) as page:
        page.get_by_role("button", name="Speak").click()
        wait_for(page, "Done.")
        page.screenshot(path=file)


if __name__ == "__main__":
    main(sys.argv[1:])
