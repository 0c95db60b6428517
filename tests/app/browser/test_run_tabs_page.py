"""The tabs of a run, in a browser."""

from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page

from cmacc.app.opened import Opened

from .conftest import served

Visit = Callable[..., Page]


def test_report_and_pages_that_are_made_on_request(opened_run: Opened, visit: Visit, tmp_path: Path) -> None:
    with served(opened_run, tmp_path / "uploads") as address:
        page = visit(address)
        page.get_by_role("tab", name="Training", exact=True).click()
        report = page.frame_locator("iframe[name='/run/report']")
        report.get_by_role("heading", name="first run").wait_for()
        page.get_by_role("link", name="Refresh").click()
        report.get_by_role("heading", name="Learning curves").wait_for()
        assert page.url.rstrip("/") == address

        page.get_by_role("tab", name="Negatives", exact=True).click()
        page.get_by_text("This page has not been made yet.").first.wait_for()
        page.get_by_role("button", name="Make this page").click()
        page.frame_locator("iframe[title='Negatives of the run']").get_by_role("heading", name="first run").wait_for()

        page.get_by_role("tab", name="Files", exact=True).click()
        page.get_by_role("button", name="Examine the files").click()
        page.frame_locator("iframe[title='State of the files']").get_by_text("24 files were examined").wait_for()


def test_a_manipulated_page_of_a_run_does_nothing(
    opened_run: Opened, run_dir: Path, visit: Visit, tmp_path: Path
) -> None:
    (run_dir / "inspect.html").write_text(
        "<!doctype html><title>t</title><h1>manipulated</h1>"
        "<script>document.querySelector('h1').textContent = 'ran'; parent.document.title = 'evil';</script>"
        "<img src=x onerror=\"document.querySelector('h1').textContent = 'ran'\">"
        "<form action='/gradio_api/queue/join' method='post'><button>send</button></form>"
        "<img src='/map/points'><link rel='stylesheet' href='/theme.css'>"
    )
    asked: list[str] = []
    with served(opened_run, tmp_path / "uploads") as address:
        page = visit(address)
        page.on("requestfinished", lambda request: asked.append(request.url))
        page.get_by_role("tab", name="Negatives", exact=True).click()
        stored = page.frame_locator("iframe[title='Negatives of the run']")
        stored.get_by_role("heading").wait_for()
        stored.get_by_role("button", name="send").click()
        page.wait_for_timeout(500)
        assert stored.get_by_role("heading").inner_text() == "manipulated"
        assert "evil" not in page.title()
        # The page by itself, without the frame of the app around it.
        alone = visit(f"{address}/run/negatives")
        alone.get_by_role("heading").wait_for()
        assert alone.get_by_role("heading").inner_text() == "manipulated"
    assert not any(url.endswith(("/map/points", "queue/join")) for url in asked)
