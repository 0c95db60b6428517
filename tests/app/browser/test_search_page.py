"""The search as a visitor does it, in a browser."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page

from cmacc.app.opened import Opened

from ..conftest import World
from .conftest import served


def test_look(world: World, opened: Opened, visit: Callable[..., Page], tmp_path: Path) -> None:
    with served(opened, tmp_path) as address:
        page = visit(address)
        page.get_by_role("button", name="Search", exact=True).wait_for()
        page.screenshot(path="/tmp/appsearch/1.png")
        page.locator("input[type=file]").first.set_input_files(world.film(1))
        page.get_by_text("film-1.mp4").first.wait_for()
        page.get_by_role("button", name="Options").click()
        page.get_by_label("Show the nearest, however bad").check()
        page.get_by_role("button", name="Search", exact=True).click()
        page.locator("#result-1").wait_for()
        page.wait_for_timeout(3000)
        page.screenshot(path="/tmp/appsearch/2.png", full_page=True)
        print(page.locator("#results").inner_text())
