"""The results as HTML: what stands on the page, and that nothing from a file becomes markup."""

from pathlib import Path

import numpy as np
import pytest

from cmacc.app.library import Library
from cmacc.app.opened import Opened
from cmacc.app.queries import Asked, AskError, Picked, Uploaded, ask
from cmacc.app.rendering import message, without_paths
from cmacc.app.results import found_html, seconds_of
from cmacc.app.search_tab import _answered, _query
from cmacc.search import Index, SearchError

from ..search.made import make_index
from .conftest import World


def html_of(opened: Opened, asked: Asked) -> str:
    assert opened.index is not None
    return found_html(opened, asked, ask(opened.index, asked))


def test_a_card_for_each_moment(world: World, opened: Opened) -> None:
    html = html_of(opened, Asked(Uploaded(world.film(1)), 4.5, 7.5, top=100, nearest=True))
    name = opened.library.id_of(world.film(1))
    first = html[html.index('id="result-1"') : html.index('id="result-2"')]
    assert "odd/film-1.mp4" in first
    assert f'data-src="/media/{name}#t=' in first
    assert f'src="/media/{name}/frames?start=' in first
    assert f'data-src="/media/{name}/heat?start=' in first
    assert "nearer than all of 100,000 random pairs" in first
    # What is not played as it is gets a part that stands at the moment too.
    old = opened.library.id_of(world.films / "other" / "old film.avi")
    assert 'preload="none" aria-label="Play other/old film.avi' in html
    assert f'data-src="/media/{old}/part?start=' in html
    sound = opened.library.id_of(world.films / "other" / "sound.m4a")
    assert f"/media/{sound}/frames" not in html
    assert f"/media/{sound}/heat" not in html
    assert str(world.films.parent) not in html
    # Nothing but the pictures loads before it is looked at, and these when they come near.
    assert html.count("<img") == html.count('loading="lazy"') + html.count("/heat?") + html.count("data:image/")


def test_names_are_text(tmp_path: Path) -> None:
    bad = '<img src=x onerror="alert(1)">.mp4'
    label = "</li><script>alert(2)</script>"
    films = {bad: {"video": np.eye(4)[:2]}, "b.mp4": {"video": np.eye(4)[2:]}}
    index = make_index(tmp_path / "bad.index", films, root=tmp_path, labels={bad: label})
    opened = Opened("bad", Library([tmp_path]), Index.open(index), None)
    html = html_of(opened, Asked(Picked(bad), nearest=True))
    assert "&lt;img src=x onerror=" in html
    assert "<img src=x" not in html
    assert "<script" not in html
    assert "there is no such file any more" in html  # of a film that was never there
    assert "&lt;b&gt;" in message("<b>")


def test_nothing_found_says_what_it_means(world: World, opened: Opened, tmp_path: Path) -> None:
    small = html_of(opened, Asked(Uploaded(world.film(0))))
    assert "This index has too few files to tell a find from chance. These are the nearest" in " ".join(small.split())
    rng = np.random.default_rng(0)
    films = {f"{number}.mp4": {"video": rng.standard_normal((2, 16))} for number in range(150)}
    index = make_index(tmp_path / "large.index", films, root=tmp_path)
    large = Opened("large", Library([tmp_path]), Index.open(index), None)
    # Its own film is not searched in.
    html = html_of(large, Asked(Picked("3.mp4"), 0.0, 2.0, into="video", name_contains="4.mp4"))
    assert "Nothing found" in html
    assert "Nothing in 300 windows of this index is nearer" in html
    assert "What you can try" in html


@pytest.mark.parametrize(
    ("typed", "seconds"), [("", None), ("7", 7.0), (" 1:02.5 ", 62.5), ("1:00:00", 3600.0), ("0", 0.0)]
)
def test_times_as_typed(typed: str, seconds: float | None) -> None:
    assert seconds_of(typed) == seconds


@pytest.mark.parametrize("typed", ["x", "-1", "1:2:3:4", "1e9", "nan", "٣", "1:", "9" * 50, "<b>"])
def test_times_that_are_none(typed: str) -> None:
    with pytest.raises(AskError, match="must be seconds, or minutes and seconds as 1:15, got "):
        seconds_of(typed)


def test_only_uploads_are_searched_with(
    world: World, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "link.mp4").symlink_to(world.film(0))
    uploaded = tmp_path / "uploads" / "own.mp4"
    uploaded.write_bytes(world.film(0).read_bytes())
    assert _query(opened, "file", str(uploaded), None, None, "") == Uploaded(uploaded)
    assert _query(opened, "recording", None, str(uploaded), None, "") == Uploaded(uploaded)
    for path in (
        world.film(0),
        "/etc/passwd",
        tmp_path / "uploads" / "link.mp4",
        tmp_path / "uploads" / "../x",
        "http://a/b",
    ):
        with pytest.raises(AskError, match="must have been uploaded to this page"):
            _query(opened, "file", str(path), None, None, "")
    for name in ("0" * 24, "/etc/passwd", "odd/film-1.mp4"):
        with pytest.raises(AskError, match="Choose a file of the index"):
            _query(opened, "index", None, None, name, "")
    name = opened.library.id_of(world.film(1))
    assert _query(opened, "index", None, None, name, "") == Picked("odd/film-1.mp4")
    for kind in ("file", "recording", "index"):
        with pytest.raises(AskError, match=r"Choose a file|Record something"):
            _query(opened, kind, None, None, None, "")


def test_whatever_goes_wrong_no_stack_and_no_folder_is_shown(
    world: World, opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    assert opened.index is not None

    def broken() -> Asked:
        raise RuntimeError(f"secret of {world.films}")

    html = _answered(opened, opened.index, broken)
    assert "The search failed" in html
    assert "secret" not in html
    assert "secret" in caplog.text
    error = SearchError(
        "index /srv/the films/videos.index: the encoder must be there, got /root/.x/run, s3://b/c/d.tar"
    )
    assert without_paths(error) == "index videos.index: the encoder must be there, got run, d.tar"
