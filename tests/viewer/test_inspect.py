"""The negatives' page: what it shows of a run, what it says where there is nothing, and no markup of others."""

import dataclasses
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cmacc.cli import main
from cmacc.clips import Manifest
from cmacc.objectives import Terms
from cmacc.pretraining import DictionaryConfig, ObjectiveConfig, PretrainConfig, pretrain, start_run
from cmacc.pretraining.config_files import read_config, write_config
from cmacc.viewer import ReportError, write_inspection
from cmacc.viewer.figures import Points, heat_map, overlaid_histogram, points_panel
from cmacc.viewer.replay import ReplayError, SelectionReplay

EVIL = "<script>alert('x')</script> & $\\frac"
EVIL_FILE = "<img src=x onerror=alert(1)>.mp4"

pytestmark = pytest.mark.slow  # two runs are trained

MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def make_run(small_config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Trains eight steps on a copy of the small world whose names and labels would be markup."""

    def make(with_labels: bool = True, name: str = "run", **dictionary: object) -> Path:
        folder = tmp_path_factory.mktemp("inspect")
        records = list(Manifest.read(small_config.data.manifest).records)
        for i, record in enumerate(records):
            link = folder / f"{i} {EVIL_FILE}"
            link.symlink_to(record.path)
            records[i] = dataclasses.replace(
                record, path=link, label=f"{record.label} {EVIL}" if with_labels else None, key=None
            )
        Manifest(records).write(folder / "manifest.parquet")
        config = dataclasses.replace(
            small_config,
            data=dataclasses.replace(small_config.data, manifest=folder / "manifest.parquet"),
            dictionary=DictionaryConfig(**({"selector": "active", "size": 16, "pool_size": 24} | dictionary)),  # type: ignore[arg-type]
            objective=ObjectiveConfig(batch_keys="momentum"),
            optim=dataclasses.replace(small_config.optim, steps=8),
            save_every=4,
            keep_every=4,
        )
        start_run(config, folder / name)
        assert pretrain(folder / name).finished
        return folder / name

    return make


@pytest.fixture(scope="module")
def run_dir(make_run: MakeRun) -> Path:
    return make_run(name=f"run {EVIL.replace('/', '')}")


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return write_inspection(run_dir).read_text()


class _Markup(HTMLParser):
    """Tags of a page, and all that a browser would fetch for it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = re.findall(r"url\(\s*[\"']?([^\"')]*)", page) + re.findall(r"@import.*", page)
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        names = ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
        self.targets += [value or "" for name, value in attrs if name in names]


def section(page: str, step: int) -> str:
    return page.split(f'<section id="step-{step}">')[1].split("</section>")[0]


def test_every_step_shows_both_dictionaries(page: str) -> None:
    assert [step for step in (4, 8) if f'<section id="step-{step}">' in page] == [4, 8]
    assert page.count("<details open>") == 2  # of the last step
    for step in (4, 8):
        shown = section(page, step)
        assert shown.count("<svg") == 2 * 3
        assert shown.count('class="heat"') == 2 * 2
        assert shown.count('<li class="chosen">') == shown.count('<li class="random">') == 2 * 8
        assert shown.count('<article class="group">') >= 2
        assert "Likely false negatives" in shown
        assert "Duplicates" in shown
        assert "8 were chosen" in shown
        assert "not shown" not in shown
    assert "The run ended before this step" in section(page, 8)
    assert "The run ended before this step" not in section(page, 4)
    assert "Same label as the query" in page


def test_page_needs_no_network(page: str) -> None:
    markup = _Markup(page)
    assert {"img", "svg", "a", "details"} <= set(markup.tags)
    assert not set(markup.tags) & {"script", "link", "iframe", "object", "embed", "base", "audio", "video"}
    assert all(target.startswith(("#", "data:image/")) for target in markup.targets)
    inner = {target[1:] for target in markup.targets if target.startswith("#step") or target == "#glance"}
    assert inner <= set(markup.ids)
    assert len(inner) == 7
    assert "://" not in re.sub(r"data:image/\w+;base64,[\w+/=]*|xmlns(:\w+)?=\"[^\"]*\"", "", page)


def test_names_and_labels_do_not_become_markup(page: str) -> None:
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)" in page
    assert "&lt;img src=x" in page


def test_colours_are_the_pages_own(page: str) -> None:
    figures = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert {"var(--c1)", "var(--c2)", "var(--c3)", "var(--muted)"} <= set(re.findall(r"var\(--\w+\)", figures))
    assert not re.findall(r"(?:fill|stroke): #(?!0b)\w{6}", figures)


def test_same_run_gives_the_same_page(run_dir: Path, page: str, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    again = write_inspection(run_dir, tmp_path / "new" / "again.html", on_step=lambda *at: done.append(at))
    assert again.read_text() == page
    assert done == [(0, 2), (1, 2), (2, 2)]


def test_pictures_are_of_the_replayed_keys(run_dir: Path, page: str) -> None:
    replay = SelectionReplay(run_dir)
    for selection, part in zip(replay.at(8), section(page, 8).split("<h3")[1:], strict=True):
        shown = re.findall(r"<small>(\d+) &lt;img[^<]*</small>\s*(?:<b[^<]*</b>)?\s*<small>chosen #(\d+)", part)
        by_order = [int(sample_id) for sample_id, order in sorted(shown, key=lambda item: int(item[1]))]
        assert by_order == selection.pool.sample_ids[selection.chosen].tolist()


def test_without_labels_or_with_little_choice_it_says_so(make_run: MakeRun) -> None:
    run_dir = make_run(with_labels=False, selector="random", pool_size=8, warmup_steps=6)
    page = write_inspection(run_dir, steps=[4]).read_text()
    assert "No labels are known" in page
    assert "Same label as the query" not in page
    assert "same label" not in page
    assert "every random draw is the same" in page
    assert "Until step 6 the loss does not use the dictionaries" in page
    assert "step-8" not in page


def test_what_cannot_be_shown_is_said(run_dir: Path, small_config: PretrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match=r"steps: must be among the checkpoints .* \(4, 8\), got 5; .*--keep_every N"):
        write_inspection(run_dir, tmp_path / "a.html", steps=[4, 5])
    start_run(small_config, tmp_path / "fresh")
    with pytest.raises(ReplayError, match=r"must hold a checkpoint in .*, got none"):
        write_inspection(tmp_path / "fresh")
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(ReportError, match=r"inspect .*mine.html: exists already; give --overwrite"):
        write_inspection(run_dir, tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "mine"
    with pytest.raises(ReportError, match=r"must be a file, got a folder; .*inspect.html"):
        write_inspection(run_dir, tmp_path, overwrite=True)


def test_batches_that_would_be_chosen_stand_beside_random_ones(page: str, make_run: MakeRun, tmp_path: Path) -> None:
    """Of a run without a dictionary they are all there is to show."""
    alone = make_run(selector="none")
    of_none = write_inspection(alone).read_text()
    assert "It has no dictionary" in of_none
    assert "At a glance" not in of_none
    for shown in (page, of_none):
        section_ = shown.split('<section id="batches">')[1].split("</section>")[0]
        assert [len(re.findall(rf"<h4>{kind} batch \d", section_)) for kind in ("Active", "Random")] == [2, 2]
        assert section_.count("<li class=") == 4 * 8
        active, drawn = re.findall(r'data-name="(?:active|random)">\s*(-?[0-9.]+)<', section_)
        assert float(active) >= float(drawn)  # they are put together by this very likeness
    with pytest.raises(ReplayError, match=r"dictionary.selector must be active, .*, got none"):
        write_inspection(alone, tmp_path / "none.html", steps=[4])
    config = read_config(alone / "config.yaml")
    objective = dataclasses.replace(config.objective, terms=Terms(cross_modal=0.0, ctp=1.0))
    write_config(dataclasses.replace(config, objective=objective), alone / "config.yaml")
    with pytest.raises(ReplayError, match=r"objective.terms must bring video and audio into one space .*, got ctp"):
        write_inspection(alone, tmp_path / "video.html")


def test_command(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert main(["inspect", str(run_dir), "--steps", "8", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"inspect: {out}\n"
    assert out.read_text().startswith("<!doctype html>")
    assert main(["inspect", str(run_dir), "--steps", "3", "--out", str(out), "--overwrite"]) == 2
    message = capsys.readouterr().err
    assert "cmacc inspect: error: steps: must be among" in message
    assert "Traceback" not in message
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    assert "must be a folder made by `cmacc pretrain`" in capsys.readouterr().err


def test_files_that_are_gone_are_named(run_dir: Path, tmp_path: Path) -> None:
    replay = SelectionReplay(run_dir)
    selection = replay.at(8)[0]
    key, query = int(selection.pool.sample_ids[selection.chosen[0]]), int(selection.query_ids[0])
    assert key not in selection.query_ids
    paths = [Path(replay.manifest.records[sample_id].path) for sample_id in (key, query)]
    for path in paths:
        path.rename(path.with_suffix(".away"))
    try:
        page = write_inspection(run_dir, tmp_path / "page.html", steps=[8]).read_text()
    finally:
        for path in paths:
            path.with_suffix(".away").rename(path)
    page = " ".join(page.split())
    name = "&lt;img src=x onerror=alert(1)&gt;.mp4"
    sentence = "1 file of the batch could not be decoded and was replaced by other files, as in training:"
    assert f"{sentence} {query} {name}." in page
    if f"{key} {name}" in page:  # another query may have led to another choice
        assert f"not shown: {key} {name}: no such file" in page


def test_figures_take_single_and_equal_values() -> None:
    for values in ([1.0], [2.5, 2.5], [3.0, 9.0, 4.0]):
        assert overlaid_histogram([(values, "muted"), (values, "c1")], "x").startswith("<svg")
    assert points_panel([Points(np.zeros((1, 2)), "c1")]).startswith("<svg")
    assert heat_map(np.eye(2), 1.0, np.array([0, 1])).startswith("data:image/png;base64,")


def test_heat_map_has_the_sign_and_the_strength_of_the_values() -> None:
    import base64
    import io

    from PIL import Image

    values = np.array([[1.0, -0.5], [0.0, 4.0]])
    address = heat_map(values, 1.0, np.array([3, 7]))
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))))
    margin = len(pixels) - 2 * 192
    cells = pixels[margin + 96 :: 192, margin + 96 :: 192].astype(int)
    assert cells[..., 3].tolist() == [[255, 128], [0, 255]]
    assert cells[0, 0, 0] > cells[0, 0, 2]
    assert cells[0, 1, 2] > cells[0, 1, 0]
    bar = pixels[margin + 96 :: 192, 0, 3]
    assert bar[0] != bar[1]
