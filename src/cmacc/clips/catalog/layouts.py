"""Public data sets on disk: their official lists, and common naming and folder conventions of copies.

Each function reads the official lists of a data set and finds their files anywhere under the folder, in class folders
or flat, with any file extension, since most copies have been converted. Files that a list does not name are not part of
the protocol; they are skipped and counted. Nothing is downloaded and no media file is opened.

For lists of YouTube segments, the file name determines whether a file is the whole video, to which the times of the
list apply, or the cut segment, which needs no times:

    whole video   |-------------[========]---------|   {id}.mp4               start_seconds, end_seconds of the list
    cut segment                 [========]             {id}_000030_000040.mp4  0, None
"""

import csv as csv_reader
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from cmacc.clips.catalog.listing import (
    AUDIO_SUFFIXES,
    FoundFile,
    ListedFile,
    Listing,
    ListingError,
    by_ending,
    find_media,
    normal,
    open_text,
    place_within,
    require_media,
)

# An id has exactly 11 characters, which may include the separators '-' and '_', so it is matched by length. Some tools
# add a prefix 'Y', because an id such as "-0RWZT-miFs" would be parsed as a command-line option.
_SEGMENT_NAME = re.compile(r"Y?([A-Za-z0-9_-]{11})(?:_(\d+(?:\.\d+)?))?(?:_(\d+(?:\.\d+)?))?", re.ASCII)
_YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}", re.ASCII)
_KINETICS_SPLITS = {"train": "train", "val": "val", "validate": "val", "validation": "val", "test": "test"}
_HMDB51_SPLITS = {"1": "train", "2": "test", "0": "unused"}
_VGGSOUND_SECONDS = 10.0


def list_kinetics(root: Path | str, csv: Path | str, *, ids_are_cut: bool = False) -> Listing:
    """List Kinetics-400, -600 or -700 from one of the official CSV files.

    Files are named ``{id}_{start:06d}_{end:06d}`` (cut segment; as in the official download scripts, and in the class
    folders that torchvision's `Kinetics` reads) or ``{id}`` (whole video). The split ``validate`` of later releases
    becomes ``val``. The group is the video id.

    Parameters
    ----------
    root
        Folder of the files.
    csv
        Columns youtube_id, time_start, time_end in seconds; optionally label and split. Other columns are ignored.
    ids_are_cut
        Whether a file named by the id only is the cut segment, not the whole video.

    Raises
    ------
    ListingError
        The folder has no media file; the CSV is missing, lacks a column or has an invalid row; a file name matches two
        segments of its video.
    """
    owner = "list_kinetics"

    def rows() -> Iterator[_Row]:
        for where, cells in _csv_rows(owner, Path(csv), ("youtube_id", "time_start", "time_end")):
            youtube_id = _youtube_id(cells["youtube_id"], "youtube_id", where)
            start, end = _segment(cells["time_start"], cells["time_end"], ("time_start", "time_end"), where)
            split = cells.get("split") or None
            if split is not None and split not in _KINETICS_SPLITS:
                raise ListingError(f"{where}: split must be one of {', '.join(_KINETICS_SPLITS)}, got {split!r}")
            split = _KINETICS_SPLITS[split] if split else None
            yield _Row(youtube_id, youtube_id, cells.get("label") or None, split, youtube_id, where, start, end)

    return _list_segments(owner, root, rows(), ids_are_cut)


def list_audioset(
    root: Path | str, csv: Path | str, indices: Path | str | None = None, *, ids_are_cut: bool = False
) -> Listing:
    """List AudioSet from one of the segment lists, such as ``balanced_train_segments.csv``.

    A segment has several labels; they are joined by ``";"``, since display names contain commas. Files are named
    ``{id}`` (whole video), ``{id}_{start}`` or ``{id}_{start}_{end}``, with times in milliseconds or seconds
    (``--PJHxphWEs_30.000_40.000.flac``), each optionally with the prefix ``Y``. The list does not state its split, so
    ``split`` is None. The group is the video id.

    Parameters
    ----------
    root
        Folder of the files.
    csv
        A list from the page "AudioSet: Download": comments that begin with ``#``, then
        ``YTID, start_seconds, end_seconds, "mid,mid"``.
    indices
        ``class_labels_indices.csv`` from the same page (index, mid, display_name); without it, labels are the mids.
    ids_are_cut
        Whether a file named by the id only is the cut segment, not the whole video. In some collections the files
        ``Y{id}.wav`` are cut; the name does not show it.

    Raises
    ------
    ListingError
        The folder has no media file; a list is missing, lacks a column or has an invalid row.
    """
    owner = "list_audioset"
    names: dict[str, str] | None = None
    if indices is not None:
        lines = _csv_rows(owner, Path(indices), ("mid", "display_name"))
        names = {cells["mid"]: cells["display_name"] for _, cells in lines}

    def rows() -> Iterator[_Row]:
        columns = ("YTID", "start_seconds", "end_seconds", "positive_labels")
        for where, cells in _csv_rows(owner, Path(csv), columns, has_header=False):
            youtube_id = _youtube_id(cells["YTID"], "YTID", where)
            start, end = _segment(cells["start_seconds"], cells["end_seconds"], columns[1:3], where)
            labels = [label.strip() for label in cells["positive_labels"].split(",") if label.strip()]
            if names is not None:
                for label in labels:
                    if label not in names:
                        raise ListingError(f"{where}: positive_labels must be in {indices}, got {label!r}")
                labels = [names[label] for label in labels]
            yield _Row(youtube_id, youtube_id, ";".join(labels) or None, None, youtube_id, where, start, end)

    return _list_segments(owner, root, rows(), ids_are_cut)


def list_vggsound(root: Path | str, csv: Path | str, *, ids_are_cut: bool = False) -> Listing:
    """List VGGSound from ``vggsound.csv``.

    Every segment lasts 10 s. Files are named ``{id}_{start:06d}``, ``{id}_{start}``, ``{id}_{start ms}_{end ms}``
    (cut segment) or ``{id}`` (whole video). The group is the video id.

    Parameters
    ----------
    root
        Folder of the files.
    csv
        CSV file without a header, as described on the page "VGGSound: A Large-scale Audio-Visual Dataset": YouTube id,
        start seconds, label, train/test.
    ids_are_cut
        Whether a file named by the id only is the cut segment, not the whole video.

    Raises
    ------
    ListingError
        The folder has no media file; the CSV is missing or has an invalid row.
    """
    owner = "list_vggsound"

    def rows() -> Iterator[_Row]:
        columns = ("youtube_id", "start_seconds", "label", "split")
        for where, cells in _csv_rows(owner, Path(csv), columns, has_header=False):
            youtube_id = _youtube_id(cells["youtube_id"], "youtube_id", where)
            start = _seconds(cells["start_seconds"], "start_seconds", where)
            if cells["split"] not in ("train", "test"):
                raise ListingError(f"{where}: split must be train or test, got {cells['split']!r}")
            end = start + _VGGSOUND_SECONDS
            yield _Row(youtube_id, youtube_id, cells["label"], cells["split"], youtube_id, where, start, end)

    return _list_segments(owner, root, rows(), ids_are_cut)


def list_ucf101(root: Path | str, lists: Path | str, split: int) -> Listing:
    """List UCF101 with one of the three official splits for action recognition.

    Files are matched by name without extension (``v_BabyCrawling_g01_c01``). Each of the 25 groups of a class was cut
    from one film, so ``group`` is class and group, ``BabyCrawling_g01``.

    Parameters
    ----------
    root
        Folder of the files; officially ``UCF-101/ClassName/v_ClassName_g01_c01.avi``.
    lists
        Folder ``ucfTrainTestlist``: ``classInd.txt``, ``trainlist0N.txt`` ("Class/v_x.avi index"), ``testlist0N.txt``
        ("Class/v_x.avi").
    split
        1, 2 or 3.

    Raises
    ------
    ListingError
        The split is unknown; the folder has no media file; a list is missing or has an invalid row.
    """
    owner = "list_ucf101"
    _require_choice(owner, "split", split, (1, 2, 3))

    def rows() -> Iterator[_Row]:
        index_of = {}
        for where, line in _text_lines(owner, Path(lists) / "classInd.txt"):
            index, _, class_name = line.partition(" ")
            if not class_name:
                raise ListingError(f"{where}: must be an index and a class, got {line!r}")
            index_of[class_name.strip()] = index
        for part in ("train", "test"):
            for where, line in _text_lines(owner, Path(lists) / f"{part}list0{split}.txt"):
                name, *index_given = line.split()
                folder, _, file_name = name.rpartition("/")
                class_name = folder.rpartition("/")[2]
                if class_name not in index_of:
                    raise ListingError(f"{where}: must be Class/name with a class of classInd.txt, got {name!r}")
                if index_given not in ([], [index_of[class_name]]):
                    raise ListingError(
                        f"{where}: index of {class_name} must be {index_of[class_name]} as in classInd.txt, "
                        f"got {' '.join(index_given)!r}"
                    )
                stem = os.path.splitext(file_name)[0]
                group = re.search(r"_(g\d+)_c\d+$", stem)
                if group is None:
                    raise ListingError(f"{where}: name must end in _gNN_cNN, got {name!r}")
                yield _Row(stem, name, class_name, part, f"{class_name}_{group[1]}", where)

    return _list_by_stem(owner, root, rows())


def list_hmdb51(root: Path | str, lists: Path | str, split: int) -> Listing:
    """List HMDB51 with one of the three official splits, with 70 train and 30 test clips per class.

    Files are matched by name without extension. Clips that a split does not use have the split ``unused``. The lists do
    not state which clips come from one film, so ``group`` is None.

    Parameters
    ----------
    root
        Folder of the files; officially ``class/name.avi``.
    lists
        Folder ``testTrainMulti_7030_splits``: ``{class}_test_split{N}.txt`` with lines "name.avi 1" (1 train, 2 test,
        0 unused).
    split
        1, 2 or 3.

    Raises
    ------
    ListingError
        The split is unknown; the folder has no media file; the lists are missing or have an invalid row.
    """
    owner = "list_hmdb51"
    _require_choice(owner, "split", split, (1, 2, 3))

    def rows() -> Iterator[_Row]:
        ending = f"_test_split{split}.txt"
        found = sorted(path for path in Path(lists).glob(f"*{ending}") if not path.name.startswith("."))
        if not found:
            raise ListingError(f"{owner}: *{ending} must be in {lists}, got nothing there")
        for path in found:
            class_name = path.name.removesuffix(ending)
            for where, line in _text_lines(owner, path):
                name, *code = line.rsplit(maxsplit=1)
                if len(code) != 1 or code[0] not in _HMDB51_SPLITS:
                    raise ListingError(f"{where}: must be a name and 0, 1 or 2, got {line!r}")
                yield _Row(os.path.splitext(name)[0], name, class_name, _HMDB51_SPLITS[code[0]], None, where)

    return _list_by_stem(owner, root, rows())


def list_esc50(root: Path | str, meta_csv: Path | str, fold: int, only_esc10: bool = False) -> Listing:
    """List ESC-50, or its subset ESC-10, with one of the five official folds held out.

    Files are matched by name without extension. The group is the recording that a clip was cut from, ``src_file``. The
    official folds keep recordings together except for four, whose clips of two classes are in two folds (131943 and
    134049 in 2 and 3, 209698 and 234879 in 4 and 5). ESC-10 has no exceptions.

    Parameters
    ----------
    root
        Folder of the files; officially ``audio/1-100032-A-0.wav``.
    meta_csv
        ``meta/esc50.csv``: filename, fold, target, category, esc10, src_file, take.
    fold
        1 to 5: the fold with split ``test``; the others have split ``train``.
    only_esc10
        Whether to skip the other 40 classes; their files then count as unmatched.

    Raises
    ------
    ListingError
        The fold is unknown; the folder has no media file; the CSV is missing, lacks a column or has an invalid row.
    """
    owner = "list_esc50"
    _require_choice(owner, "fold", fold, (1, 2, 3, 4, 5))

    def rows() -> Iterator[_Row]:
        columns = ("filename", "fold", "category", "esc10", "src_file")
        for where, cells in _csv_rows(owner, Path(meta_csv), columns):
            if cells["fold"] not in ("1", "2", "3", "4", "5"):
                raise ListingError(f"{where}: fold must be 1 to 5, got {cells['fold']!r}")
            if cells["esc10"] not in ("True", "False"):
                raise ListingError(f"{where}: esc10 must be True or False, got {cells['esc10']!r}")
            if only_esc10 and cells["esc10"] == "False":
                continue
            name = cells["filename"]
            part = "test" if cells["fold"] == str(fold) else "train"
            yield _Row(os.path.splitext(name)[0], name, cells["category"], part, cells["src_file"], where)

    return _list_by_stem(owner, root, rows())


class _Row(NamedTuple):
    """A row of an official list."""

    key: str
    """The part of the file name that identifies the row: its stem or id."""
    name: str
    """Name in the list."""
    label: str | None
    split: str | None
    group: str | None
    where: str
    start_seconds: float = 0.0
    end_seconds: float | None = None


class _Fit(NamedTuple):
    """How well a file name matches a row (lower is better), and whether the file is the whole video."""

    rank: int
    is_whole: bool


def _list_by_stem(owner: str, root: Path | str, rows: Iterable[_Row]) -> Listing:
    def fit(row: _Row, file: FoundFile) -> _Fit:
        return _Fit(rank=int(not row.name.endswith(file.name)), is_whole=False)

    return _match(owner, root, rows, key_of=lambda stem: stem, fit=fit)


def _list_segments(owner: str, root: Path | str, rows: Iterable[_Row], ids_are_cut: bool) -> Listing:
    def key_of(stem: str) -> str | None:
        match = _SEGMENT_NAME.fullmatch(stem)
        return match[1] if match else None

    def fit(row: _Row, file: FoundFile) -> _Fit | None:
        match = _SEGMENT_NAME.fullmatch(os.path.splitext(file.name)[0])
        times = [time for time in match.groups()[1:] if time] if match else []
        if not times:
            return _Fit(rank=1, is_whole=not ids_are_cut)
        return _Fit(rank=0, is_whole=False) if _times_agree(times, row) else None

    return _match(owner, root, rows, key_of, fit)


def _times_agree(times: list[str], row: _Row) -> bool:
    """Whether the times in a name match the row, all in seconds or all in milliseconds.

    Integers may have been rounded up or down. In the wrong unit, no time except 0 matches: 30000 for 30 s would be
    longer than any video.
    """
    for scale in (1, 1000):
        pairs = zip(times, (row.start_seconds, row.end_seconds or 0.0), strict=False)
        if all(abs(float(time) - seconds * scale) < (0.001 if "." in time else 1.0) for time, seconds in pairs):
            return True
    return False


def _match(
    owner: str,
    root: Path | str,
    rows: Iterable[_Row],
    key_of: Callable[[str], str | None],
    fit: Callable[[_Row, FoundFile], _Fit | None],
) -> Listing:
    """Find the file of each row of a list.

    Files are indexed by key and rows are processed one at a time, since the longest list, AudioSet's, has two million.

    Parameters
    ----------
    key_of
        Function from the stem of a file to the key of its rows, or None if the name cannot belong to this data set.
    fit
        How well a file with the key of a row matches it, or None for no match.
    """
    media = find_media(owner, root)
    require_media(owner, [media])
    by_key: dict[str, list[FoundFile]] = {}
    # Among several matches, prefer a file to a link to it, and a video to the audio extracted from it.
    for file in sorted(media.files, key=lambda f: (f.is_link, os.path.splitext(f.name)[1].lower() in AUDIO_SUFFIXES)):
        key = key_of(normal(os.path.splitext(file.name)[0]))
        if key is not None:
            by_key.setdefault(key, []).append(file)

    taken: dict[tuple[str, float, float | None], _Row] = {}
    files: list[ListedFile] = []
    missing: list[_Row] = []
    skipped = list(media.skipped)
    listed_count = 0
    for row in rows:
        listed_count += 1
        if "/" in row.name and place_within(row.name, [media.real_root]) is None:
            skipped.append((Path(row.name), f"leaves {root}; so {row.where}"))
            continue
        best: tuple[int, FoundFile, tuple[str, float, float | None]] | None = None
        contested: tuple[str, _Row] | None = None
        for file in by_key.get(normal(row.key), ()):
            fitting = fit(row, file)
            if fitting is None or (best is not None and best[0] <= fitting.rank):
                continue
            segment = (row.start_seconds, row.end_seconds) if fitting.is_whole else (0.0, None)
            other = taken.get((file.real, *segment))
            if other is None or _same_sample(other, row):
                best = (fitting.rank, file, (file.real, *segment))
            elif other.key == row.key:
                contested = (file.name, other)
        if best is None and contested is not None:
            raise ListingError(
                f"{row.where}: {contested[0]} must tell by its name which segment it is, "
                f"got one that may also be that of {_short(contested[1].where)}"
            )
        if best is None:
            missing.append(row)
            continue
        _, file, place = best
        if other := taken.get(place):
            if (other.label, other.split, other.group) != (row.label, row.split, row.group):
                raise ListingError(
                    f"{row.where}: {row.name} must have label and split of {_short(other.where)}, "
                    f"{other.label!r} and {other.split!r}, got {row.label!r} and {row.split!r}"
                )
            listed_count -= 1  # a repeated row
            continue
        taken[place] = row
        files.append(ListedFile(media.path(file), media.root, row.label, row.split, row.group, *place[1:]))
    files.sort(key=lambda file: (str(file.path).split("/"), file.start_seconds))
    used = {real for real, _, _ in taken}
    return Listing(
        files=tuple(files),
        missing=tuple(row.name for row in missing),
        unmatched_count=len({file.real for file in media.files} - used),
        listed_count=listed_count,
        skipped=tuple(skipped),
        missing_splits=tuple(row.split for row in missing),
        other_endings=by_ending([media]),
    )


def _same_sample(one: _Row, other: _Row) -> bool:
    return (one.key, one.start_seconds, one.end_seconds) == (other.key, other.start_seconds, other.end_seconds)


def _short(where: str) -> str:
    return where.partition(": ")[2]  # without the owner, which the message starts with


def _require_choice(owner: str, what: str, value: int, choices: tuple[int, ...]) -> None:
    if value not in choices:
        raise ListingError(f"{owner}: {what} must be one of {', '.join(map(str, choices))}, got {value}")


def _require_list(owner: str, path: Path) -> None:
    if not path.is_file():
        got = "a folder" if path.is_dir() else "nothing there"
        raise ListingError(f"{owner}: {path.name} must be in {path.parent}, got {got}")


def _text_lines(owner: str, path: Path) -> Iterator[tuple[str, str]]:
    """``("owner: file, line 3", line)``, stripped of white space; empty lines are skipped."""
    _require_list(owner, path)
    with open_text(f"{owner}: {path}", path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{owner}: {path.name}, line {number}", line.strip()


def _csv_rows(
    owner: str, path: Path, columns: tuple[str, ...], has_header: bool = True
) -> Iterator[tuple[str, dict[str, str]]]:
    """``("owner: file, line 3", cells by column)``; without a header, ``columns`` name the cells, in order."""
    _require_list(owner, path)
    with open_text(f"{owner}: {path}", path) as file:
        # Otherwise spaces after commas would be part of a value and hide its quotes.
        reader = csv_reader.reader(file, skipinitialspace=True)
        names: list[str] = []
        if has_header:
            names = [name.strip() for name in next(reader, [])]
            for column in columns:
                if column not in names:
                    raise ListingError(f"{owner}: {path.name} must have the column {column}, got {', '.join(names)}")
        for cells in reader:
            if not cells or (not has_header and cells[0].startswith("#")):
                continue
            where = f"{owner}: {path.name}, line {reader.line_num}"
            if len(cells) != len(names or columns):
                raise ListingError(f"{where}: must have {len(names or columns)} cells, got {len(cells)}")
            yield where, dict(zip(names or columns, map(str.strip, cells), strict=True))


def _youtube_id(text: str, column: str, where: str) -> str:
    if not _YOUTUBE_ID.fullmatch(text):
        raise ListingError(f"{where}: {column} must be 11 letters, digits, '-' or '_', got {text!r}")
    return text


def _seconds(text: str, column: str, where: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ListingError(f"{where}: {column} must be seconds >= 0, got {text!r}")
    return seconds


def _segment(start: str, end: str, columns: tuple[str, ...], where: str) -> tuple[float, float]:
    segment = (_seconds(start, columns[0], where), _seconds(end, columns[1], where))
    if segment[0] >= segment[1]:
        raise ListingError(f"{where}: {columns[1]} must be greater than {columns[0]} {start}, got {end}")
    return segment
