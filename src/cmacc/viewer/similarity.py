"""Similarity of embeddings: a map of the held-out clips, and sample queries with their answers."""

import io
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cmacc.transfer import ranks
from cmacc.viewer.figures import Points, points_panel
from cmacc.viewer.gallery import ClipPictures, Picture
from cmacc.viewer.page import Figure, Legend
from cmacc.viewer.run_folder import RunFolder

ShowRow = Callable[[int], Picture]
Asked = tuple[Picture, str]
"""An image of a query, and its caption."""

_MAP_PAIRS = 400  # t-SNE takes a few seconds for as many
_JOINED_PAIRS = 80  # more lines are illegible
_NAMED_LABELS = 8
_FEWEST_FOR_TSNE = 10
_QUERIES = 4
_ANSWERS = 5
_FILM_CHARACTERS = 3_000_000  # of the page, for films to play


@dataclass(frozen=True)
class Answer:
    """A retrieved clip: its ``place`` in the order, its ``score`` (cosine), and whether it is the right one."""

    picture: Picture
    label: str
    file_name: str
    place: int
    score: float
    right: bool
    same_label: bool


@dataclass(frozen=True)
class Query:
    """A query with its first answers, and the right one if it is not among them."""

    title: str
    rank: int
    of: int
    asked: list[Asked]
    answers: list[Answer]


@dataclass(frozen=True)
class Queries:
    """Sample queries by direction.

    ``windows`` is the number of windows of a file in its embedding; ``all_play`` tells whether each clip has a film.
    """

    by_question: dict[str, list[Query]]
    windows: int
    all_play: bool
    shown: int = _QUERIES
    first: int = _ANSWERS


def map_figure(run: RunFolder) -> Figure | None:
    """A 2-D map of the embeddings; None if there are none."""
    if run.pairs is None:
        return None
    rows = np.linspace(0, len(run.pairs) - 1, min(len(run.pairs), _MAP_PAIRS)).round().astype(np.int64)
    places, method = plane(np.concatenate([run.pairs.video[rows], run.pairs.audio[rows]]))
    video, audio = np.split(places, 2)
    colours, legend = _label_colours(run, rows)
    layers = [
        Points(of_modality[np.asarray(colours) == colour], colour, marker, size)
        for colour in sorted(set(colours))
        for of_modality, marker, size in ((video, "o", 26.0), (audio, "^", 30.0))
    ]
    joined = len(rows) <= _JOINED_PAIRS
    caption = (
        f"{method} of {len(rows):,} of {len(run.pairs):,} clips. Close points are similar; the distance between groups "
        "means little. "
        + ("A thin line joins the video and the audio of a clip. " if joined else "")
        + "Video and audio often form two separate groups even if retrieval works: only the order of distances from "
        "one to the other matters."
    )
    svg = points_panel(layers, np.stack([video, audio], axis=1) if joined else None)
    return Figure("", svg, caption, [("ink", "video", "dot"), ("ink", "audio", "triangle"), *legend])


def sample_queries(run: RunFolder) -> Queries | None:
    """Sample queries in both directions; None without embeddings, or without their files."""
    if run.pairs is None or run.manifest is None:
        return None
    pairs, config = run.pairs, run.config
    pictures = ClipPictures(run.manifest, config.data.clip, config.encoder.mel_bins, _FILM_CHARACTERS)
    windows = list(zip(pairs.sample_ids.tolist(), pairs.start_seconds.tolist(), strict=True))

    def sounds(row: int) -> Picture:
        return pictures.sound(*windows[row])

    def frames(row: int) -> Picture:
        return pictures.frames(*windows[row])

    def asked_by_video(row: int) -> list[Asked]:
        return [(frames(row), "the query"), (sounds(row), "its own audio, to compare")]

    def asked_by_audio(row: int) -> list[Asked]:
        return [(sounds(row), "the query")]

    def query(row: int, rank: int, scores: NDArray[np.float32], asked: list[Asked], show: ShowRow) -> Query:
        label, file_name = pictures.name(*windows[row])
        # As in the ranks, another clip with an equal score comes before the right one.
        order = np.lexsort((np.arange(len(scores)) == row, -scores)).tolist()
        places = list(enumerate(order[:_ANSWERS], start=1))
        places += [(rank, row)] if rank > _ANSWERS else []
        answers = []
        for place, key in places:
            own_label, own_file = pictures.name(*windows[key])
            same = bool(label) and own_label == label
            answers.append(Answer(show(key), own_label, own_file, place, float(scores[key]), key == row, same))
        return Query(f"{label} · {file_name}" if label else file_name, rank, len(scores), asked, answers)

    by_question = {}
    for question, queries, keys, asked, show in (
        ("Video → audio", pairs.video, pairs.audio, asked_by_video, sounds),
        ("Audio → video", pairs.audio, pairs.video, asked_by_audio, frames),
    ):
        found = ranks(queries, keys)
        by_question[question] = [
            query(row, int(found[row]), keys @ queries[row], asked(row), show) for row in chosen_queries(found)
        ]
    most = max((r.windows for r in run.card.results if r.task == "pairs"), default=1) if run.card else 1
    return Queries(by_question, most, not pictures.films_end)


def chosen_queries(ranks: NDArray[np.int64], count: int = _QUERIES) -> list[int]:
    """Rows evenly spaced in the order of rank, including the best and the worst.

    Examples
    --------
    >>> chosen_queries(np.array([9, 1, 4, 1, 2, 7, 30]), 3)
    [1, 2, 6]
    """
    order = np.argsort(ranks, kind="stable")
    places = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return [int(order[place]) for place in places]


def principal_components(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """The rows ``(n, d)`` along the directions in which they vary most, ``(n, k)`` with k at least 2."""
    centred = rows.astype(np.float64) - rows.mean(0, dtype=np.float64)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    # A singular vector's sign is arbitrary; fixing it makes the map the same everywhere.
    left *= np.where(np.take_along_axis(left, np.abs(left).argmax(0)[None], axis=0) < 0, -1.0, 1.0)
    components = left * singular
    return np.asarray(np.pad(components, ((0, 0), (0, max(0, 2 - components.shape[1])))), np.float64)


def plane(rows: NDArray[np.float32]) -> tuple[NDArray[np.float64], str]:
    """Project ``(n, d)`` to ``(n, 2)``, and name the method: PCA, followed by t-SNE if there are at least ten rows."""
    components = principal_components(rows)
    spread = float(components[:, 0].std())
    # t-SNE divides by the spread, and has nothing to show without one.
    if len(rows) < _FEWEST_FOR_TSNE or spread < 1e-6:
        return components[:, :2], "PCA"
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    _count_cores_silently()
    tsne = TSNE(init=components[:, :2] / spread * 1e-4, perplexity=min(30.0, (len(rows) - 1) / 3), random_state=0)
    # t-SNE runs a thousand short parallel loops: on two busy cores, two threads took 21 s for 170 rows, and one 0.7 s.
    with threadpool_limits(1):
        places = tsne.fit_transform(components[:, :50])
    return np.asarray(places, np.float64), "t-SNE (fixed seed, after PCA)"


def _count_cores_silently() -> None:
    """Let joblib count the cores now. On machines without `lscpu`, its first count prints a traceback to stderr."""
    import joblib

    with warnings.catch_warnings(action="ignore", category=UserWarning), redirect_stderr(io.StringIO()):
        joblib.cpu_count(only_physical_cores=True)


def _label_colours(run: RunFolder, rows: NDArray[np.int64]) -> tuple[list[str], Legend]:
    if run.pairs is None or run.manifest is None:
        return ["c1"] * len(rows), []
    labels = [run.manifest.records[i].label for i in run.pairs.sample_ids[rows]]
    counts = Counter(label for label in labels if label is not None)
    if not counts:
        return ["c1"] * len(rows), []
    named = sorted(counts, key=lambda label: (-counts[label], label))[:_NAMED_LABELS]
    colour_of = {label: f"c{i}" for i, label in enumerate(sorted(named), start=1)}
    legend = [(colour, label, "square") for label, colour in colour_of.items()]
    others = len(counts) - len(named)
    if others or None in labels:
        text = f"{others} other labels" if others else "no label"
        legend.append(("muted", text, "square"))
    return [colour_of.get(label, "muted") if label else "muted" for label in labels], legend
