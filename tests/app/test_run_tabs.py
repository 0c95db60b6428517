"""The pages of runs and files: up to date, made once, read-only, and without power over the page around them."""

import json
import os
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from cmacc.app import pages, run_pages
from cmacc.app.library import Library
from cmacc.app.opened import Opened
from cmacc.app.pages import PageError, StoppedError
from cmacc.app.run_pages import RunPages, run_routes
from cmacc.clips import Manifest, PackSettings, pack
from cmacc.clips.progress import silent
from cmacc.search import Index
from cmacc.viewer.page import ReportError
from cmacc.viewer.replay import ReplayError
from cmacc.viewer.report import render_report
from cmacc.viewer.run_folder import RunFolder, read_run

from .conftest import World


def client_of(made: RunPages) -> TestClient:
    app = FastAPI()
    app.include_router(run_routes(made))
    return TestClient(app)


def files_below(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_the_report_is_that_of_the_run_and_follows_it(
    opened_run: Opened, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(RunPages(opened_run))
    assert client.get("/run/report").text == render_report(read_run(run_dir))
    # A report takes seconds; the rest is about when one is rendered.
    monkeypatch.setattr(run_pages, "render_report", lambda run: rendered.append(run) or f"{run.step_count} steps")
    rendered: list[RunFolder] = []
    client.get("/run/report")
    assert rendered == [], "it is kept"
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    (run_dir / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(json.loads(lines[-1]) | {"step": 2})]) + "\n")
    assert client.get("/run/report").text == "3 steps"
    assert len(rendered) == 1
    (run_dir / "metrics.jsonl").unlink()
    gone = client.get("/run/report")
    assert gone.status_code == 409
    assert "must hold at least one step" in gone.text
    assert str(run_dir.parent) not in gone.text


def test_stored_pages_are_served_without_any_power(opened_run: Opened, run_dir: Path) -> None:
    made = RunPages(opened_run)
    client = client_of(made)
    assert client.get("/run/negatives").status_code == 404
    (run_dir / "inspect.html").write_text("<script>alert(1)</script>")
    for name in ("report", "negatives", "doctor"):
        response = client.get(f"/run/{name}")
        rules = response.headers["content-security-policy"].split("; ")
        assert rules[:2] == ["sandbox", "default-src 'none'"]
        assert not any(rule.startswith(("script-src", "connect-src", "form-action 'self'")) for rule in rules)
        assert response.headers["x-content-type-options"] == "nosniff"
    assert client.get("/run/negatives").text == "<script>alert(1)</script>"


def test_an_old_page_a_link_and_a_huge_file_are_not_served(
    opened_run: Opened, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(RunPages(opened_run))
    page = run_dir / "inspect.html"
    page.write_text("x" * 2000)
    assert client.get("/run/negatives").status_code == 200
    monkeypatch.setattr(pages, "_MOST_BYTES", 1000)
    assert client.get("/run/negatives").status_code == 410
    monkeypatch.undo()
    os.utime(page, (1, 1))
    assert client.get("/run/negatives").status_code == 404, "the run was trained on since"
    page.unlink()
    secret = tmp_path / "secret.html"
    secret.write_text("secret")
    page.symlink_to(secret)
    refused = client.get("/run/negatives")
    assert refused.status_code == 410
    assert "secret" not in refused.text
    page.unlink()
    os.mkfifo(page)
    assert client.get("/run/negatives").status_code == 410, "nor does a pipe hold the server up"


def test_the_negatives_are_made_beside_the_run(opened_run: Opened, run_dir: Path) -> None:
    before = files_below(run_dir)
    made = RunPages(opened_run)
    assert made.negatives is not None
    made.negatives.make(silent)
    assert files_below(run_dir) == before
    assert client_of(made).get("/run/negatives").text == made.negatives.text
    assert "first run" in (made.negatives.text or "")


def test_what_cannot_be_made_says_why(opened_run: Opened, run_dir: Path) -> None:
    made = RunPages(opened_run)
    for folder in (run_dir / "checkpoints").iterdir():
        folder.rename(run_dir / folder.name)
    assert made.negatives is not None
    with pytest.raises(ReplayError, match="must hold a checkpoint"):
        made.negatives.make(silent)
    assert made.report is not None
    (run_dir / "config.yaml").write_text("no: config")
    with pytest.raises(ReportError):
        made.report.text()


def test_the_doctor_shows_what_scan_left(opened_run: Opened, trained_run: Path) -> None:
    client = client_of(RunPages(opened_run))
    assert client.get("/run/doctor").status_code == 404
    page = trained_run.parent / "manifest.parquet.html"
    page.write_text("left by scan")
    try:
        assert client.get("/run/doctor").text == "left by scan"
    finally:
        page.unlink()


def test_the_doctor_examines_the_folder_of_an_index_and_can_be_stopped(world: World, opened: Opened) -> None:
    made = RunPages(opened)
    told: list[tuple[str, int, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        told.append((what, done, total))

    made.doctor.make(progress)
    assert (told[0], told[-1]) == (("files", 0, 9), ("files", 9, 9))
    assert "9 files were examined" in " ".join((made.doctor.text or "").split())
    text = made.doctor.text

    def stop_it(what: str, done: int, total: int) -> None:
        made.doctor.stop()

    with pytest.raises(StoppedError):
        made.doctor.make(stop_it)
    assert made.doctor.text == text, "the former page stays"


def test_the_doctor_examines_the_files_of_a_manifest(opened_run: Opened) -> None:
    made = RunPages(opened_run)
    made.doctor.make(silent)
    text = made.doctor.text or ""
    assert "24 files were examined" in " ".join(text.split())
    assert "<img src=x" not in text


def test_packed_files_and_urls_are_not_examined(world: World, opened_run: Opened, tmp_path: Path) -> None:
    manifest = Manifest.read(read_run(opened_run.run_dir).config.data.manifest)  # type: ignore[arg-type]
    pack(Manifest(list(manifest.records)[:2]), str(tmp_path / "packed"), PackSettings(32, 8))
    config = opened_run.run_dir / "config.yaml"  # type: ignore[operator]
    former = str(read_run(opened_run.run_dir).config.data.manifest)  # type: ignore[arg-type]
    config.write_text(config.read_text().replace(former, str(tmp_path / "packed" / "index.parquet")))
    with pytest.raises(PageError, match="packed into shards"):
        RunPages(opened_run).doctor.make(silent)
    index = Index.open(world.index)
    index.table.description = index.table.description.__class__(
        **(index.table.description.__dict__ | {"root": "s3://bucket/films"})
    )
    with pytest.raises(PageError, match="at a URL"):
        RunPages(Opened("at a URL", Library([]), index, None)).doctor.make(silent)
