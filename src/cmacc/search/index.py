"""Search an index: the moments nearest to a video, a sound, an image or a text, or the answer that it is not there.

A search compares one query vector with all windows of one modality:

1. `cmacc.search.query` makes the vector: the mean embedding of the query's k windows. It is compared with the means of
   k consecutive windows (`Rows.runs`).
2. `cmacc.search.scores` compares it with all windows, or with those around what the approximate index finds.
3. `cmacc.search.calibration` says which scores count: those that a search for something that is not there reaches at
   most at the false-alarm rate.
4. `cmacc.search.segments` joins neighbouring windows.

A query with picture and sound, or a search in both modalities, is several searches, which share the false-alarm rate.
They are ranked by how far their scores lie above those of searches for what is not there, because cosines within a
modality are larger than those between two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float

from cmacc.encoders import MODALITIES
from cmacc.pretraining.clip_encoder import ClipEncoder, EncoderError, MatchingEncoder, Modality
from cmacc.search.query import By, Query, query_of_file, query_of_text
from cmacc.search.scores import Scored, Scorer
from cmacc.search.segments import segments
from cmacc.search.table import Rows, SearchError, WindowTable
from cmacc.transfer import open_encoder
from cmacc.transfer.open import opened_object
from cmacc.transfer.text import encode_text

Where = Literal["audio", "video", "both"]
# Percentile of random pairs that windows must reach to join a better one.
_JOINED_PERCENTILE = 99.0


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
    least_rate
        Lowest rate of false alarms that the index can hold for this query; nothing is found at a lower one.
    """

    moments: tuple[Moment, ...]
    best_score: float
    chance: float
    false_alarm_rate: float
    window_count: int
    notes: tuple[str, ...] = ()
    least_rate: float = 0.0


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
        self._scorer = Scorer(self.table, self._encode_texts)

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
        return self._scorer.rows(modality, where)

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
        self.refresh()
        if text is not None:
            query = query_of_text(self.encoder, text)
        else:
            assert clip is not None
            hop_seconds = self.table.description.hop_seconds
            query = query_of_file(self.encoder, Path(clip), hop_seconds, at_seconds=at_seconds, window=window, by=by)
        return self.search_vectors(query, into=into, where=where, top=top, false_alarm_rate=false_alarm_rate)

    def refresh(self) -> None:
        """Go on to the latest version of the index, as `search` does."""
        weights = self.table.description.weights
        if self.table.refresh():
            self._scorer = Scorer(self.table, self._encode_texts)
            if self.table.description.weights != weights:
                self.__dict__.pop("encoder", None)

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
            and (scored := self._scorer.scored(by, modality, vector, query.window_count, where, top)) is not None
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
        least_rate = min(1.0, max(one.calibration.least_rate for one in searches) * len(searches))
        if false_alarm_rate < least_rate:
            notes.append(
                f"to hold a rate of {false_alarm_rate:g} takes more videos than the index has; the lowest that it can "
                f"hold, for {len(searches)} search{'es' if len(searches) > 1 else ''} by and in picture or sound, is "
                f"{least_rate:.2g}"
            )
        return Answer(
            tuple(_distinct([moment for _, moment in found], top)),
            float(searches[best].scores.max()),
            min(1.0, chances[best] * len(searches)),
            false_alarm_rate,
            len(self.table),
            tuple(notes),
            least_rate,
        )

    def _moment(self, one: Scored, row: int, seconds: tuple[float, float], score: float) -> Moment:
        (fact,) = one.rows.facts.slice(row, 1).to_pylist()
        start = max(seconds[0], fact["sample_start_seconds"])
        end = min(seconds[1], fact["sample_end_seconds"])
        root = self.table.description.root
        percentile = one.calibration.percentile(score)
        return Moment(
            f"{root}/{fact['path']}", start, end, one.modality, score, percentile, one.by, fact["label"], fact["key"]
        )

    def _encode_texts(self, texts: Sequence[str], modality: Modality) -> Float[np.ndarray, "texts dim"]:
        return np.asarray(encode_text(self.encoder, texts, modality).float().cpu().numpy())


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
