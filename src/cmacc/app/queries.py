"""What is searched for, and where: from the fields of the page to an answer.

Nothing here knows of the page's library, so that a test can ask as a visitor does.
"""

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from cmacc.clips.media.decoding import facts_of
from cmacc.clips.media.guard import GuardError, guarded
from cmacc.encoders import MODALITIES
from cmacc.pretraining.clip_encoder import MatchingEncoder, Modality
from cmacc.pretraining.features import unit_rows
from cmacc.search import Answer, Index, Query, query_of_file, query_of_text
from cmacc.search.index import Where
from cmacc.search.query import IMAGES, MOST_WINDOWS, ROUNDING_SECONDS, By
from cmacc.search.table import Rows, among_stretches, sql_text

LONGEST_QUERY_SECONDS = 600.0
MOST_RESULTS = 100
_PROBE_SECONDS = 30.0
_FALSE_ALARM_RATE = 0.01
_MOST_PIXELS = 50_000_000
_MOST_CHARACTERS = 500
# An index keeps vectors in memory and changes them when it is refreshed: one thread at a time.
_one_at_a_time = threading.Lock()
# A thread has a guarded process of its own, which takes half a gigabyte: one for all visitors.
_looking = ThreadPoolExecutor(1, thread_name_prefix="look-at-upload")


class AskError(ValueError):
    """A search that cannot be done; the message is for the page."""


@dataclass(frozen=True)
class Uploaded:
    """A file of the visitor: a video, a sound or a picture."""

    path: Path

    @property
    def is_picture(self) -> bool:
        """Whether it is a picture, which has no time."""
        return self.path.suffix.lower() in IMAGES

    @property
    def name(self) -> str:
        """What it is called on the page."""
        return self.path.name


@dataclass(frozen=True)
class Picked:
    """A file of the index: its path relative to the root, and the key of a packed sample."""

    path: str
    key: str | None = None

    @property
    def name(self) -> str:
        """What it is called on the page."""
        return self.key or self.path


@dataclass(frozen=True)
class Words:
    """A text."""

    text: str

    @property
    def name(self) -> str:
        """What it is called on the page."""
        return f"“{self.text}”"


@dataclass(frozen=True)
class Asked:
    """A search.

    Attributes
    ----------
    query
        What is searched for.
    start_seconds, end_seconds
        The part of a file to search with; None for its start and its end.
    by
        Whether to search with the picture or the sound alone.
    into
        Whether to search in pictures, sounds or both.
    labels
        Only files with one of these labels; all if there are none.
    name_contains
        Only files whose name (path under the root, or key) contains this, in capitals or not.
    top
        Most results.
    nearest
        Whether to show the nearest moments, however bad.
    """

    query: Uploaded | Picked | Words
    start_seconds: float | None = None
    end_seconds: float | None = None
    by: Modality | None = None
    into: Where = "both"
    labels: tuple[str, ...] = ()
    name_contains: str = ""
    top: int = 10
    nearest: bool = False


@dataclass(frozen=True)
class Found:
    """An answer, and what a visitor should know about the query.

    Attributes
    ----------
    answer
        The moments.
    notes
        About the query.
    by
        What was searched with: its picture, its sound or its words.
    is_nearest
        Whether these are the nearest moments, however bad: asked for, or because the index is too small to tell more.
    """

    answer: Answer
    notes: tuple[str, ...]
    by: tuple[By, ...]
    is_nearest: bool


def warm_up(index: Index) -> None:
    """Open the encoder and the process for uploads in the background, so that the first search need not wait for them.

    What is wrong with the encoder is said by the first search.
    """

    def prepare() -> None:
        with suppress(Exception):
            _guarded_facts("")
        with suppress(Exception):
            encoder_of(index)

    threading.Thread(target=prepare, daemon=True, name="warm-up").start()


def encoder_of(index: Index) -> MatchingEncoder:
    """The encoder of an index, opened once however many threads ask for it at the same time."""
    with _one_at_a_time:
        return index.encoder


def ask(index: Index, asked: Asked, longest_seconds: float = LONGEST_QUERY_SECONDS) -> Found:
    """Search; an upload may last so long.

    Raises
    ------
    AskError
        The query cannot be searched with.
    SearchError, EncoderError, MediaError
        As in `Index.search`.
    """
    if not 1 <= asked.top <= MOST_RESULTS:
        raise AskError(f"The number of results must be 1 to {MOST_RESULTS}, got {asked.top}.")
    for seconds in (asked.start_seconds, asked.end_seconds):
        if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
            raise AskError(f"“From” and “to” must be seconds from 0 on, got {seconds:g}.")
    with _one_at_a_time:
        index.refresh()
    weights = index.table.description.weights
    query = _query(index, asked, longest_seconds)
    where = where_of(asked.labels, asked.name_contains)
    with _one_at_a_time:
        if index.table.description.weights != weights:
            raise AskError("The index was made again with another encoder meanwhile. Search once more.")
        if where is not None and len(index.table.columns("path", where=where)) == 0:
            raise AskError("No file of the index fits these labels and this name.")

        def answer_at(rate: float) -> Answer:
            return index.search_vectors(query, into=asked.into, where=where, top=asked.top, false_alarm_rate=rate)

        answer = answer_at(1.0 if asked.nearest else _FALSE_ALARM_RATE)
        # Too few files to hold the rate: every answer would be that nothing was found.
        is_nearest = asked.nearest or answer.least_rate > _FALSE_ALARM_RATE
        if is_nearest and not answer.moments:
            answer = answer_at(1.0)
    return Found(answer, query.notes, tuple(by for by, _ in query.vectors), is_nearest)


def where_of(labels: Sequence[str], name_contains: str) -> str | None:
    """Condition in SQL for files with one of these labels, whose name contains a text; None without either.

    Examples
    --------
    >>> where_of(["dog", "O'Hara"], "50%")
    "(label IN ('dog', 'O''Hara')) AND (strpos(lower(coalesce(key, path)), lower('50%')) > 0)"
    """
    conditions = []
    if labels:
        conditions.append(f"label IN ({', '.join(map(sql_text, labels))})")
    if name_contains:
        # Not LIKE, in which % and _ have a meaning.
        conditions.append(f"strpos(lower(coalesce(key, path)), lower({sql_text(name_contains)})) > 0")
    return " AND ".join(f"({condition})" for condition in conditions) or None


def _query(index: Index, asked: Asked, longest_seconds: float) -> Query:
    query = asked.query
    if isinstance(query, Picked):
        return _query_of_rows(index, query, asked)
    encoder = encoder_of(index)
    if isinstance(query, Words):
        if not query.text:
            raise AskError("Type a few words to search with.")
        if len(query.text) > _MOST_CHARACTERS:
            raise AskError(f"The words must be at most {_MOST_CHARACTERS} characters, got {len(query.text)}.")
        return query_of_text(encoder, query.text)
    window = _checked_window(query, asked, longest_seconds)
    made = query_of_file(encoder, query.path, index.table.description.hop_seconds, window=window, by=asked.by)
    notes = tuple(note.replace("with --window", "with “from” and “to”") for note in made.notes)
    return Query(made.vectors, made.window_count, notes)


def _checked_window(query: Uploaded, asked: Asked, longest_seconds: float) -> tuple[float, float] | None:
    """The part of an upload to search with, after a look at it in a process that may crash."""
    try:
        duration, has_picture, has_sound = _guarded_facts(str(query.path))
    except GuardError as error:
        if not query.path.is_file():
            raise AskError(f"{query.name} is gone; choose it again") from error
        what = "is empty" if query.path.stat().st_size == 0 else "is no video, sound or picture, or is damaged"
        reason = str(error).replace(str(query.path), query.name).removeprefix(f"{query.name}: ")
        raise AskError(f"{query.name} {what} ({reason})") from error
    has = {"video": has_picture, "audio": has_sound}
    if asked.by is not None and not has[asked.by]:
        what = "picture" if asked.by == "video" else "sound"
        raise AskError(f"{query.name}: must have a {what} to search with it, got a file without {what}")
    if query.is_picture:
        return None
    if duration > longest_seconds:
        raise AskError(
            f"{query.name}: must last at most {longest_seconds / 60:g} minutes, got {duration / 60:.1f}; "
            "cut out the part that matters"
        )
    if asked.start_seconds is None and asked.end_seconds is None:
        return None
    begin = asked.start_seconds or 0.0
    end = duration if asked.end_seconds is None else asked.end_seconds
    if not (begin < end <= duration + ROUNDING_SECONDS and begin < duration):
        raise AskError(
            f"{query.name}: “from” must come before “to”, and both lie in its {duration:.1f} s, got {begin:g} and "
            f"{end:g}"
        )
    return begin, end


def _guarded_facts(path: str) -> tuple[float, bool, bool]:
    facts = _looking.submit(guarded, facts_of, path, timeout_seconds=_PROBE_SECONDS).result()
    duration, width, height, has_sound = facts
    if width * height > _MOST_PIXELS:
        raise AskError(
            f"{Path(path).name}: must have at most {_MOST_PIXELS / 1e6:.0f} million pixels, got {width} x {height}"
        )
    return duration, width > 0, has_sound


def _query_of_rows(index: Index, query: Picked, asked: Asked) -> Query:
    """The mean of the windows that the index has of a file: nothing is decoded, and the file may be gone."""
    begin = asked.start_seconds or 0.0
    end = math.inf if asked.end_seconds is None else asked.end_seconds
    if not begin < end:
        raise AskError(f"{query.name}: “from” must come before “to”, got {begin:g} and {end:g}")
    where = among_stretches([(query.path, query.key, -1e9, 1e9)])
    vectors: dict[tuple[By, Modality | None], Float[np.ndarray, " dim"]] = {}
    count, notes = 1, list[str]()
    wanted: Sequence[Modality] = MODALITIES if asked.by is None else (asked.by,)
    for modality in wanted:
        with _one_at_a_time:
            rows = index.table.rows(modality, where=where)
        if len(rows):
            length = float(rows.seconds("end_seconds").max())
            if begin >= length:
                raise AskError(f"{query.name}: “from” must lie in its {length:.1f} s, got {begin:g}")
            chosen = _windows_between(rows, begin, end)
            if len(chosen) > MOST_WINDOWS:
                notes = [f"{query.name}: {MOST_WINDOWS} windows from its middle are searched with; choose a part"]
                middle = (len(chosen) - MOST_WINDOWS) // 2
                chosen = chosen[middle : middle + MOST_WINDOWS]
            count = len(chosen)
            mean = rows.vectors[chosen].mean(axis=0, keepdims=True)
            vectors[(modality, None)] = np.asarray(unit_rows(mean)[0], np.float32)
    if not vectors:
        lacking = {"video": "no picture", "audio": "no sound", None: "nothing"}[asked.by]
        raise AskError(f"{query.name}: must have what is searched with, got {lacking} of it in the index")
    return Query(vectors, count, tuple(notes))


def _windows_between(rows: Rows, begin: float, end: float) -> list[int]:
    """Windows that lie between two times; if none does, the one whose middle is nearest to theirs."""
    starts, ends = rows.seconds("start_seconds"), rows.seconds("end_seconds")
    inside = np.flatnonzero((starts >= begin - 1e-6) & (ends <= end + 1e-6))
    if len(inside) == 0:
        middle = begin if math.isinf(end) else (begin + end) / 2
        inside = np.array([np.abs((starts + ends) / 2 - middle).argmin()])
    return [int(row) for row in inside]
