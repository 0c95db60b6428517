"""Search an index: the moments nearest to a video, a sound, an image or a text, or the answer that it is not there.

A search compares one query vector with all windows of one modality:

1. `cmacc.search.query` makes the vector: the mean embedding of the query's k windows. It is compared with the means of
   k consecutive windows (`Rows.runs`).
2. Scores are cosines with the windows: all of them up to `EXACT_ROWS` rows of the index; in a larger one, LanceDB's
   approximate index finds the samples, and their windows are compared exactly.
3. `cmacc.search.calibration` says which scores count: those that a search for something that is not there reaches at
   most at the false-alarm rate.
4. `cmacc.search.segments` joins neighbouring windows.

A query with picture and sound, or a search in both modalities, is several searches, which share the false-alarm rate.
They are ranked by how far their scores lie above those of searches for what is not there, because cosines within a
modality are larger than those between two.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float

from cmacc.encoders import MODALITIES
from cmacc.pretraining.clip_encoder import ClipEncoder, EncoderError, MatchingEncoder, Modality
from cmacc.search.calibration import (
    APART_SECONDS,
    LEAST_QUERIES,
    Calibration,
    calibrate,
    query_count,
    random_queries,
    stretch_count,
)
from cmacc.search.query import By, Query, query_of_file, query_of_text
from cmacc.search.segments import segments
from cmacc.search.table import (
    FACT_TYPES,
    FACTS,
    Rows,
    SearchError,
    Space,
    WindowTable,
    among_stretches,
    both_conditions,
)
from cmacc.transfer import open_encoder
from cmacc.transfer.open import opened_object
from cmacc.transfer.text import encode_text

Where = Literal["audio", "video", "both"]
# Candidates of the approximate index for each moment asked for: neighbouring windows score alike.
_CANDIDATES_PER_MOMENT = 20
_SAMPLES_PER_MOMENT = 3
# A longer segment of a large index is cut off.
_AROUND_SECONDS = 60.0
_MOST_CALIBRATIONS = 16
# Percentile of random pairs that windows must reach to join a better one.
_JOINED_PERCENTILE = 99.0
# Common things: a search for most of them is one for something that is not there.
_WORDS = Path(__file__).with_name("words.txt")


@dataclass(frozen=True)
class Moment:
    """A stretch of a video that a search found.

    Attributes
    ----------
    path
        The file; for a packed sample, its shard.
    start_seconds, end_seconds
        On the file's clock.
    modality
        Whether its picture or its sound was found.
    score
        Cosine of the query and the best window.
    percentile
        Share of random pairs of the index with a lower score, in percent.
    by
        What was searched with: the query's picture, sound or text.
    label
        Label of the file, if it has one.
    key
        Name of a packed sample.
    """

    path: str
    start_seconds: float
    end_seconds: float
    modality: Modality
    score: float
    percentile: float
    by: By
    label: str | None = None
    key: str | None = None


@dataclass(frozen=True)
class Answer:
    """The outcome of a search.

    Attributes
    ----------
    moments
        What was found, best first; empty if nothing was.
    best_score
        Score of the best window, found or not.
    chance
        Share of searches for something that is not there whose best score is as high.
    false_alarm_rate
        The rate that was asked for.
    window_count
        Number of windows of the index.
    notes
        What a user should know about the query.
    """

    moments: tuple[Moment, ...]
    best_score: float
    chance: float
    false_alarm_rate: float
    window_count: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Scored:
    """One query vector against one modality."""

    by: By
    modality: Modality
    rows: Rows
    scores: Float[np.ndarray, " rows"]
    typical: float
    calibration: Calibration


class Index:
    """An index of embedded videos, from `cmacc embed`.

    Parameters
    ----------
    address
        Its folder, or the URL of an object store.
    encoder
        The encoder that made it, if that is not found under the name that the index states: another name, or an object.
    device
        Device for queries. Default: the CPU.
    download
        Whether the encoder may be downloaded.

    Raises
    ------
    SearchError
        There is no index, or the extra ``search`` is not installed.

    Examples
    --------
    ::

        index = Index.open("videos.index")
        answer = index.search("bark.wav", into="video", top=5)
        for moment in answer.moments:
            print(moment.path, moment.start_seconds, moment.end_seconds, moment.percentile)
    """

    def __init__(
        self,
        address: str | Path,
        *,
        encoder: str | ClipEncoder | None = None,
        device: torch.device | None = None,
        download: bool = False,
    ) -> None:
        self.table = WindowTable(address)
        self._given = encoder
        self._device = device
        self._download = download
        self._forget()

    def _forget(self) -> None:
        """Drop what was read and computed of another version of the index."""
        self._rows: dict[tuple[Modality, str | None, Space, int], Rows] = {}
        self._outlines: dict[Modality, Rows] = {}
        self._samples: dict[tuple[Modality, int, Space], Rows] = {}
        self._calibrations: dict[tuple[By, Modality, str | None, int], Calibration] = {}

    @classmethod
    def open(
        cls,
        address: str | Path,
        *,
        encoder: str | ClipEncoder | None = None,
        device: torch.device | None = None,
        download: bool = False,
    ) -> "Index":
        """Open an index; the same as the constructor."""
        return cls(address, encoder=encoder, device=device, download=download)

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def encoder(self) -> MatchingEncoder:
        """The encoder that made the index, opened on first use.

        Raises
        ------
        SearchError
            It is not where the index states, or it has other weights.
        """
        description = self.table.description
        given = self._given if self._given is not None else description.encoder
        try:
            if isinstance(given, str):
                opened = open_encoder(given, self._device, download=self._download)
            else:
                opened = opened_object(given)
        except EncoderError as error:
            raise SearchError(f"index {self.table.store.root}: {error}; say where it is with --encoder") from error
        if opened.facts.weights != description.weights:
            raise SearchError(
                f"index {self.table.store.root}: the encoder must have weights {description.weights}, those of the "
                f"index, got {opened.facts.weights} of {opened.facts.name}; embed the videos again, or name the "
                "encoder with --encoder"
            )
        encoder = opened.encoder
        assert isinstance(encoder, MatchingEncoder), "others are refused when the index is made"
        return encoder

    def rows(self, modality: Modality, *, where: str | None = None) -> Rows:
        """The windows of one modality, with their vectors.

        Parameters
        ----------
        modality
            ``video`` or ``audio``.
        where
            Condition in SQL on the columns of the table, such as ``label = 'dog'``.

        Raises
        ------
        SearchError
            The condition is not valid.
        """
        return self._kept_rows(modality, where, "shared")

    def search(
        self,
        clip: str | Path | None = None,
        *,
        text: str | None = None,
        at_seconds: float | None = None,
        window: tuple[float, float] | None = None,
        by: Modality | None = None,
        into: Where = "both",
        where: str | None = None,
        top: int = 10,
        false_alarm_rate: float = 0.01,
    ) -> Answer:
        """Find the moments nearest to a clip or a text.

        Parameters
        ----------
        clip
            A video, sound or image file. An image is searched for as a video that does not move.
        text
            A text instead, if the index's encoder has a text side.
        at_seconds
            Search with one window of the clip, with its centre there.
        window
            Search with the clip between these two times.
        by
            Search with the clip's picture or sound alone. Default: both, if it has both.
        into
            Search in sounds, in pictures, or in both.
        where
            Condition in SQL on the columns of the table, such as ``label = 'dog'``.
        top
            Most moments to return.
        false_alarm_rate
            Share of searches for something that is not in the index that return anything, in (0, 1]. With 1, a search
            returns the best moments, however bad.

        Raises
        ------
        SearchError
            An argument is not valid, or the clip has nothing to search with.
        MediaError
            The clip does not decode.
        """
        if (clip is None) == (text is None):
            raise SearchError("search: must have a file or a text, got both or none")
        if text is not None and (at_seconds, window, by) != (None, None, None):
            raise SearchError("search: --at, --window and --by choose a part of a file, got a text")
        if into not in get_args(Where):
            raise SearchError(f"search: must be in audio, video or both, got {into!r}")
        if top < 1:
            raise SearchError(f"search: top must be at least 1, got {top}")
        if not 0 < false_alarm_rate <= 1:
            raise SearchError(f"search: the false-alarm rate must be in (0, 1], got {false_alarm_rate:g}")
        weights = self.table.description.weights
        if self.table.refresh():
            self._forget()
            if self.table.description.weights != weights:
                self.__dict__.pop("encoder", None)
        if text is not None:
            query = query_of_text(self.encoder, text)
        else:
            assert clip is not None
            hop_seconds = self.table.description.hop_seconds
            query = query_of_file(self.encoder, Path(clip), hop_seconds, at_seconds=at_seconds, window=window, by=by)
        return self.search_vectors(query, into=into, where=where, top=top, false_alarm_rate=false_alarm_rate)

    def search_vectors(
        self,
        query: Query,
        *,
        into: Where = "both",
        where: str | None = None,
        top: int = 10,
        false_alarm_rate: float = 0.01,
    ) -> Answer:
        """The same for vectors of your own; see `search`."""
        targets: Sequence[Modality] = MODALITIES if into == "both" else (into,)
        searches = [
            scored
            for (by, own), vector in query.vectors.items()
            for modality in ((own,) if own is not None else targets)
            if modality in targets
            and (scored := self._scored(by, modality, vector, query.window_count, where, top)) is not None
        ]
        if not searches:
            raise SearchError(f"search: the index must have windows of {into} to search in, got none")
        # The searches of a query share its rate (Bonferroni).
        rate = false_alarm_rate / len(searches) if false_alarm_rate < 1 else 1.0
        found: list[tuple[float, Moment]] = []
        for one in searches:
            least, joined = one.calibration.threshold(rate), one.calibration.score_at(_JOINED_PERCENTILE)
            starts, ends = one.rows.seconds("start_seconds"), one.rows.seconds("end_seconds")
            for segment in segments(one.scores, one.rows.first, starts, ends, one.typical, least, top, joined):
                score = float(one.scores[segment.row])
                found.append((one.calibration.margin(score), self._moment(one, segment.row, segment[1:], score)))
        found.sort(key=lambda pair: -pair[0])
        chances = [one.calibration.chance(float(one.scores.max())) for one in searches]
        best = int(np.argmin(chances))
        notes = list(query.notes)
        least_rate = max(one.calibration.least_rate for one in searches)
        if rate < least_rate:
            notes.append(
                f"to hold a rate of {false_alarm_rate:g} takes more videos than the index has; the lowest that it can "
                f"hold, for {len(searches)} search{'es' if len(searches) > 1 else ''} by and in picture or sound, is "
                f"{min(1.0, least_rate * len(searches)):.2g}"
            )
        return Answer(
            tuple(_distinct([moment for _, moment in found], top)),
            float(searches[best].scores.max()),
            min(1.0, chances[best] * len(searches)),
            false_alarm_rate,
            len(self.table),
            tuple(notes),
        )

    def _moment(self, one: _Scored, row: int, seconds: tuple[float, float], score: float) -> Moment:
        (fact,) = one.rows.facts.slice(row, 1).to_pylist()
        start = max(seconds[0], fact["sample_start_seconds"])
        end = min(seconds[1], fact["sample_end_seconds"])
        root = self.table.description.root
        percentile = one.calibration.percentile(score)
        return Moment(
            f"{root}/{fact['path']}", start, end, one.modality, score, percentile, one.by, fact["label"], fact["key"]
        )

    def _scored(
        self, by: By, modality: Modality, vector: Float[np.ndarray, " dim"], windows: int, where: str | None, top: int
    ) -> _Scored | None:
        """Scores of all windows, or of those around what the approximate index finds; None without windows."""
        space: Space = "text" if by == "text" else "shared"
        vector = np.asarray(vector, np.float32)  # with float64, numpy would convert all rows for each search
        if self._is_exact:
            rows = self._kept_rows(modality, where, space, windows)
        else:
            found = self.table.nearest(vector, modality, _CANDIDATES_PER_MOMENT * top, where=where, space=space)
            near = _around(found, _SAMPLES_PER_MOMENT * top)
            rows = self.table.rows(modality, where=both_conditions(near, where), space=space).runs(windows)
        if len(rows) == 0:
            return None
        scores = rows.vectors @ vector
        typical = _median(scores if self._is_exact else self._sampled(modality, windows, space).vectors @ vector)
        return _Scored(by, modality, rows, scores, typical, self._calibration(by, modality, windows, where))

    def _calibration(self, by: By, modality: Modality, windows: int, where: str | None) -> Calibration:
        key = (by, modality, where, windows)
        if key not in self._calibrations:
            while len(self._calibrations) >= _MOST_CALIBRATIONS:
                del self._calibrations[next(iter(self._calibrations))]
            space: Space = "text" if by == "text" else "shared"
            if self._is_exact:
                rows = self._kept_rows(modality, where, space, windows)
                targets: Iterable[Rows] = [rows]
                count = query_count(len(rows), rows.vectors.shape[1])
            else:
                parts = self.table.parts(modality, where=where, space=space)
                targets, count = (part.runs(windows) for part in parts), LEAST_QUERIES
            apart_seconds = APART_SECONDS + (windows - 1) * self.table.description.hop_seconds
            if by == "text":
                drawn = self._text_queries(modality)
                stretches = len(drawn)
            else:
                source = self._kept_rows(by, windows=windows) if self._is_exact else self._sampled(by, windows)
                drawn = random_queries(source, count)
                stretches = stretch_count(self._outline(by), apart_seconds)
            self._calibrations[key] = calibrate(drawn, stretches, targets, apart_seconds)
        return self._calibrations[key]

    @property
    def _is_exact(self) -> bool:
        return self.table.description.approximate is None

    def _kept_rows(
        self, modality: Modality, where: str | None = None, space: Space = "shared", windows: int = 1
    ) -> Rows:
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
                self._rows[key] = self._kept_rows(modality, where, space).runs(windows)
        return self._rows[key]

    def _outline(self, modality: Modality) -> Rows:
        """The windows of a modality; of a large index without their vectors."""
        if self._is_exact:
            return self._kept_rows(modality)
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

    def _text_queries(self, modality: Modality) -> Rows:
        """Texts about common things."""
        vectors = (
            encode_text(self.encoder, [f"a {word}" for word in _WORDS.read_text().split()], modality)
            .float()
            .cpu()
            .numpy()
        )
        nothing = {name: pa.nulls(len(vectors), kind) for name, kind in FACT_TYPES.items()}
        facts = pa.table(nothing | {"content_hash": [""] * len(vectors), "start_seconds": [0.0] * len(vectors)})
        return Rows(facts, vectors)


def _distinct(moments: Sequence[Moment], count: int) -> list[Moment]:
    """The first moments of different places: picture and sound of one place are often both found."""
    kept: list[Moment] = []
    for moment in moments:
        if len(kept) == count:
            break
        if not any(
            (moment.path, moment.key) == (other.path, other.key)
            and min(moment.end_seconds, other.end_seconds) > max(moment.start_seconds, other.start_seconds)
            for other in kept
        ):
            kept.append(moment)
    return kept


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
