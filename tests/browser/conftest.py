"""A real browser, for the tests in this folder.

`BROKER_CHROMIUM` names another browser than the `chromium` on the path.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

FLAGS = [
    # A container's root has no sandbox to use; without the others it calls its maker at each start.
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


# Not for the session: Playwright keeps an event loop in this thread while it runs.
@pytest.fixture(scope="module")
def chromium(missing: Callable[[str], NoReturn]) -> Iterator[Any]:
    path = os.environ.get("BROKER_CHROMIUM") or shutil.which("chromium")
    if path is None:
        missing("chromium is not installed (Debian: apt-get install chromium)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed: run `nox -s browser`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def context(chromium: Any) -> Iterator[Any]:
    """A fresh profile; its pages are the tabs of one window. Waits give up after 8 s."""
    context = chromium.new_context(viewport={"width": 1100, "height": 760})
    context.set_default_timeout(8000)
    yield context
    context.close()
