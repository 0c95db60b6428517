"""Pictures of every tab of `cmacc app`, wide and narrow, light and dark: ``tools/screenshots.py --out DIR``.

It stands in tools/, not in benchmarks/, because it measures nothing. It needs Chromium and Playwright (the extra
``dev``). Without ``--index`` and ``--run`` it shows demo-out of ``make demo``, or makes a tiny one in DIR.
"""

import argparse
import logging
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from playwright.sync_api import Page, sync_playwright

from cmacc.app.opened import open_target
from cmacc.app.server import make_app

DEMO = Path("demo-out")
WIDTHS = (1200, 380)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--index", type=Path, help="index to show (default: demo-out/index)")
    parser.add_argument("--run", type=Path, help="run to show (default: demo-out)")
    parser.add_argument("--tabs", nargs="+", help="only these tabs")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    demo = DEMO
    if (options.index is None and options.run is None) and not (demo / "index").is_dir():
        demo = _tiny_demo(options.out / "demo")
    chosen = [one for one in (options.index, options.run) if one is not None] or [demo / "index", demo]
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=FLAGS)
        for target in chosen:
            with _served(target, options.out) as address:
                for width in WIDTHS:
                    for scheme in ("light", "dark"):
                        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
                        page = context.new_page()
                        page.goto(address, wait_until="domcontentloaded")
                        name = f"{target.name}-{width}-{scheme}"
                        for picture in _pictures(page, options.out / name, options.tabs):
                            print(picture, flush=True)
                        context.close()
        browser.close()
    return 0


def _tiny_demo(out: Path) -> Path:
    from cmacc.cli import main as cmacc

    if not (out / "index").is_dir():
        # One checkpoint and a few steps: enough for every tab to show something.
        assert cmacc(["demo", "--out", str(out), "--clips", "96", "--steps", "10", "--overwrite"]) == 0
    return out


def _pictures(page: Page, folder: Path, wanted: Sequence[str] | None) -> Iterator[Path]:
    page.get_by_role("tab").first.wait_for()
    # On a narrow screen, the tabs that do not fit are in a menu, which is empty until it is opened.
    tabs = ["Search", "Map", "Training", "Negatives", "Files"]
    if page.get_by_role("tab", name="Search", exact=True).count() == 0:
        tabs.remove("Search")
    for tab in tabs if wanted is None else wanted:
        _open_tab(page, tab)
        if tab == "Map":
            inside = page.frame_locator("iframe[title^='Map']")
            inside.locator("#list option").first.wait_for(state="attached", timeout=60_000)
            inside.locator("#list").select_option(index=1)
        page.wait_for_timeout(4000)  # reports render, videos and pictures load
        picture = folder.with_name(f"{folder.name}-{tab.lower()}.png")
        page.screenshot(path=picture)
        yield picture


def _open_tab(page: Page, tab: str) -> None:
    """Click a tab; on a narrow screen, the last ones are in a menu."""
    place = page.get_by_role("tab", name=tab, exact=True)
    if place.first.is_visible():
        place.first.click()
        return
    page.locator(".overflow-menu > button").click()
    page.locator(".overflow-dropdown button", has_text=tab).click()


@contextmanager
def _served(target: Path, folder: Path) -> Iterator[str]:
    app = make_app(open_target(str(target)), uploads=folder / "uploads")
    server = uvicorn.Server(uvicorn.Config(app, log_level=logging.ERROR))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = server.force_exit = True
        thread.join(10)


if __name__ == "__main__":
    raise SystemExit(main())
