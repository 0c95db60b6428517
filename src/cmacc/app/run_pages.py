"""The pages of a run (report, negatives) and of files (data doctor): where they come from, and their routes.

A report is rendered when it is asked for. The other two take longer: if a command left one, that is shown; otherwise
the page of the app has a button that makes one. Nothing is written into the run folder.
"""

import logging
import os
import tempfile
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

from cmacc.app.opened import Opened
from cmacc.app.pages import MadePage, PageError, read_page, stamp_of, stored_page
from cmacc.app.rendering import render, without_paths
from cmacc.clips import ListedFile, Listing, Manifest, scan
from cmacc.clips.progress import Progress
from cmacc.pretraining import read_config
from cmacc.pretraining.checkpoint_files import checkpoint_folders
from cmacc.search import Index
from cmacc.viewer import render_scan_page, write_inspection
from cmacc.viewer.report import render_report
from cmacc.viewer.run_folder import read_run

_SHORTEST_SECONDS = 0.5  # as in `cmacc scan`
_log = logging.getLogger(__name__)


class Report:
    """The report of a run, rendered again when the run has changed. Safe to use from several threads."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._lock = threading.Lock()
        self._stamp: object = None
        self._text = ""

    def text(self) -> str:
        """The page.

        Raises
        ------
        ReportError
            The run has no metrics yet, or a file of it cannot be read.
        """
        with self._lock:
            stamp = stamp_of(self._run_dir, "metrics.jsonl", "card.json", "embeddings.safetensors")
            if stamp != self._stamp:
                self._text, self._stamp = render_report(read_run(self._run_dir)), stamp
            return self._text


class RunPages:
    """All of these pages.

    Parameters
    ----------
    opened
        What is shown.

    Attributes
    ----------
    report, negatives
        Of the run; None if there is none.
    doctor
        Of the files of the index, or of the run.
    """

    def __init__(self, opened: Opened) -> None:
        run_dir = opened.run_dir
        self.report = None if run_dir is None else Report(run_dir)
        self.negatives = None
        if run_dir is not None:
            self.negatives = MadePage(partial(_inspect, run_dir), partial(_left_by_inspect, run_dir))
        self.doctor = MadePage(partial(_examine, opened), lambda: None if run_dir is None else _left_by_scan(run_dir))


def run_routes(pages: RunPages) -> APIRouter:
    """Routes ``/run/report``, ``/run/negatives`` and ``/run/doctor``, which show the page that there is."""
    router = APIRouter(prefix="/run")

    @router.get("/report")
    def report() -> Response:
        if pages.report is None:
            return _note("There is no run.", 404)
        try:
            return stored_page(pages.report.text())
        except (ValueError, OSError) as error:
            return _note(without_paths(error), 409)
        except Exception:
            _log.exception("the report failed")
            return _note("The report cannot be made; the log of the server says why.", 500)

    @router.get("/negatives")
    def negatives() -> Response:
        return _shown(pages.negatives)

    @router.get("/doctor")
    def doctor() -> Response:
        return _shown(pages.doctor)

    return router


def _shown(page: MadePage | None) -> Response:
    if page is None:
        return _note("There is no run.", 404)
    if page.text is not None:
        return stored_page(page.text)
    path = page.left()
    if path is None:
        return _note("This page has not been made yet.", 404)
    try:
        return stored_page(read_page(path))
    except PageError as error:
        return _note(str(error), 410)


def _note(text: str, status: int) -> Response:
    return stored_page(render("note.html.j2", text=text), status)


# ---- the negatives --------------------------------------------------------------------------------------------------


def _left_by_inspect(run_dir: Path) -> Path | None:
    """The page that `cmacc inspect` left, unless the run has been trained on since."""
    page = run_dir / "inspect.html"
    checkpoints = checkpoint_folders(run_dir)
    if not os.path.lexists(page) or (checkpoints and page.lstat().st_mtime < checkpoints[-1].stat().st_mtime):
        return None
    return page


def _inspect(run_dir: Path, progress: Progress) -> str:
    with tempfile.TemporaryDirectory(prefix="cmacc-app-") as folder:
        page = write_inspection(
            run_dir, Path(folder) / "inspect.html", on_step=lambda done, total: progress("checkpoints", done, total)
        )
        return page.read_text(encoding="utf-8")


# ---- the files ------------------------------------------------------------------------------------------------------


def _left_by_scan(run_dir: Path) -> Path | None:
    """The page that `cmacc scan` left beside the manifest of a run."""
    try:
        manifest = read_config(run_dir / "config.yaml").data.manifest
    except (ValueError, OSError):
        return None
    page = manifest.with_name(f"{manifest.name}.html")
    return page if os.path.lexists(page) else None


def _examine(opened: Opened, progress: Progress) -> str:
    if opened.index is not None:
        listing = _files_of_index(opened.index)
    else:
        assert opened.run_dir is not None, "there is an index or a run"
        listing = _files_of_run(opened.run_dir)
    return render_scan_page(scan(listing, min_seconds=_SHORTEST_SECONDS, progress=progress))


def _files_of_index(index: Index) -> Listing:
    root = index.table.description.root
    if "://" in root:
        raise PageError("The files of this index are at a URL. Only files on this computer can be examined.")
    files = index.table.columns("path", "key", "label").to_pylist()
    if any(file["key"] is not None for file in files):
        raise PageError("The files of this index are packed into shards. Examine the videos that were packed.")
    return _listing({Path(root) / file["path"]: file["label"] for file in files})


def _files_of_run(run_dir: Path) -> Listing:
    """The files of the manifest."""
    records = Manifest.read(read_config(run_dir / "config.yaml").data.manifest).records
    files: dict[Path, str | None] = {}
    for record in records:
        if record.key is not None or "://" in str(record.path):
            raise PageError(
                "The files of this run are packed into shards, or at a URL. Only single files on this computer can be "
                "examined."
            )
        files.setdefault(Path(record.path), record.label)
    if not files:
        raise PageError("The manifest of this run names no files.")
    return _listing(files)


def _listing(files: Mapping[Path, str | None]) -> Listing:
    """Only these files: their folders may hold much else."""
    root = Path(os.path.commonpath([path.parent for path in files]))
    return Listing(tuple(ListedFile(path, root, label, None, None) for path, label in sorted(files.items())), (), 0, 0)
