"""Scores of one query vector against all windows of a modality, and what they mean; read once, and kept.

Up to `EXACT_ROWS` rows of the index, all windows are compared. In a larger one, LanceDB's approximate index finds
windows, and those around them are compared exactly.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from cmacc.pretraining.clip_encoder import Modality
from cmacc.search.calibration import (
    APART_SECONDS,
    LEAST_QUERIES,
    Calibration,
    calibrate,
    query_count,
    random_queries,
    stretch_count,
)
from cmacc.search.query import By
from cmacc.search.table import FACT_TYPES, FACTS, Rows, Space, WindowTable, among_stretches, both_conditions

# Candidates of the approximate index for each moment asked for: neighbouring windows score alike.
_CANDIDATES_PER_MOMENT = 20
_SAMPLES_PER_MOMENT = 3
# A longer segment of a large index is cut off.
_AROUND_SECONDS = 60.0
_MOST_CALIBRATIONS = 16
# Common things: a search for most of them is one for something that is not there.
_WORDS = Path(__file__).with_name("words.txt")
EncodeTexts = Callable[[Sequence[str], Modality], Float[np.ndarray, "texts dim"]]


@dataclass(frozen=True)
class Scored:
    """One query vector against one modality.

    Attributes
    ----------
    by, modality
        What is searched with, and in.
    rows, scores
        ``(n,)``: windows, or runs of them, and their cosines with the query.
    typical
        Median score of the query.
    calibration
        What scores mean.
    """

    by: By
    modality: Modality
    rows: Rows
    scores: Float[np.ndarray, " rows"]
    typical: float
    calibration: Calibration


class Scorer:
    """Scores query vectors against one version of a table.

    Parameters
    ----------
    table
        The table; make a new scorer after it was refreshed.
    encode_texts
        Gives the vectors of texts in the space of a modality's features.
    """

    def __init__(self, table: WindowTable, encode_texts: EncodeTexts) -> None:
        self.table = table
        self._encode_texts = encode_texts
        self._rows: dict[tuple[Modality, str | None, Space, int], Rows] = {}
        self._outlines: dict[Modality, Rows] = {}
        self._samples: dict[tuple[Modality, int, Space], Rows] = {}
        self._calibrations: dict[tuple[By, Modality, str | None, int], Calibration] = {}

    def scored(
        self, by: By, modality: Modality, vector: Float[np.ndarray, " dim"], windows: int, where: str | None, top: int
    ) -> Scored | None:
        """Scores of all windows, or of those around what the approximate index finds; None without windows."""
        space: Space = "text" if by == "text" else "shared"
        vector = np.asarray(vector, np.float32)  # with float64, numpy would convert all rows for each search
        if self._is_exact:
            rows = self.rows(modality, where, space, windows)
        else:
            found = self.table.nearest(vector, modality, _CANDIDATES_PER_MOMENT * top, where=where, space=space)
            near = _around(found, _SAMPLES_PER_MOMENT * top)
            rows = self.table.rows(modality, where=both_conditions(near, where), space=space).runs(windows)
        if len(rows) == 0:
            return None
        scores = rows.vectors @ vector
        typical = _median(scores if self._is_exact else self._sampled(modality, windows, space).vectors @ vector)
        return Scored(by, modality, rows, scores, typical, self._calibration(by, modality, windows, where))

    def _calibration(self, by: By, modality: Modality, windows: int, where: str | None) -> Calibration:
        key = (by, modality, where, windows)
        if key not in self._calibrations:
            while len(self._calibrations) >= _MOST_CALIBRATIONS:
                del self._calibrations[next(iter(self._calibrations))]
            space: Space = "text" if by == "text" else "shared"
            if self._is_exact:
                rows = self.rows(modality, where, space, windows)
                targets: Iterable[Rows] = [rows]
                count = query_count(len(rows), rows.vectors.shape[1])
            else:
                parts = self.table.parts(modality, where=where, space=space)
                targets, count = (part.runs(windows) for part in parts), LEAST_QUERIES
            apart_seconds = APART_SECONDS + (windows - 1) * self.table.description.hop_seconds
            if by == "text":
                drawn = _rows_of_texts(
                    self._encode_texts([f"a {word}" for word in _WORDS.read_text().split()], modality)
                )
                stretches = len(drawn)
            else:
                source = self.rows(by, windows=windows) if self._is_exact else self._sampled(by, windows)
                drawn = random_queries(source, count)
                stretches = stretch_count(self._outline(by), apart_seconds)
            self._calibrations[key] = calibrate(drawn, stretches, targets, apart_seconds)
        return self._calibrations[key]

    @property
    def _is_exact(self) -> bool:
        return self.table.description.approximate is None

    def rows(self, modality: Modality, where: str | None = None, space: Space = "shared", windows: int = 1) -> Rows:
        """All windows, or means of so many consecutive ones; kept in memory."""
        key = (modality, where, space, windows)
        if key not in self._rows:
            # Besides the windows themselves, only those of the last condition and the last number are kept.
            self._rows = {
                known: rows
                for known, rows in self._rows.items()
                if known[1] in (None, where) and known[3] in (1, windows)
            }
            if windows == 1:
                self._rows[key] = self.table.rows(modality, where=where, space=space)
            else:
                self._rows[key] = self.rows(modality, where, space).runs(windows)
        return self._rows[key]

    def _outline(self, modality: Modality) -> Rows:
        """The windows of a modality; of a large index without their vectors."""
        if self._is_exact:
            return self.rows(modality)
        if modality not in self._outlines:
            self._outlines[modality] = Rows.outline(self.table.columns(*FACTS, where=f"modality = '{modality}'"))
        return self._outlines[modality]

    def _sampled(self, modality: Modality, windows: int, space: Space = "shared") -> Rows:
        """The mean of so many consecutive windows of each of some random samples of a large index."""
        key = (modality, windows, space)
        if key not in self._samples:
            outline, rng = self._outline(modality), np.random.default_rng(0)
            count = len(outline.first) - 1
            starts, stretches = outline.seconds("start_seconds"), []
            for sample in rng.choice(count, min(count, LEAST_QUERIES), replace=False).tolist():
                begin, end = int(outline.first[sample]), int(outline.first[sample + 1])
                row = begin + int(rng.integers(max(1, end - begin - windows + 1)))
                (fact,) = outline.facts.slice(row, 1).to_pylist()
                last = float(starts[min(row + windows, end) - 1])
                stretches.append((fact["path"], fact["key"], fact["start_seconds"], last))
            rows = self.table.rows(modality, where=among_stretches(stretches), space=space)
            self._samples[key] = rows.runs(windows)
        return self._samples[key]


def _rows_of_texts(vectors: Float[np.ndarray, "texts dim"]) -> Rows:
    """Vectors of texts as rows that stand in no file."""
    nothing = {name: pa.nulls(len(vectors), kind) for name, kind in FACT_TYPES.items()}
    facts = pa.table(nothing | {"content_hash": [""] * len(vectors), "start_seconds": [0.0] * len(vectors)})
    return Rows(facts, vectors)


def _around(found: pa.Table, count: int) -> str:
    """Condition for the windows around what was found, in the first so many samples."""
    stretches: dict[tuple[str, str | None], tuple[float, float]] = {}
    for fact in found.select(["path", "key", "start_seconds"]).to_pylist():
        place, start = (fact["path"], fact["key"]), fact["start_seconds"]
        if place in stretches or len(stretches) < count:
            first, last = stretches.get(place, (start, start))
            stretches[place] = (min(first, start), max(last, start))
    margin = _AROUND_SECONDS
    return among_stretches([(*place, first - margin, last + margin) for place, (first, last) in stretches.items()])


def _median(scores: Float[np.ndarray, " rows"]) -> float:
    """The median, of an even number the upper one: `numpy.median` takes ten times as long, half of a search."""
    middle = len(scores) // 2
    return float(np.partition(scores, middle)[middle])
