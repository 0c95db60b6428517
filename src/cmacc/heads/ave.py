"""The AVE data set on disk: annotations and splits (Tian et al., 2018, arXiv:1803.08842).

1. ``Annotations.txt`` holds one event interval a line, ``class&id&quality&start&end``. Its line number is the row
   number of every other file. Classes are numbered by first appearance, as the published labels are (compared with
   ``mil_labels.h5`` of the published repository: all 4,143 rows agree).
2. Second t of a row has the row's class if start <= t < end, else background, the number after the last class.
3. The lists of training, validation and test rows are ``trainSet.txt``, ``valSet.txt`` and ``testSet.txt``, with lines
   like the annotations', or ``train_order.h5``, ``val_order.h5`` and ``test_order.h5``, with row numbers. The
   ``*_order_match.h5`` beside them divide the rows for another task (their test rows have no full event, their
   validation rows 3 of 28 classes) and are never read.

A video may stand in several rows, each time with another class. The published lists put 8 test rows and 10 validation
rows beside training rows of the same video: this is counted and told, and `read_ave` can drop those training rows.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cmacc.heads.ave_hdf5 import AveError, read_order

SECONDS: Final = 10
"""Length of every video of AVE, in segments of one second."""
SPLITS: Final = ("train", "validation", "test")
_ANNOTATIONS = "Annotations.txt"
_LISTS = {"train": "trainSet.txt", "validation": "valSet.txt", "test": "testSet.txt"}
_ORDERS = {"train": "train_order.h5", "validation": "val_order.h5", "test": "test_order.h5"}
_PUBLISHED_ROWS = {"train": 3339, "validation": 402, "test": 402}
_PUBLISHED_CLASSES = 28
# SHA-256 of the lines of the published repository (YapengTian/AVE-ECCV18, 93f843f) without the quality.
_PUBLISHED_ANNOTATIONS = "b7476b32652d02e1"


class _Interval(NamedTuple):
    """A line of the annotations or of a list; seconds are half-open."""

    event: str
    video_id: str
    start: int
    end: int


@dataclass(frozen=True)
class AveFacts:
    """What was found, so that no result on a part, or with leaks, is mistaken for one on the data set.

    Attributes
    ----------
    rows
        Annotated rows.
    repeated_rows
        Rows of a video that an earlier row has too (published: 46).
    leaks
        ``validation`` and ``test``: number of their rows whose video is in a training row too, as the lists have it
        (published: 10 and 8).
    dropped_rows
        Training rows dropped because of leaks.
    unlisted_rows
        Annotated rows that no list names.
    unknown_rows
        Rows that a list names and the annotations do not have.
    unavailable_rows
        Rows excluded from the splits because their video is not available.
    missing_lists
        Splits without a list.
    untrained_classes
        Classes without a training row.
    official
        Whether this is the whole published set by numbers: 4,143 rows, 3,339 / 402 / 402 of them in the splits, 28
        classes, nothing missing.
    published_order
        Whether the annotations are those of the published repository in the same order, which the published .h5 follow.
    """

    rows: int
    repeated_rows: int
    leaks: Mapping[str, int]
    dropped_rows: int
    unlisted_rows: int
    unknown_rows: int
    unavailable_rows: int
    missing_lists: tuple[str, ...]
    untrained_classes: int
    official: bool
    published_order: bool


@dataclass(frozen=True, eq=False)
class AveData:
    """Annotations and splits.

    Attributes
    ----------
    root
        Their folder.
    classes
        Names of the event classes, in the order of their numbers.
    video_ids
        YouTube id of each row.
    labels
        Shape (rows, 10): class of each second, from 0; `background` outside the event.
    splits
        Row numbers of ``train``, ``validation`` and ``test``, ascending; no row is in two of them.
    facts
        What is missing, repeated or leaking.
    """

    root: Path
    classes: tuple[str, ...]
    video_ids: tuple[str, ...]
    labels: NDArray[np.int64]
    splits: Mapping[str, NDArray[np.int64]]
    facts: AveFacts

    @property
    def background(self) -> int:
        """Label of seconds without an event: 28 in the whole set."""
        return len(self.classes)


def read_ave(
    root: Path,
    *,
    allow_partial: bool = False,
    drop_leaks: bool = False,
    available: Collection[str] | None = None,
) -> AveData:
    """The annotations and splits in a folder.

    Parameters
    ----------
    root
        Folder of ``Annotations.txt`` and the lists. If both kinds of lists are complete, the text files are read.
    allow_partial
        Whether lists, annotations of listed rows, list entries of annotated rows, or videos may be missing. `AveFacts`
        then states how many.
    drop_leaks
        Whether to drop training rows whose video is also in validation or test.
    available
        Ids of the videos (or features) at hand; others leave the splits. None: all.

    Raises
    ------
    AveError
        A file is missing or malformed, a row is listed twice, or something is missing and ``allow_partial`` is not set.
    """
    path = root / _ANNOTATIONS
    intervals = [interval for _, interval in _read_lines(path)]
    if not intervals:
        raise AveError(f"AVE annotations {path}: must hold at least one line, got none")
    classes = tuple(dict.fromkeys(interval.event for interval in intervals))
    ids = [interval.video_id for interval in intervals]
    listed, unknown, missing_lists = _read_splits(root, intervals)
    unlisted = len(intervals) - sum(len(rows) for rows in listed.values())
    if not allow_partial:
        _require_whole(root, unlisted, unknown, missing_lists)
    leaks = {
        side: sum(ids[row] in {ids[i] for i in listed["train"]} for row in listed[side])
        for side in SPLITS
        if side != "train"
    }
    kept, unavailable = _only_available(root, listed, ids, available, allow_partial)
    dropped = 0
    if drop_leaks:
        held_out = {ids[row] for side in ("validation", "test") for row in kept[side]}
        remaining = [row for row in kept["train"] if ids[row] not in held_out]
        dropped = len(kept["train"]) - len(remaining)
        kept["train"] = remaining
    labels = _labels(intervals, classes)
    facts = AveFacts(
        rows=len(intervals),
        repeated_rows=len(ids) - len(set(ids)),
        leaks=leaks,
        dropped_rows=dropped,
        unlisted_rows=unlisted,
        unknown_rows=len(unknown),
        unavailable_rows=unavailable,
        missing_lists=missing_lists,
        untrained_classes=len(classes) - len({intervals[row].event for row in kept["train"]}),
        official=(
            {side: len(rows) for side, rows in listed.items()} == _PUBLISHED_ROWS
            and len(classes) == _PUBLISHED_CLASSES
            and unlisted == unavailable == len(unknown) == 0
        ),
        published_order=_digest(intervals) == _PUBLISHED_ANNOTATIONS,
    )
    splits = {side: np.asarray(sorted(rows), np.int64) for side, rows in kept.items()}
    return AveData(root, classes, tuple(ids), labels, splits, facts)


def _read_lines(path: Path) -> list[tuple[int, _Interval]]:
    """The intervals of a file with their line numbers from 1; a header and empty lines are skipped."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise AveError(f"AVE annotations {path}: must be a readable text file, got {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise AveError(f"AVE annotations {path}: must be UTF-8 text, got another encoding") from error
    found = []
    for number, line in enumerate(lines, start=1):
        # Only & separates: class names contain commas, spaces and brackets.
        fields = [field.strip() for field in line.split("&")]
        if fields == [""] or (number == 1 and _is_header(fields)):
            continue
        found.append((number, _interval(f"AVE annotations {path}, line {number}", fields)))
    return found


def _is_header(fields: Sequence[str]) -> bool:
    return len(fields) == 5 and fields[3].lower().startswith("start") and fields[4].lower().startswith("end")


def _interval(place: str, fields: Sequence[str]) -> _Interval:
    if len(fields) != 5 or not fields[0] or not fields[1]:
        raise AveError(f"{place}: must be class&id&quality&start&end, got {'&'.join(fields)!r}")
    event, video_id, _, *times = fields
    if not all(time.isascii() and time.isdigit() for time in times):
        raise AveError(f"{place}: start and end must be whole seconds, got {times[0]!r} and {times[1]!r}")
    start, end = map(int, times)
    if not start < SECONDS:
        raise AveError(f"{place}: start must be in [0, {SECONDS}), got {start}")
    # Equal: no event second. The published set has one such row, 0&0 of a church bell.
    if not start <= end <= SECONDS:
        raise AveError(f"{place}: end must be in [start, {SECONDS}] = [{start}, {SECONDS}], got {end}")
    return _Interval(event, video_id, start, end)


def _read_splits(root: Path, intervals: Sequence[_Interval]) -> tuple[dict[str, list[int]], list[str], tuple[str, ...]]:
    """Rows of the splits, descriptions of listed rows that are not annotated, and splits without a list."""
    texts, orders = (
        {side: root / name for side, name in names.items() if (root / name).is_file()} for names in (_LISTS, _ORDERS)
    )
    chosen = texts if len(texts) >= len(orders) else orders
    if not chosen:
        raise AveError(
            f"AVE folder {root}: must hold lists of the splits, {', '.join(_LISTS.values())} or "
            f"{', '.join(_ORDERS.values())}, got none of them"
        )
    rows_of: dict[_Interval, list[int]] = defaultdict(list)
    for row, interval in reversed(list(enumerate(intervals))):
        rows_of[interval].append(row)
    found: dict[str, list[int]] = {side: [] for side in SPLITS}
    unknown: list[str] = []
    for side, path in chosen.items():
        if chosen is orders:
            numbers = read_order(path)
            found[side] = [row for row in numbers if row < len(intervals)]
            unknown += [f"row {row} of {path.name}" for row in numbers if row >= len(intervals)]
            continue
        for number, interval in _read_lines(path):
            if interval not in rows_of:
                unknown.append(f"line {number} of {path.name}")
            elif not rows_of[interval]:
                raise AveError(f"AVE list {path}, line {number}: every row must be listed once, got it again")
            else:
                found[side].append(rows_of[interval].pop())
    repeated = [row for row, count in Counter(row for rows in found.values() for row in rows).items() if count > 1]
    if repeated:
        names = ", ".join(path.name for path in chosen.values())
        raise AveError(f"AVE lists of {root}: every row must be listed once, got row {repeated[0]} again in {names}")
    return found, unknown, tuple(side for side in SPLITS if side not in chosen)


def _require_whole(root: Path, unlisted: int, unknown: Sequence[str], missing_lists: Sequence[str]) -> None:
    way_out = "allow_partial lets what is there be used, and states what is not"
    if missing_lists:
        raise AveError(f"AVE folder {root}: must hold lists of all splits, got none of {missing_lists[0]}; {way_out}")
    if unknown:
        raise AveError(
            f"AVE folder {root}: every listed row must be annotated, got {len(unknown)} that are not, the first in "
            f"{unknown[0]}; {way_out}"
        )
    if unlisted:
        raise AveError(f"AVE folder {root}: every annotated row must be listed, got {unlisted} that are not; {way_out}")


def _only_available(
    root: Path,
    listed: Mapping[str, Sequence[int]],
    ids: Sequence[str],
    available: Collection[str] | None,
    allow_partial: bool,
) -> tuple[dict[str, list[int]], int]:
    """The rows whose videos are at hand, and how many are not."""
    at_hand = set(ids if available is None else available)
    kept = {side: [row for row in rows if ids[row] in at_hand] for side, rows in listed.items()}
    missing = [row for rows in listed.values() for row in rows if ids[row] not in at_hand]
    if missing and not allow_partial:
        raise AveError(
            f"AVE folder {root}: the videos of all listed rows must be available, got {len(missing)} rows without, the "
            f"first is {ids[missing[0]]}; allow_partial leaves them out, and states how many"
        )
    return kept, len(missing)


def _labels(intervals: Sequence[_Interval], classes: Sequence[str]) -> NDArray[np.int64]:
    number_of = {name: number for number, name in enumerate(classes)}
    labels = np.full((len(intervals), SECONDS), len(classes), np.int64)
    for row, interval in enumerate(intervals):
        labels[row, interval.start : interval.end] = number_of[interval.event]
    return labels


def _digest(intervals: Sequence[_Interval]) -> str:
    lines = "\n".join("&".join(map(str, interval)) for interval in intervals)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
