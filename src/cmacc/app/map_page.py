"""The map of embeddings: a page of its own with plotly, its data, and how places on the map are computed.

The page first shows a projection (PCA), which takes less than a second. t-SNE takes up to a minute or two: it is
computed on one thread in the background when someone asks for it. Both are kept until the index or the run changes.
"""

import importlib.resources
import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response

from cmacc.app.map_points import (
    MapPoints,
    colours_by_group,
    colours_by_label,
    colours_by_modality,
    points_of_index,
    points_of_run,
)
from cmacc.app.opened import Opened
from cmacc.app.pages import stamp_of
from cmacc.app.rendering import render, without_paths
from cmacc.search.table import WindowTable
from cmacc.viewer.run_folder import read_run
from cmacc.viewer.similarity import plane, principal_components

Layout = Literal["pca", "tsne"]
_ONE_YEAR = "public, max-age=31536000, immutable"
# plotly writes its styles into the page. Nothing is evaluated, and nothing comes from elsewhere.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "media-src 'self'; connect-src 'self'; frame-ancestors 'self'; base-uri 'none'; form-action 'none'"
)
_log = logging.getLogger(__name__)


@dataclass
class _Drawn:
    """A map of one version of the index or the run."""

    version: object
    points: MapPoints
    colours: dict[str, tuple[list[int], list[str]]]
    places: dict[Layout, Future[NDArray[np.float64]]] = field(default_factory=dict)
    began_seconds: float = 0.0


class EmbeddingMap:
    """The map of an index, or of a run if there is no index. Safe to use from several threads.

    Parameters
    ----------
    opened
        What is shown.
    """

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._table = None if opened.index is None else WindowTable(opened.index.table.store.root)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="map")
        self._lock = threading.Lock()
        self._drawn: _Drawn | None = None

    def answer(self, layout: Layout) -> dict[str, Any]:
        """What the page draws: ``state`` is ``ready``, ``working`` (with ``seconds``) or ``none`` (with ``reason``).

        Raises
        ------
        SearchError, ReportError
            The index or the run cannot be read.
        """
        with self._lock:
            drawn = self._current()
            if drawn is None:
                return {"state": "none", "reason": "This run has no embeddings yet: they come from cmacc evaluate."}
            if layout not in drawn.places:
                drawn.began_seconds = time.monotonic()
                compute = _pca if layout == "pca" else _tsne
                try:
                    drawn.places[layout] = self._worker.submit(compute, drawn.points.vectors)
                except RuntimeError:
                    return {"state": "none", "reason": "The server is ending."}
            places = drawn.places[layout]
        if layout == "tsne" and not places.done():
            return {"state": "working", "seconds": round(time.monotonic() - drawn.began_seconds)}
        return {"state": "ready", **_columns(drawn, places.result())}

    def _current(self) -> _Drawn | None:
        """The map of the present version; None if there are no embeddings."""
        if self._table is not None:
            self._table.refresh()
            now: object = (self._table.version, self._table.description.made)
        else:
            assert self._opened.run_dir is not None, "there is an index or a run"
            now = stamp_of(self._opened.run_dir, "embeddings.safetensors", "card.json")
        if self._drawn is None or self._drawn.version != now:
            points = self._points()
            if points is None:
                return None
            colours = {"label": colours_by_label(points)} if any(points.label) else {}
            colours |= {"group": colours_by_group(points), "modality": colours_by_modality(points)}
            self._drawn = _Drawn(now, points, colours)
        return self._drawn

    def _points(self) -> MapPoints | None:
        if self._table is not None:
            return points_of_index(self._table, self._opened.library)
        assert self._opened.run_dir is not None
        return points_of_run(read_run(self._opened.run_dir), self._opened.library)


def map_routes(opened: Opened) -> APIRouter:
    """Routes ``/map`` (the page), ``/map/points`` (its data), and the scripts of it."""
    router = APIRouter(prefix="/map")
    embeddings = EmbeddingMap(opened)
    own = importlib.resources.files("cmacc.app") / "templates"
    scripts = {
        "plotly.js": str(importlib.resources.files("plotly") / "package_data" / "plotly.min.js"),
        "map.js": str(own / "map.js"),
    }

    @router.get("")
    def page() -> Response:
        shown = render("map.html.j2", plotly_version=version("plotly"))
        return HTMLResponse(shown, headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"})

    @router.get("/points")
    def points(layout: Layout = "pca") -> Response:
        try:
            answer = embeddings.answer(layout)
        except (ValueError, OSError) as error:
            answer = {"state": "none", "reason": without_paths(error)}
        except Exception:
            _log.exception("the map failed")
            answer = {"state": "none", "reason": "The map cannot be shown; the log of the server says why."}
        return JSONResponse(answer, headers={"Cache-Control": "no-store"})

    @router.get("/{name}")
    def script(name: Literal["plotly.js", "map.js"]) -> Response:
        kept = _ONE_YEAR if name == "plotly.js" else "no-cache"
        return FileResponse(scripts[name], media_type="text/javascript", headers={"Cache-Control": kept})

    return router


def _pca(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    return principal_components(vectors)[:, :2]


def _tsne(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    return plane(vectors)[0]


def _columns(drawn: _Drawn, places: NDArray[np.float64]) -> dict[str, Any]:
    points = drawn.points
    # Four digits of the extent are less than a pixel.
    digits = 4 - int(np.floor(np.log10(max(float(np.abs(places).max()), 1e-9))))
    return {
        "what": points.what,
        "x": places[:, 0].round(digits).tolist(),
        "y": places[:, 1].round(digits).tolist(),
        "modality": list(points.modality),
        "name": list(points.name),
        "label": list(points.label),
        "id": list(points.file_id),
        "start": [round(float(start), 3) for start in points.start_seconds],
        "end": [round(float(end), 3) for end in points.end_seconds],
        "colours": {by: {"of": of, "names": names} for by, (of, names) in drawn.colours.items()},
    }
