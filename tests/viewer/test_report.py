"""The report: every section is there, what is missing is said, and nothing from a file becomes markup."""

import base64
import html
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from cmacc.clips import ClipSpec, Manifest, decode_clip, list_folders, scan
from cmacc.clips.synthetic import WorldConfig, write_world
from cmacc.objectives import Terms, WithinModalConfig
from cmacc.pretraining import DataConfig, DictionaryConfig, OptimConfig, PretrainConfig
from cmacc.pretraining.config_files import read_config, write_config
from cmacc.viewer import ReportError, write_report
from cmacc.viewer.figures import Series, smoothed, thinned
from cmacc.viewer.results import headline_tiles
from cmacc.viewer.similarity import chosen_queries, plane
from cmacc.viewer.training import PHASES

CLIPS = 6
EVIL = "<script>alert('x')</script> & $\\frac"
SECTIONS = ("results", "curves", "health", "map", "queries", "origin")

MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of six small clips, one of them with a name and a label that would be markup."""
    folder = tmp_path_factory.mktemp("world")
    write_world(
        WorldConfig(clip_count=CLIPS, class_count=2, duration_seconds=1.5, frame_size=32), folder / "clips", workers=1
    )
    records = list(scan(list_folders([folder / "clips"])).manifest.records)
    evil_path = records[0].path.with_name("<img src=x onerror=alert(1)>.mp4")
    records[0].path.rename(evil_path)
    records[0] = replace(records[0], path=evil_path, label=EVIL)
    Manifest(tuple(records)).write(folder / "manifest.parquet")
    return folder / "manifest.parquet"


@pytest.fixture(scope="module")
def make_run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Writes a run folder as `pretrain` and, where it is ``evaluated``, `evaluate` leave it."""

    def make(selector: Any = "active", steps: int = 60, evaluated: bool = True, **changes: object) -> Path:
        run_dir = tmp_path_factory.mktemp("runs") / f"run {EVIL.replace('/', '')}"
        config = PretrainConfig(
            data=DataConfig(manifest=world, clip=ClipSpec(frame_count=8, frame_rate_hz=8.0, audio_seconds=1.0)),
            dictionary=DictionaryConfig(selector=selector),
            optim=OptimConfig(batch_size=4, steps=60),
        )
        run_dir.mkdir()
        write_config(config, run_dir / "config.yaml")
        rows = [_row(step, selector != "none") for step in range(steps)]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if not evaluated:
            return run_dir
        (run_dir / "card.json").write_text(json.dumps(_card(world) | changes))
        rng = np.random.default_rng(0)
        video, audio = (rng.normal(size=(CLIPS, 8)).astype(np.float32) for _ in range(2))
        save_file(
            {
                "video": video / np.linalg.norm(video, axis=1, keepdims=True),
                "audio": audio / np.linalg.norm(audio, axis=1, keepdims=True),
                "sample_ids": np.arange(CLIPS),
                "start_seconds": np.full(CLIPS, 0.2),
            },
            run_dir / "embeddings.safetensors",
        )
        return run_dir

    return make


@pytest.fixture(scope="module")
def full_report(make_run: MakeRun) -> Path:
    """The report of a finished and evaluated run."""
    return write_report(make_run())


class _Markup(HTMLParser):
    """Tags of a page, and all that a browser would fetch for it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.targets: list[str] = re.findall(r"url\(\s*[\"']?([^\"')]*)", page) + re.findall(r"@import.*", page)
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        names = ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
        self.targets += [value or "" for name, value in attrs if name in names]


def _row(step: int, has_dictionary: bool) -> dict[str, float]:
    row = {
        "step": step,
        "loss": 10.0 - step / 60,
        "video_to_audio/loss": 5.0 - step / 60,
        "audio_to_video/loss": 5.0,
        "video_to_audio/top1": step / 100,
        "audio_to_video/top1": 0.1,
        "video_to_audio/mutual_information": 0.02 * step,
        "audio_to_video/mutual_information": 0.5,
        "mutual_information_ceiling": 2.0,
        "learning_rate": 1e-3,
        **dict.fromkeys((f"seconds/{phase}" for phase in PHASES), 0.05),
        "seconds/step": 0.7,
        "clips_per_second": 4 / 0.7,
    }
    if has_dictionary and step and step % 20 == 0:
        for modality in ("audio", "video"):
            row |= {
                f"{modality}_dictionary/{name}": 0.5
                for name in ("key_age", "pairwise_cosine", "effective_rank", "distinct_samples")
            }
    return row


def _card(manifest: Path) -> dict[str, Any]:
    def result(task: str, protocol: str, modality: str, metric: str, *numbers: float | None) -> dict[str, object]:
        names = ("value", "untrained", "chance", "count")
        labels = {"task": task, "protocol": protocol, "modality": modality, "metric": metric}
        how = {"version": 1, "windows": 1, "crops": 1, "by_split": {"test": numbers[0]}, "settings": [], "seconds": 1.0}
        return labels | dict(zip(names, numbers, strict=True)) | how | {"low": numbers[0], "high": numbers[0]}

    return {
        "format": 2,
        "results": [
            result("pairs", "retrieval", "video_to_audio", "R@1", 0.5, 0.01, 0.005, 200),
            result("pairs", "retrieval", "video_to_audio", "median_rank", 3.5, 90.0, 100.5, 200),
            result("labelled", "linear", "both", "accuracy", 0.26, 0.25, 0.2, 200),
            result("labelled", "finetune", "video", "accuracy", 0.5, None, 0.2, 200),
            result("new task", "<b>", "both", "accuracy", float("nan"), 0.25, 0.2, 200),
        ],
        "encoder": {
            "name": "run",
            "kind": EVIL,
            "weights": "0123456789abcdef",
            "checkpoint_step": 60,
            "seed": 0,
            "clip": {},
            "pretraining_data": None,
        },
        "data": {
            "pairs": {
                "path": str(manifest),
                "fingerprint": Manifest.read(manifest).fingerprint(),
                "files": 200,
                "files_listed": 200,
                "classes": 0,
                "classes_listed": 0,
            }
        },
        "provenance": {
            "seed": 0,
            "versions": {"torch": EVIL},
            "hardware": {"device": "cpu"},
            "created": "2026-01-01T00:00:00+00:00",
            "command": "",
        },
        "skipped": {},
    }


def _section(page: str, anchor: str) -> str:
    return page.split(f'<section id="{anchor}">')[1].split("</section>")[0]


def test_full_report_shows_every_section(full_report: Path) -> None:
    page = full_report.read_text()
    assert full_report.name == "report.html"
    assert len(page) < 3_000_000
    assert [anchor for anchor in SECTIONS if f'<section id="{anchor}">' in page] == list(SECTIONS)

    results = _section(page, "results")
    assert "50.0 %" in results
    assert "3.5 <span" in results  # a rank is no percentage
    assert 'class="up"' in results
    assert 'class="level"' in results  # 26 % against 25 % of 200 is within the error
    assert _section(page, "curves").count("<svg") == 6
    assert "at the end 1.18 of at most 2.00 (59 %)" in _section(page, "curves")  # 0.02 a step, 60 steps
    assert _section(page, "health").count("<svg") == 4
    assert "No labels are known" in _section(page, "health")
    assert "PCA of" not in _section(page, "map")  # twelve points are enough for t-SNE
    queries = _section(page, "queries")
    assert queries.count('<article class="query">') == 8
    assert len(re.findall(r'<li class="right', queries)) == 8
    assert "not shown" not in queries


def test_results_of_heads_have_units_words_and_no_bar_of_an_error(make_run: MakeRun) -> None:
    base = {"count": 402, "version": 1, "windows": 10, "crops": 1, "seconds": 1.0, "modality": "both"}

    def row(task: str, protocol: str, metric: str, *numbers: float | None, settings: list[str]) -> dict[str, object]:
        found = dict(zip(("value", "untrained", "chance"), numbers, strict=True))
        names = {"task": task, "protocol": protocol, "metric": metric, "settings": settings}
        return base | names | found | {"low": numbers[0], "high": numbers[0], "by_split": {"seed 0": numbers[0]}}

    rows = [
        row("fusion", "late", "mae", 0.6104, None, 0.84, settings=[]),
        row("fusion", "late", "acc2_has0", 0.8, None, 0.71, settings=[]),
        row("ave", "cmbs", "gate AUROC", 0.8731, 0.51, 0.5, settings=["leaks=<8>"]),
        row("ave", "cmbs", "accuracy", 0.68, 0.41, 0.178, settings=["leaks=<8>"]),
    ]
    found = _section(write_report(make_run(results=rows)).read_text(), "results")
    lines = re.findall(r"(?s)<tr class.*?</tr>", found)
    assert [" ".join(re.sub(r"<[^>]*>", " ", line).split()) for line in lines] == [
        "CMBS, both together accuracy 68.0 % ▲ 41.0 % 17.8 % 402",
        "AUROC of gates 0.873 ▲ 0.510 0.500 402",
        "Late fusion, both together mean absolute error 0.610 – 0.840 402",
        "accuracy, neutral is positive 80.0 % – 71.0 % 402",
    ]
    assert ["bar" in line for line in lines] == [True, True, False, True]
    assert 'title="acc2_has0"' in lines[3]
    assert found.count("Departures and conditions: leaks=&lt;8&gt;") == 1
    for heading in ("Event localisation", "Fusion of feature sequences"):
        assert f"<h3>{heading}</h3>" in found


def test_page_needs_no_network(full_report: Path) -> None:
    markup = _Markup(full_report.read_text())
    assert {"img", "svg", "a", "details"} <= markup.tags
    assert not markup.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert len(markup.targets) > 50
    assert all(
        target.startswith(("#", "data:image/", "data:video/mp4;", "data:audio/mp4;")) for target in markup.targets
    )


def _films(page: str, article: int) -> list[bytes]:
    """What can be played in a sample query, in the order of the page."""
    [text] = re.findall(r'<article class="query">.*?</article>', page, re.S)[article : article + 1]
    return [base64.b64decode(found) for found in re.findall(r'src="data:(?:video|audio)/mp4;base64,([^"]*)"', text)]


def _played(film: bytes) -> tuple[list[NDArray[Any]], NDArray[np.float32]]:
    with av.open(io.BytesIO(film)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)] if file.streams.video else []
    with av.open(io.BytesIO(film)) as file:
        return frames, np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)])


def test_queries_and_answers_play_their_second(full_report: Path, world: Path) -> None:
    """The windows begin at 0.2 s and last 1 s."""
    page = full_report.read_text()
    records = Manifest.read(world).records
    title = re.findall(r'<article class="query">\s*<header><b>(.*?)</b>', page)[0]
    [row] = [
        i for i, one in enumerate(records) if html.escape(one.name, quote=True) in title.replace("&#34;", "&quot;")
    ]
    asked, own_sound, *answers = _films(page, 0)
    assert len(answers) in (5, 6)
    frames, sound = _played(asked)
    assert len(frames) == 15
    spec = ClipSpec(15, 15.0, 32, 32, audio_seconds=1.0, sample_rate_hz=48_000)
    source = decode_clip(records[row].source, 0.2, spec)
    # A few kB of film are not the same pictures, but far nearer to these than to those a frame or more away.
    played, shown = np.stack(frames).astype(float), source.frames.numpy()
    distances = {}
    for later in range(-5, 6):
        there = slice(max(0, later), 15 + min(0, later))
        here = slice(max(0, -later), 15 + min(0, -later))
        distances[later] = np.abs(played[here] - shown[there]).mean()
    assert distances.pop(0) < min(distances.values()) / 2
    for heard in (sound, _played(own_sound)[1]):
        assert np.corrcoef(heard[:48_000], source.waveform.numpy())[0, 1] > 0.98
    assert _played(own_sound)[0] == []
    assert own_sound in answers  # the right one
    assert all(_played(film)[0] == [] for film in answers)
    assert all(len(_played(film)[0]) == 15 for film in _films(page, 4)[1:])  # frames answer a sound


def test_films_end_where_the_page_has_no_room(
    make_run: MakeRun, full_report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = "Clips without controls are not in this file"
    assert note not in full_report.read_text()
    monkeypatch.setattr("cmacc.viewer.similarity._FILM_CHARACTERS", 200_000)
    page = write_report(make_run()).read_text()
    sizes = [len(film) for film in re.findall(r'src="(data:(?:video|audio)/mp4;base64,[^"]*)"', page)]
    assert 150_000 < sum(sizes) <= 200_000
    assert note in page
    assert page.count("<img") + page.count("<video") == full_report.read_text().count(
        "<img"
    ) + full_report.read_text().count("<video")


def test_names_and_labels_do_not_become_markup(full_report: Path) -> None:
    page = full_report.read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)" in _section(page, "map")
    assert "&lt;img src=x" in _section(page, "queries")
    assert "&lt;b&gt;" in _section(page, "results")


def test_same_inputs_give_the_same_page(full_report: Path, tmp_path: Path) -> None:
    again = write_report(full_report.parent, tmp_path / "new" / "again.html")
    assert again.read_bytes() == full_report.read_bytes()
    assert [path.name for path in again.parent.iterdir()] == ["again.html"]


def test_run_without_results_or_dictionary_says_so(make_run: MakeRun) -> None:
    run_dir = make_run(selector="none", steps=1, evaluated=False)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "loss": 1')
    page = write_report(run_dir).read_text()
    assert "Nothing has been evaluated yet" in _section(page, "results")
    assert "no dictionary" in _section(page, "health")
    assert "no embeddings" in _section(page, "map")
    assert "no embeddings" in _section(page, "queries")
    assert "1 of 60 steps so far" in page
    assert "1 line of metrics.jsonl that could not be read" in _section(page, "curves")


def test_run_on_one_modality_shows_its_curves_and_promises_no_pairs(make_run: MakeRun) -> None:
    run_dir = make_run(selector="none", evaluated=False)
    config = read_config(run_dir / "config.yaml")
    objective = replace(
        config.objective,
        terms=Terms(cross_modal=0.0, within_modal=0.5, ctp=2.0),
        within_modal=WithinModalConfig(modalities=("video",)),
    )
    write_config(replace(config, objective=objective), run_dir / "config.yaml")
    own = {"within_modal/loss": 2.0, "ctp/loss": 3.0, "within_modal/video/top1": 0.5, "video/effective_rank": 3.0}
    lines = [json.dumps({"step": step, "loss": 7.0, **own}) + "\n" for step in range(60)]
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    page = write_report(run_dir).read_text()
    curves = _section(page, "curves")
    for text in ("0.5 for within_modal, 2 for ctp", "within_modal, video", "1 in 4", "at most 4", "Effective rank"):
        assert text in curves
    assert "by within_modal, ctp. Only the video encoder was trained." in page
    for anchor in ("map", "queries"):
        assert "no pairs of them to" in _section(page, anchor)
    assert "other clips of the" not in page


def test_file_that_is_gone_is_named(make_run: MakeRun, world: Path) -> None:
    run_dir = make_run()
    moved = [record.path for record in Manifest.read(world).records[:3]]
    for path in moved:
        path.rename(path.with_suffix(".away"))
    try:
        page = write_report(run_dir).read_text()
    finally:
        for path in moved:
            path.with_suffix(".away").rename(path)
    assert f"not shown: {moved[1].name}: no such file" in page


def test_changed_manifest_shows_no_wrong_names(make_run: MakeRun, world: Path) -> None:
    data = {"pairs": _card(world)["data"]["pairs"] | {"fingerprint": "of other files"}}
    page = write_report(make_run(data=data)).read_text()
    assert "has changed since the evaluation" in _section(page, "queries")
    assert "has changed since the evaluation" in _section(page, "map")
    assert "<svg" in _section(page, "map")


def test_existing_report_is_kept_unless_told_otherwise(make_run: MakeRun) -> None:
    run_dir = make_run(selector="none", steps=1, evaluated=False)
    (run_dir / "report.html").write_text("mine")
    with pytest.raises(ReportError, match=r"exists already; give --overwrite"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_text() == "mine"
    assert write_report(run_dir, overwrite=True).read_text().startswith("<!doctype html>")
    with pytest.raises(ReportError, match="must be a file, got a folder"):
        write_report(run_dir, run_dir, overwrite=True)


def test_unusable_run_folders_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="must be a folder made by `cmacc pretrain`"):
        write_report(tmp_path / "nothing")
    with pytest.raises(ReportError, match="no such file"):
        write_report(tmp_path)
    run_dir = make_run(steps=0)
    with pytest.raises(ReportError, match=r"at least one step in metrics\.jsonl, got none"):
        write_report(run_dir)
    (run_dir / "metrics.jsonl").write_text(json.dumps(_row(0, False)) + "\n")
    (run_dir / "embeddings.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ReportError, match="cannot be read"):
        write_report(run_dir)
    (run_dir / "card.json").write_text('{"format": 1}')
    with pytest.raises(ReportError, match="format must be 2, got 1; evaluate again"):
        write_report(run_dir)


def test_plane_takes_few_and_collapsed_rows() -> None:
    rows = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    places, method = plane(rows)
    assert method == "PCA"
    distance = np.linalg.norm(places[0] - places[1])
    assert 0 < distance <= np.linalg.norm(rows[0] - rows[1]) + 1e-6  # a projection never pulls apart
    for collapsed in (np.ones((20, 4), np.float32), np.ones((1, 1), np.float32)):
        places, _ = plane(collapsed)
        assert places.shape == (len(collapsed), 2)
        assert np.isfinite(places).all()


def test_queries_are_spread_from_the_best_to_the_worst() -> None:
    ranks = np.random.default_rng(0).permutation(100) + 1
    assert ranks[chosen_queries(ranks)].tolist() == [1, 34, 67, 100]
    assert chosen_queries(np.array([2, 1])) == [1, 0]


def test_thinning_keeps_spikes_and_smoothing_keeps_the_mean() -> None:
    values = np.zeros(5000)
    values[[7, 3210]] = 100.0, -50.0
    thin = thinned(Series(np.arange(5000.0), values))
    assert len(thin.steps) <= 600
    assert (thin.values.max(), thin.values.min()) == (100.0, -50.0)
    assert (np.diff(thin.steps) > 0).all()
    assert np.allclose(smoothed(Series(np.arange(300.0), np.full(300, 2.0))).values, 2.0)


def test_metrics_of_the_version_before_give_the_same_page(make_run: MakeRun) -> None:
    run_dir = make_run()
    path = run_dir / "metrics.jsonl"
    page = write_report(run_dir, overwrite=True).read_text()
    text = path.read_text().replace("mutual_information_ceiling", "mi_ceiling")
    for former, present in (("v2a", "video_to_audio"), ("a2v", "audio_to_video")):
        for metric, name in (("loss", "loss"), ("top1", "top1"), ("mi", "mutual_information")):
            text = text.replace(f"{present}/{name}", f"{metric}_{former}")
    assert text != path.read_text()
    assert "_to_" not in text
    path.write_text(text)
    assert write_report(run_dir, overwrite=True).read_text() == page


@pytest.mark.usefixtures("users_checks")
def test_tiles_are_of_pairs_and_labelled_files_alone() -> None:
    """Other tasks have results of the same protocol, modality and metric."""
    row = {"protocol": "linear", "modality": "both", "metric": "accuracy", "untrained": None, "chance": 0.1}
    rows = [SimpleNamespace(task=task, value=value, **row) for task, value in (("labelled", 0.5), ("ave", 0.25))]
    tiles = headline_tiles(SimpleNamespace(card=SimpleNamespace(results=rows)))  # type: ignore[arg-type]
    assert tiles == [("50.0 %", "linear probe, video and audio", "chance 10.0 %")]
