"""A real browser, and the page served on a free port of this machine."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from cmacc.app.opened import Opened

from ..serving import serving

_CHROMIUM = "/usr/bin/chromium"
_TIMEOUT_SECONDS = 40  # of one step, on a machine whose cores others use too
expect.set_options(timeout=1000 * _TIMEOUT_SECONDS)
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def served(opened: Opened, uploads: Path) -> Iterator[str]:
    """The address of the page of an index or run, served by a thread of this process."""
    from cmacc.app.server import make_app

    with serving(make_app(opened, uploads=uploads)) as host:
        yield f"http://{host}"


# Of a module: while Playwright runs, its event loop does too, and other tests could not run one in this thread.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium; skips where there is none, which in CI is a failure."""
    path = _CHROMIUM if Path(_CHROMIUM).exists() else shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        assert "CI" not in os.environ, "CI must have Chromium for the tests of the page"
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open a page: ``visit(address, width=1280, dark=False)``. Errors of its scripts fail the test."""
    faults: list[str] = []
    with ExitStack() as stack:

        def open_page(address: str, *, width: int = 1280, dark: bool = False) -> Page:
            scheme = "dark" if dark else "light"
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(1000 * _TIMEOUT_SECONDS)
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.goto(address, wait_until="domcontentloaded")
            return page

        yield open_page
    assert not faults, faults
