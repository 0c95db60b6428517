"""The documentation site builds without a warning, and nothing in it leads nowhere or needs a network."""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("mkdocs", reason="needs the extra docs")

ROOT = Path(__file__).parents[2]
_LOADS = {("img", "src"), ("script", "src"), ("source", "src"), ("video", "src"), ("iframe", "src"), ("link", "href")}


@dataclass
class Page(HTMLParser):
    """What a page of HTML leads to, loads, and can be led to."""

    text: str
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    without_text: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {name: value or "" for name, value in attrs}
        self.anchors |= {names[name] for name in ("id", "name") if name in names}
        if tag == "a" and "href" in names:
            self.links.append(names["href"])
        self.loads += [names[name] for of, name in _LOADS if tag == of and names.get(name)]
        if tag == "img" and not names.get("alt"):
            self.without_text.append(names.get("src", ""))


def faults(site: Path) -> list[str]:
    """Every link, anchor and image of a built site that leads nowhere, and all that would be loaded from elsewhere."""
    pages = {path.resolve(): Page(path.read_text()) for path in site.rglob("*.html")}
    found: list[str] = []
    for path, page in pages.items():
        here = path.relative_to(site.resolve())
        found += [f"{here}: loads {address}" for address in page.loads if urlsplit(address).netloc]
        found += [f"{here}: image {source} has no alternative text" for source in page.without_text]
        for address in page.links + page.loads:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if address in page.links and not (parts.scheme == "https" and "." in parts.netloc):
                    found.append(f"{here}: {address} is no https address")
                continue
            # The page for a path that is not there is served at any depth, so its addresses begin at the root.
            from_root = parts.path.startswith("/")
            target = (site / parts.path.lstrip("/") if from_root else path.parent / unquote(parts.path)).resolve()
            target = path if not parts.path else target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(f"{here}: {address} is not there")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{here}: {address} has no such anchor")
    for style in site.rglob("*.css"):
        found += [f"{style.name}: loads {address}" for address in re.findall(r"url\((https?:[^)]*)", style.read_text())]
    return sorted(set(found))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_nothing_in_the_site_leads_nowhere_or_loads_from_elsewhere(site: Path) -> None:
    assert not faults(site)


@pytest.mark.slow
def test_every_page_of_docs_is_in_the_site_and_no_script_is(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert len(pages) > 30
    assert not {str(page) for page in pages if not (site / page).is_file()}
    assert not (site / "hooks").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "room",
    ["clips", "encoders", "negatives", "objectives", "pretraining", "transfer", "search", "ablation", "viewer", "app"],
)
def test_the_reference_has_all_public_names(site: Path, room: str) -> None:
    name = f"cmacc.{room}"
    public = importlib.import_module(name).__all__
    anchors = Page((site / "api" / f"{room}.html").read_text()).anchors
    # A function that is named like its module stands under its full name.
    assert public
    assert not [n for n in public if not {f"{name}.{n}", f"{name}.{n}.{n}"} & anchors]


@pytest.mark.slow
def test_equations_are_drawn(site: Path) -> None:
    method = (site / "method.html").read_text()
    assert method.count('<div class="equation"><svg') == (ROOT / "docs" / "method.md").read_text().count("$$") // 2
    assert "arithmatex" not in method


def test_faults_are_found(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(
        '<p id="here"><a href="#here">a</a><a href="#gone">b</a><a href="other.html#there">c</a>'
        '<a href="other.html#x">d</a><a href="none.html">e</a><a href="http://example.com">f</a>'
        '<a href="https://example.com/page">g</a><img src="none.png" alt="an image"><img src="it.png">'
        '<script src="https://cdn.example.com/x.js"></script>'
    )
    (tmp_path / "other.html").write_text('<h2 id="there">There</h2>')
    (tmp_path / "it.png").write_bytes(b"")
    assert faults(tmp_path) == [
        "index.html: #gone has no such anchor",
        "index.html: http://example.com is no https address",
        "index.html: image it.png has no alternative text",
        "index.html: loads https://cdn.example.com/x.js",
        "index.html: none.html is not there",
        "index.html: none.png is not there",
        "index.html: other.html#x has no such anchor",
    ]


def test_the_picture_of_a_batch_is_the_script_s() -> None:
    drawn: dict[str, object] = {"__name__": "draw_batch", "__file__": str(ROOT / "docs" / "draw_batch.py")}
    exec(compile((ROOT / "docs" / "draw_batch.py").read_text(), "draw_batch.py", "exec"), drawn)
    picture = drawn["picture"]
    assert callable(picture)
    assert (ROOT / "docs" / "batch.svg").read_text() == picture()


def test_the_file_tree_names_files_that_are_there() -> None:
    page = (ROOT / "docs" / "code.md").read_text()
    named = set(re.findall(r"\b(\w+\.py)\b", page[page.index("## The file tree") :]))
    assert len(named) > 100
    folders = ("src", "tools", "benchmarks")
    assert not named - {path.name for folder in folders for path in (ROOT / folder).rglob("*.py")}


def test_links_between_pages_also_work_on_github() -> None:
    """Relative links of the Markdown files themselves, to files that are there."""
    bad: list[str] = []
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        for address in re.findall(r"\]\(([^)\s]+)\)", prose):
            if "://" not in address and not (page.parent / (address.split("#")[0] or page.name)).exists():
                bad.append(f"{page.relative_to(ROOT)}: {address}")
    assert not bad
