"""What the embeddings hold to be alike: a map of the held-out clips, and sample queries with their answers."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cmacc.clips import ClipSpec, Manifest
from cmacc.transfer import ranks
from cmacc.viewer.figures import map_panel
from cmacc.viewer.gallery import ClipPictures
from cmacc.viewer.page import escape, figure, note, section
from cmacc.viewer.run_folder import Pairs, RunFolder

_MAP_PAIRS = 400  # t-SNE takes a few seconds for as many
_JOINED_PAIRS = 80  # more lines are a haze
_NAMED_LABELS = 8
_FEWEST_FOR_TSNE = 10
_QUERIES = 4
_ANSWERS = 5

NOT_EMBEDDED = (
    "There are no embeddings of held-out clips yet: <code>cmacc evaluate</code> with task <code>pairs</code> writes "
    "them."
)


def map_section(run: RunFolder) -> str:
    """The embeddings in the plane."""
    heading = "Map of the held-out clips"
    if run.pairs is None:
        return section("map", heading, note(NOT_EMBEDDED))
    rows = np.linspace(0, len(run.pairs) - 1, min(len(run.pairs), _MAP_PAIRS)).round().astype(np.int64)
    places, method = plane(np.concatenate([run.pairs.video[rows], run.pairs.audio[rows]]))
    colours, legend = _label_colours(run, rows)
    joined = len(rows) <= _JOINED_PAIRS
    legend = [("ink", "picture", "dot"), ("ink", "sound", "triangle"), *legend]
    svg = map_panel(places[: len(rows)], places[len(rows) :], colours, join_pairs=joined)
    caption = (
        f"{method} of {len(rows):,} of {len(run.pairs):,} clips. Near is alike; how far apart groups lie means "
        "little. "
        + ("A thin line joins the picture and the sound of a clip. " if joined else "")
        + "Pictures and sounds often lie apart as two groups even where each finds its own: what counts is the order "
        "of distances from one to the other."
    )
    parts = [figure("", svg, caption, legend, kind="wide")]
    if run.manifest_fault:
        parts.insert(0, note(f"Labels are not shown: {escape(run.manifest_fault)}"))
    return section("map", heading, *parts)


def queries_section(run: RunFolder) -> str:
    """Sample queries both ways."""
    heading = "Sample queries"
    if run.pairs is None:
        return section("queries", heading, note(NOT_EMBEDDED))
    if run.manifest is None:
        return section("queries", heading, note(f"The clips cannot be shown: {escape(run.manifest_fault)}"))
    gallery = _Gallery(run.pairs, run.manifest, run.config.data.clip, run.config.encoder.mel_bins)
    windows = max((r.windows for r in run.card.results if r.task == "pairs"), default=1) if run.card else 1
    rule = (
        "<p>Chosen by a fixed rule, not by hand: all queries are ordered by the rank of the right answer, and shown "
        "are "
        f"{_QUERIES} that stand evenly spaced in that order, from the best to the worst. The right answer is framed "
        "in green; "
        f"where it is not among the first {_ANSWERS}, it follows with its rank. Frames read from left to right, then "
        "down; "
        "spectrograms show 60 dB, low tones below.</p>"
    )
    if windows > 1:
        rule += f'<p class="quiet">Embeddings are means over {windows} windows of a file; the first is shown.</p>'
    parts = [rule]
    for title, queries, keys, ask, answer in (
        ("Which sound belongs to this picture?", run.pairs.video, run.pairs.audio, gallery.both, gallery.sound),
        ("Which picture belongs to this sound?", run.pairs.audio, run.pairs.video, gallery.sound_alone, gallery.frames),
    ):
        found = ranks(queries, keys)
        parts.append(f"<h3>{title}</h3>")
        parts += [
            _query(gallery, row, int(found[row]), keys @ queries[row], ask, answer) for row in chosen_queries(found)
        ]
    return section("queries", heading, *parts)


def chosen_queries(ranks: NDArray[np.int64], count: int = _QUERIES) -> list[int]:
    """Rows evenly spaced in the order of rank, the best and the worst among them.

    Examples
    --------
    >>> chosen_queries(np.array([9, 1, 4, 1, 2, 7, 30]), 3)
    [1, 2, 6]
    """
    order = np.argsort(ranks, kind="stable")
    places = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return [int(order[place]) for place in places]


def plane(rows: NDArray[np.float32]) -> tuple[NDArray[np.float64], str]:
    """``(n, d)`` to ``(n, 2)``, and how: by principal components, and t-SNE on top where there are ten rows or more."""
    centred = rows.astype(np.float64) - rows.mean(0, dtype=np.float64)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    # A singular vector's sign is arbitrary; fixing it makes the map the same everywhere.
    left *= np.where(np.take_along_axis(left, np.abs(left).argmax(0)[None], axis=0) < 0, -1.0, 1.0)
    components = left * singular
    components = np.pad(components, ((0, 0), (0, max(0, 2 - components.shape[1]))))
    spread = float(components[:, 0].std())
    if (
        len(rows) < _FEWEST_FOR_TSNE or spread < 1e-6
    ):  # t-SNE divides by the spread, and has nothing to show without one
        return components[:, :2], "PCA"
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    tsne = TSNE(init=components[:, :2] / spread * 1e-4, perplexity=min(30.0, (len(rows) - 1) / 3), random_state=0)
    # A thousand short parallel loops: on two busy cores two threads took 21 s for 170 rows, and one 0.7 s.
    with threadpool_limits(1):
        places = tsne.fit_transform(components[:, :50])
    return np.asarray(places, np.float64), "t-SNE (fixed seed, after PCA)"


def _label_colours(run: RunFolder, rows: NDArray[np.int64]) -> tuple[list[str], list[tuple[str, str, str]]]:
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


class _Gallery:
    """Pictures of the held-out clips by their rows."""

    def __init__(self, pairs: Pairs, manifest: Manifest, spec: ClipSpec, mel_bins: int) -> None:
        self._pairs = pairs
        self._pictures = ClipPictures(manifest, spec, mel_bins)

    def name(self, row: int) -> tuple[str, str]:
        """Label (or empty) and file name with the clip's start."""
        return self._pictures.name(*self._window(row))

    def sound(self, row: int) -> str:
        """A spectrogram."""
        return self._pictures.sound(*self._window(row))

    def frames(self, row: int) -> str:
        """Four frames, two by two."""
        return self._pictures.frames(*self._window(row))

    def both(self, row: int) -> str:
        """Four frames in a row beside the spectrogram: a picture that asks, and the sound that it should find."""
        spec = self._pictures.spec
        frames = self._pictures.frames(*self._window(row), columns=4)
        return (
            f'<div class="ask"><div style="--aspect:{4 * spec.frame_width / spec.frame_height:.2f}">{frames}'
            f"<small>the query</small></div>"
            f'<div style="--aspect:1.25">{self.sound(row)}<small>its own sound, to compare</small></div></div>'
        )

    def sound_alone(self, row: int) -> str:
        """A spectrogram that asks."""
        return f'<div class="ask alone"><div style="--aspect:1">{self.sound(row)}<small>the query</small></div></div>'

    def _window(self, row: int) -> tuple[int, float]:
        return int(self._pairs.sample_ids[row]), float(self._pairs.start_seconds[row])


def _query(
    gallery: _Gallery,
    row: int,
    rank: int,
    scores: NDArray[np.float32],
    ask: Callable[[int], str],
    answer: Callable[[int], str],
) -> str:
    label, file_name = gallery.name(row)
    title = escape(f"{label} · {file_name}" if label else file_name)
    others = np.arange(len(scores)) == row
    # As in the ranks, an equal score of another clip stands ahead of the right one.
    order = [int(i) for i in np.lexsort((others, -scores))]
    places: Sequence[tuple[int, int]] = list(enumerate(order[:_ANSWERS], start=1))
    if row not in order[:_ANSWERS]:
        places = [*places, (rank, row)]
    tiles = "\n".join(_answer(gallery, key, place, row, float(scores[key]), answer) for place, key in places)
    return (
        f'<article class="query"><header><b>{title}</b><span class="quiet">right answer at rank {rank:,} of '
        f'{len(scores):,}</span></header>{ask(row)}<ol class="answers">{tiles}</ol></article>'
    )


def _answer(gallery: _Gallery, key: int, place: int, row: int, score: float, show: Callable[[int], str]) -> str:
    label, file_name = gallery.name(key)
    own_label = gallery.name(row)[0]
    kind = "right" if key == row else ""
    if place > _ANSWERS:
        kind += " far"
    remark = "<b>✓ right</b>" if key == row else "same label" if label and label == own_label else ""
    name = f"{escape(label)}<span>{escape(file_name)}</span>" if label else f"<span>{escape(file_name)}</span>"
    return (
        f'<li class="{kind.strip()}">{show(key)}{name}<small>#{place:,} · {score:.2f}'
        f"{' · ' + remark if remark else ''}</small></li>"
    )
