"""The search as a visitor does it, in a browser."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from cmacc.app.library import Library
from cmacc.app.opened import Opened
from cmacc.search import Index

from ...search.made import make_index
from ...search.scenes import SceneEncoder, write_scenes
from ..conftest import World
from .conftest import served

# The share of the difference of red, green and blue that the eye sees as brightness (WCAG 2.2).
_LUMINANCE = (0.2126, 0.7152, 0.0722)


@pytest.fixture(scope="module")
def address(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    index = Index.open(world.index, encoder=SceneEncoder())
    opened = Opened("films.index", Library([world.films]), index, None)
    with served(opened, tmp_path_factory.mktemp("uploads")) as address:
        yield address


@pytest.fixture
def sound(world: World, tmp_path: Path) -> Path:
    """The sound of the second scene of film 1."""
    return write_scenes(tmp_path / "heard.m4a", [(world.scenes[4], 3.0)], has_picture=False)


def search(page: Page) -> None:
    page.get_by_role("button", name="Search", exact=True).click()


def show_nearest(page: Page) -> None:
    page.get_by_role("button", name="Options").click()
    page.get_by_label("Show the nearest, however bad").check()


def upload(page: Page, path: Path) -> None:
    page.locator("input[type=file]").first.set_input_files(path)
    page.get_by_text(path.stem).first.wait_for()


def test_an_uploaded_sound_finds_its_film_and_plays_at_the_moment(
    world: World, address: str, visit: Callable[..., Page], sound: Path
) -> None:
    page = visit(address)
    show_nearest(page)
    page.get_by_label("Most results").first.fill("100")
    upload(page, sound)
    search(page)
    first = page.locator("#result-1")
    expect(first.get_by_role("heading")).to_contain_text("odd/film-1.mp4")
    player = first.locator("video")
    page.wait_for_function("document.querySelector('#result-1 video').readyState >= 1")
    start = float(first.locator("button").get_attribute("data-start") or "nan")
    assert start == pytest.approx(4.0, abs=0.6)
    page.wait_for_function("document.querySelector('#result-1 video').currentTime > 0")
    assert player.evaluate("player => player.currentTime") == pytest.approx(start, abs=0.1)
    # A file that browsers do not decode plays a converted part, which stands at the moment as well.
    old = page.locator("li", has_text="old film.avi").first.locator("video")
    old.scroll_into_view_if_needed()
    # Once more, because the page's setting of the source can interrupt it on a busy machine.
    old.evaluate("player => { player.muted = true; return player.play().catch(() => player.play()); }")
    page.wait_for_function(
        "[...document.querySelectorAll('li')].find(li => li.innerText.includes('old film')).querySelector('video')"
        ".currentTime > 0"
    )
    assert old.evaluate("player => player.error") is None
    # One sound at a time.
    player.evaluate("player => { player.muted = true; return player.play(); }")
    assert old.evaluate("player => player.paused")
    # The encoder of this index has no map: that is said when it is asked for.
    first.get_by_text("Where is the sound in the picture?").click()
    expect(first.locator("details")).to_contain_text("gives no map of the picture")


def test_with_the_keyboard_alone(world: World, address: str, visit: Callable[..., Page]) -> None:
    page = visit(address)
    page.get_by_role("button", name="Search", exact=True).wait_for()

    def tab_to(what: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate(what):
                return
        raise AssertionError(f"no way by the keyboard to {what}")

    tab_to("document.activeElement.value === 'index'")
    page.keyboard.press("Space")
    page.get_by_label("Part of the file's name").wait_for()
    tab_to("document.activeElement.tagName === 'TEXTAREA' || document.activeElement.type === 'text'")
    page.keyboard.type("FILM-3")
    expect(page.get_by_text("File of this index (1 fit)")).to_be_visible()
    tab_to("document.activeElement.innerText === 'Search'")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the options
    tab_to("document.activeElement.type === 'checkbox'")
    page.keyboard.press("Space")
    for _ in range(40):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.innerText === 'Search'"):
            break
    page.keyboard.press("Enter")
    expect(page.locator("#result-1").get_by_role("heading")).to_contain_text("odd/film-3.mp4")
    tab_to("document.activeElement.dataset.id !== undefined")
    page.keyboard.press("Enter")
    expect(page.get_by_role("region", name="Results")).to_contain_text("by picture and sound, 0:00.0 to 0:")


def test_a_small_index_and_what_is_wrong_with_a_file(
    world: World, address: str, visit: Callable[..., Page], sound: Path, tmp_path: Path
) -> None:
    page = visit(address)
    results = page.locator("#results")
    search(page)
    expect(results.get_by_role("alert")).to_have_text("Choose a file to search with.")
    upload(page, sound)
    search(page)
    expect(results).to_contain_text("too few files to tell a find from chance")
    (tmp_path / "broken.mp4").write_bytes(world.film(0).read_bytes()[:500])
    page.get_by_label("Clear").or_(page.get_by_label("Remove")).first.click()
    upload(page, tmp_path / "broken.mp4")
    search(page)
    expect(results.get_by_role("alert")).to_contain_text("broken.mp4 is no video, sound or picture")
    assert "/" not in results.inner_text()


def test_on_a_phone_in_the_light_and_in_the_dark(
    world: World, address: str, visit: Callable[..., Page], sound: Path
) -> None:
    page = visit(address, width=380)
    show_nearest(page)
    upload(page, sound)
    search(page)
    page.locator("#result-1").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    for dark in (False, True):
        page.emulate_media(color_scheme="dark" if dark else "light")
        page.wait_for_function(f"document.body.classList.contains('dark') == {str(dark).lower()}")
        page.wait_for_timeout(500)  # colours change over some time
        for part in ("h3", ".cm-quiet", ".cm-label", "summary", "button"):
            assert contrast(page, f"#result-1 {part}") >= 4.5, (part, dark)
        page_is_dark = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.2
        assert page_is_dark == dark


def test_a_hundred_results_load_only_what_is_seen(visit: Callable[..., Page], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    films = {f"{number:03}.mp4": {"video": rng.standard_normal((2, 9))} for number in range(120)}
    (tmp_path / "films").mkdir()
    one = write_scenes(tmp_path / "films" / "000.mp4", [([1, 0, 1, 0, 1, 0, 1, 0, 1], 3.0)])
    for name in films:
        if not (tmp_path / "films" / name).exists():
            (tmp_path / "films" / name).hardlink_to(one)
    index = make_index(tmp_path / "many.index", films, root=tmp_path / "films")
    opened = Opened("many", Library([tmp_path / "films"]), Index.open(index), None)
    with served(opened, tmp_path / "uploads") as address:
        page = visit(address)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url) if "/media/" in request.url else None)
        show_nearest(page)
        page.get_by_label("Most results").first.fill("100")
        page.get_by_label("A file of this index").check()
        page.get_by_label("Part of the file's name").fill("007")
        expect(page.get_by_text("File of this index (1 fit)")).to_be_visible()
        search(page)
        page.locator("#result-100").wait_for(state="attached")
        page.wait_for_function("document.querySelector('#result-1 video').readyState >= 1")
        assert 0 < len(asked) < 100
        assert not [url for url in asked if "/heat" in url or "/part" in url]
        before = len(asked)
        page.locator("#result-100").scroll_into_view_if_needed()
        page.wait_for_function("document.querySelector('#result-100 video').readyState >= 1")
        assert len(asked) > before


def contrast(page: Page, selector: str) -> float:
    """The contrast of a text with what is behind it, as WCAG 2.2 defines it."""
    colours = page.locator(selector).first.evaluate(
        """element => {
            const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
            const plain = (colour) => {
                canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
                return canvas.getImageData(0, 0, 1, 1).data;
            };
            const text = plain(getComputedStyle(element).color);
            let behind = element;
            while (behind && plain(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
            const back = plain(getComputedStyle(behind || document.body).backgroundColor);
            return [text, back].map((c) => `rgb(${c[0]}, ${c[1]}, ${c[2]})`);
        }"""
    )
    brighter, darker = sorted(map(luminance, colours), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``."""
    shares = [int(number) / 255 for number in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return sum(weight * value for weight, value in zip(_LUMINANCE, linear, strict=True))
