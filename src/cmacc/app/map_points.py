"""The points of the map: embeddings of an index or a run, with what the page says about each.

An index has one point for each window of its files, or, where those are too many, one for the picture and one for the
sound of a file (the mean of its windows), of files spread evenly over all. A run has the picture and the sound of each
held-out clip.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from cmacc.app.library import Library
from cmacc.encoders import MODALITIES
from cmacc.pretraining.clip_encoder import Modality
from cmacc.search.samples import Samples
from cmacc.search.table import WindowTable, among
from cmacc.viewer.run_folder import RunFolder

# A browser draws as many in a moment without WebGL, and t-SNE takes less than a minute.
MOST_POINTS = 3000
NAMED_LABELS = 8
_GROUPS = 8


@dataclass(frozen=True)
class MapPoints:
    """The n points of a map.

    Attributes
    ----------
    vectors
        ``(n, d)``: embeddings of unit length.
    modality
        Whether each is a picture or a sound.
    name
        Name of the file, with the key of a packed sample.
    label
        Label of the file; None if it has none.
    file_id
        Id of the file in the library; None if it is not known.
    start_seconds, end_seconds
        The part of the file that was embedded.
    what
        What the points are, and how many of how many are shown, in words.
    """

    vectors: Float[np.ndarray, "points dim"]
    modality: Sequence[Modality]
    name: Sequence[str]
    label: Sequence[str | None]
    file_id: Sequence[str | None]
    start_seconds: Sequence[float]
    end_seconds: Sequence[float]
    what: str

    def __len__(self) -> int:
        return len(self.vectors)


def points_of_index(table: WindowTable, library: Library, most: int = MOST_POINTS) -> MapPoints:
    """The points of an index, at most so many.

    Raises
    ------
    SearchError
        The index has no windows, or a writer has changed it meanwhile.
    """
    parts: list[tuple[Modality, Float[np.ndarray, "rows dim"], pa.Table]]
    if len(table) <= most:
        samples = Samples.of(table)
        times = ["start_seconds", "end_seconds"]
        parts = [(modality, rows.vectors, rows.facts) for modality, rows in samples.rows.items()]
        length = table.description.window_seconds
        what = f"All {len(table):,} windows of {len(samples):,} files. A window is {length:g} s of picture or of sound."
    else:
        paths = sorted(set(table.columns("path").column("path").to_pylist()))
        samples = Samples.of(table, among([paths[i] for i in _spread(len(paths), most // 2)]))
        shown = np.array(_spread(len(samples), most // 2))
        times = ["sample_start_seconds", "sample_end_seconds"]
        parts = []
        for modality in MODALITIES:
            rows = shown[samples.has(modality)[shown]]
            parts.append((modality, samples.means(modality)[rows], samples.facts.take(pa.array(rows))))
        of = f"All {len(paths):,}" if len(paths) <= most // 2 else f"{len(shown):,}, spread evenly, of {len(paths):,}"
        what = f"{of} files, with a point for the picture and one for the sound of each (the mean of its windows)."
    facts = pa.concat_tables([facts.select(["path", "key", "label", *times]) for *_, facts in parts]).to_pydict()
    kinds: list[Modality] = [modality for modality, vectors, _ in parts for _ in range(len(vectors))]
    path_and_key = list(zip(facts["path"], facts["key"], strict=True))
    root = table.description.root.rstrip("/")
    return MapPoints(
        np.concatenate([vectors for _, vectors, _ in parts]),
        kinds,
        [path if key is None else f"{path}, {key}" for path, key in path_and_key],
        facts["label"],
        [library.id_of_row(f"{root}/{path}", key) for path, key in path_and_key],
        facts[times[0]],
        facts[times[1]],
        what,
    )


def points_of_run(run: RunFolder, library: Library, most: int = MOST_POINTS) -> MapPoints | None:
    """The points of a run, at most so many; None if it has no embeddings."""
    if run.pairs is None:
        return None
    rows = _spread(len(run.pairs), most // 2)
    starts = run.pairs.start_seconds[rows].tolist()
    length = run.config.data.clip.length_seconds
    sample_ids = run.pairs.sample_ids[rows].tolist()
    records = None if run.manifest is None else [run.manifest.records[i] for i in sample_ids]
    names = [f"clip {i}" for i in sample_ids] if records is None else [record.name for record in records]
    labels = [None] * len(rows) if records is None else [record.label for record in records]
    ids = [None] * len(rows) if records is None else [library.id_of(record.source) for record in records]
    kinds: list[Modality] = [modality for modality in MODALITIES for _ in rows]
    of = f"All {len(rows):,}" if len(rows) == len(run.pairs) else f"{len(rows):,}, spread evenly, of {len(run.pairs):,}"
    return MapPoints(
        np.concatenate([getattr(run.pairs, modality)[rows] for modality in MODALITIES]),
        kinds,
        names * 2,
        labels * 2,
        ids * 2,
        starts * 2,
        [start + length for start in starts] * 2,
        f"{of} held-out clips, with a point for the picture and one for the sound of each."
        + ("" if records is not None else f" Their files are not known: {run.manifest_fault}"),
    )


def colours_by_label(points: MapPoints) -> tuple[list[int], list[str]]:
    """The colour of every point, and what colours stand for: 0 for no label or a rare one, 1 to 8 for the others."""
    counts = Counter(label for label in points.label if label is not None)
    named = sorted(sorted(counts, key=lambda label: (-counts[label], label))[:NAMED_LABELS])
    number = {label: i for i, label in enumerate(named, start=1)}
    others = len(counts) - len(named)
    rest = f"{others} other labels" if others > 1 else "1 other label" if others else "no label"
    return [0 if label is None else number.get(label, 0) for label in points.label], [rest, *named]


def colours_by_modality(points: MapPoints) -> tuple[list[int], list[str]]:
    """The colour of every point, and what colours stand for."""
    return [1 if modality == "video" else 2 for modality in points.modality], ["", "picture", "sound"]


def colours_by_group(points: MapPoints) -> tuple[list[int], list[str]]:
    """The same for groups of similar points, by k-means.

    Pictures and sounds often lie apart as a whole. Their means are subtracted, so that groups are of the same content
    and not of the same kind.
    """
    from sklearn.cluster import KMeans  # takes seconds
    from threadpoolctl import threadpool_limits

    vectors = points.vectors.copy()
    for modality in MODALITIES:
        own = np.array(points.modality) == modality
        if own.any():
            vectors[own] -= vectors[own].mean(axis=0)
    count = min(_GROUPS, len(np.unique(vectors.round(5), axis=0)))
    with threadpool_limits(1):
        found: Int[np.ndarray, " points"] = KMeans(count, n_init=4, random_state=0).fit_predict(vectors)
    return [int(group) + 1 for group in found], ["", *(f"group {i}" for i in range(1, count + 1))]


def _spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers below ``count``, spread evenly.

    Examples
    --------
    >>> _spread(3, 5), _spread(10, 4)
    ([0, 1, 2], [0, 3, 6, 9])
    """
    rows: list[int] = np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()
    return rows
