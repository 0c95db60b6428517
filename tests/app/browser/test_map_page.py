"""The map as a visitor uses it, in a browser without WebGL."""

import time
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Frame, Page

from cmacc.app.opened import Opened

from ..conftest import EVIL_FILE, EVIL_LABEL
from .conftest import served

Visit = Callable[..., Page]
_RANGE = "document.getElementById('map').layout.xaxis.range"


def map_of(page: Page) -> Frame:
    """The frame of the map, once it is drawn."""
    page.get_by_role("tab", name="Map", exact=True).click()
    page.frame_locator("iframe[name='/map']").locator("#map .point, #map .points path").first.wait_for()
    frame = page.frame(name="/map")
    assert frame is not None
    return frame


def wait_until(frame: Frame, condition: str) -> None:
    """Wait for a condition. Playwright's own wait compiles text in the page, which the page forbids."""
    deadline = time.monotonic() + 20
    while not frame.evaluate(condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.05)


def width_of(frame: Frame) -> float:
    first, last = frame.evaluate(_RANGE)
    return float(last - first)


def test_the_map(opened: Opened, visit: Visit, tmp_path: Path) -> None:
    """In one visit: opening the page is most of the work."""
    with served(opened, tmp_path) as address:
        page = visit(address)
        frame = map_of(page)
        it_zooms_by_buttons_wheel_and_keys_and_moves(page, frame)
        a_click_plays_the_clip_at_its_second(frame, address)
        a_film_that_browsers_do_not_play_is_played_in_parts(frame)


def it_zooms_by_buttons_wheel_and_keys_and_moves(page: Page, frame: Frame) -> None:
    whole = width_of(frame)
    frame.get_by_role("button", name="Zoom in").click()
    wait_until(frame, f"{_RANGE}[1] - {_RANGE}[0] < {whole * 0.71}")
    frame.get_by_role("button", name="Show all").click()
    wait_until(frame, f"{_RANGE}[1] - {_RANGE}[0] > {whole * 0.99}")
    box = frame.locator("#map").bounding_box()
    assert box is not None
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.wheel(0, -300)
    wait_until(frame, f"{_RANGE}[1] - {_RANGE}[0] < {whole * 0.95}")
    before, left = width_of(frame), frame.evaluate(_RANGE)[0]
    page.mouse.down()
    page.mouse.move(middle[0] - 80, middle[1], steps=4)
    page.mouse.up()
    wait_until(frame, f"{_RANGE}[0] > {left}")
    frame.locator("#map").focus()
    page.keyboard.press("-")
    wait_until(frame, f"{_RANGE}[1] - {_RANGE}[0] > {before * 1.4}")
    left = frame.evaluate(_RANGE)[0]
    page.keyboard.press("ArrowLeft")
    wait_until(frame, f"{_RANGE}[0] < {left}")
    page.keyboard.press("0")
    wait_until(frame, f"{_RANGE}[1] - {_RANGE}[0] > {whole * 0.99}")


def a_click_plays_the_clip_at_its_second(frame: Frame, address: str) -> None:
    # A window late in a film, with no other one near it (its sound may be at the same place).
    target = frame.evaluate("""() => {
        const axes = map._fullLayout, places = data.x.map((x, i) => [axes.xaxis.l2p(x), axes.yaxis.l2p(data.y[i])]);
        const same = (i, j) => data.name[j] === data.name[i] && data.start[j] === data.start[i];
        const apart = (p, q) => Math.hypot(p[0] - q[0], p[1] - q[1]);
        const far = (i) => Math.min(...places.map((p, j) => (same(i, j) ? 1e9 : apart(p, places[i]))));
        const fit = data.name.map((_, i) => i).filter((i) => data.start[i] >= 3 && data.name[i].includes("film-"));
        fit.sort((a, b) => far(b) - far(a));
        const i = fit[0];
        return {i, x: axes.xaxis._offset + places[i][0], y: axes.yaxis._offset + places[i][1],
            name: data.name[i], start: data.start[i], id: data.id[i], alone: far(i)};
    }""")
    assert target["alone"] > 2
    place = {"x": target["x"], "y": target["y"]}
    frame.locator("#map").hover(position=place)
    # A click is of the point that is hovered over, which a busy machine finds some time after the pointer has come.
    wait_until(frame, "(map._hoverdata || []).length > 0")
    frame.locator("#map").click(position=place)
    wait_until(frame, "document.getElementById('name').textContent !== ''")
    assert frame.locator("#name").inner_text() == target["name"]
    wait_until(
        frame,
        f"(v => v.readyState >= 2 && Math.abs(v.currentTime - {target['start']}) < 2.2"
        f" && v.currentTime >= {target['start']} - 0.1)(document.getElementById('video'))",
    )
    assert frame.evaluate("document.getElementById('video').currentSrc").startswith(
        f"{address}/media/{target['id']}#t={target['start']:g},"
    )


def a_film_that_browsers_do_not_play_is_played_in_parts(frame: Frame) -> None:
    frame.locator("#find").fill("old film")
    frame.locator("#list").focus()
    frame.locator("#list").press("ArrowDown")
    wait_until(frame, "document.getElementById('video').currentSrc.includes('/part?start=')")
    wait_until(frame, "document.getElementById('video').readyState >= 2")
    assert frame.locator("#name").inner_text() == "other/old film.avi"
    frame.locator("#find").fill("there is no such file")
    assert frame.locator("#list").inner_text() == "nothing found"


def test_names_stay_text_on_a_phone_in_the_dark(opened_run: Opened, visit: Visit, tmp_path: Path) -> None:
    with served(opened_run, tmp_path) as address:
        page = visit(address, width=380, dark=True)
        frame = map_of(page)
        frame.locator("#find").fill("<img")
        frame.locator("#list").select_option(index=0)
        wait_until(frame, "document.getElementById('name').textContent !== ''")
        assert frame.locator("#name").text_content() == EVIL_FILE
        assert EVIL_LABEL in (frame.locator("#facts").text_content() or "")
        assert "evil" not in page.title() + frame.title()
        assert frame.locator("img[src=x]").count() == 0
        for name in ("document.documentElement.scrollWidth - innerWidth",):
            assert frame.evaluate(name) <= 0
            assert page.evaluate(name) <= 0
        background = frame.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == "rgb(21, 23, 26)"
        colours = frame.evaluate("[...new Set(map.data.map((t) => t.marker.color))]")
        assert "#6fb4ec" in colours, "c1 of the dark theme"
