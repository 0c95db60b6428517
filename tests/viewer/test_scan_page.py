"""The page of a scan: it says what the scan found, needs no network, and takes nothing from a file for markup."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cmacc.clips import LabelTable, ScanResult, list_folders, scan
from cmacc.viewer import ReportError, render_scan_page, write_scan_page

from ..clips.films import changing_sound, moving_picture, write_film


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("films")
    for seed in range(2):
        write_film(root / f"{seed}.mp4", moving_picture(0.6 + seed, seed), changing_sound(0.6 + seed, seed))
    shutil.copy(root / "0.mp4", root / "copy.mp4")
    write_film(root / "mute.mp4", moving_picture(1.0, 3), None)
    write_film(root / "<b>&'\".mp4", moving_picture(0.3, 4), changing_sound(0.3, 4))
    (root / "broken.mp4").write_bytes(b"no film")
    for name in ("a.txt", "b.txt", "c.jpg"):
        (root / name).touch()
    return root


@pytest.fixture(scope="module")
def result(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ScanResult:
    table = tmp_path_factory.mktemp("table") / "t.csv"
    table.write_text("file,label\n0.mp4,x\ngone/<i>.mp4,y\n")
    return scan(list_folders([folder], LabelTable(table)), min_seconds=0.5)


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<style.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL).split())


def test_counts_reasons_and_pictures(result: ScanResult) -> None:
    page = render_scan_page(result)
    text = text_of(page)
    assert "6 files were examined; 4 samples are in the manifest, 3 of them with video and audio" in text
    assert result.manifest.fingerprint() in text
    for row in ("unreadable 1 16.7%", "too_short 1 16.7%", "no_audio 1 16.7%", "duplicate 1 16.7%"):
        assert row in text
    assert "broken.mp4 unreadable: does not decode" in text
    assert "too_short: 0.30 s, must be at least 0.5 s" in text
    assert "copy.mp4 of 0.mp4" in text
    assert page.count("data:image/jpeg;base64,") == 1  # the short one; the broken one has no picture
    assert page.count("<svg") == 4
    assert "1 of 2 files in the list are missing" in text
    assert "5 media files are not named in the list" in text
    assert "3 files were not examined because of the file extension: .txt 2, .jpg 1." in text


def test_names_do_not_become_markup(result: ScanResult) -> None:
    page = render_scan_page(result)
    assert "<b>&'" not in page
    assert "&lt;b&gt;&amp;&#39;&#34;.mp4" in page
    assert "gone/&lt;i&gt;.mp4" in page


class _Addresses(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "object", "embed")
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_nothing_comes_from_the_network(result: ScanResult) -> None:
    addresses = _Addresses()
    addresses.feed(render_scan_page(result))
    assert all(address.startswith(("data:", "#")) for address in addresses.found)


def test_same_files_same_page_and_none_is_overwritten(result: ScanResult, tmp_path: Path) -> None:
    page = write_scan_page(result, tmp_path / "page.html")
    assert page.read_text() == render_scan_page(result)
    with pytest.raises(ReportError, match=r"page\.html: exists already; give --overwrite"):
        write_scan_page(result, page)
    write_scan_page(result, page, overwrite=True)


def test_a_scan_of_nothing_but_broken_files(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no film")
    text = text_of(render_scan_page(scan(list_folders([tmp_path]))))
    assert "0 samples are in the manifest" in text
    assert "a.mp4 unreadable" in text
