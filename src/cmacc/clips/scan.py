"""From folders to a manifest: find media files, probe each, and read labels from class folders or a CSV."""

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cmacc.clips.container import MediaError
from cmacc.clips.manifest import Manifest, MediaRecord, assign_split
from cmacc.clips.media import MediaInfo, probe

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".ogv", ".3gp")
)
AUDIO_SUFFIXES = frozenset((".wav", ".ogg", ".oga", ".flac", ".mp3", ".m4a", ".opus"))
_PATH_COLUMNS = ("path", "file", "filename", "video")


class ScanError(ValueError):
    """A scan that cannot be done as asked: no files, or a label table that does not fit."""


@dataclass(frozen=True)
class LabelTable:
    """A CSV of facts about files: which columns say what.

    ``path_column`` None means the first of path, file, filename, video that the CSV has.
    """

    csv_path: Path
    label_column: str | None = "label"
    split_column: str | None = None
    group_column: str | None = None
    path_column: str | None = None


@dataclass(frozen=True)
class ScanResult:
    """The manifest of the files that can be read, and ``{path: reason}`` of those that cannot."""

    manifest: Manifest
    bad_files: dict[Path, str]
    unmatched_count: int
    """Files that the label table does not name (0 without a table)."""


def scan(
    folders: Sequence[Path | str],
    *,
    labels: LabelTable | None = None,
    test_fraction: float = 0.0,
    seed: int = 0,
    workers: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> ScanResult:
    """Find and probe every media file under ``folders``.

    Without a table a file's label is the first folder beneath the scanned one, provided that there are at least two
    such class folders. With ``test_fraction`` > 0 files that no table puts in a split are shared out between ``train``
    and ``test``, those of one group together.

    Parameters
    ----------
    folders
        Folders, searched recursively in sorted order.
    labels
        Table of labels and splits; rows are matched by path beneath the folder, else by file name alone.
    test_fraction
        Share of files (of groups) that become ``test``.
    seed
        Of the split.
    workers
        Threads; FFmpeg works outside Python's lock.
    progress
        Called with (done, total).

    Raises
    ------
    ScanError
        A folder is missing or holds no media file; the table lacks a column.
    """
    # A file that two of the folders hold counts once: twice in a batch, it would be its own negative.
    folder_of: dict[Path, Path] = {}
    for folder in folders:
        for path in _media_files(Path(folder)):
            folder_of.setdefault(path.absolute(), Path(folder).absolute())
    found = [(folder, path) for path, folder in folder_of.items()]
    if not found:
        raise ScanError(f"scan: no media file under {', '.join(map(str, folders))}")
    rows = _read_table(labels) if labels else {}
    by_name = _unique_names(rows, [path for _, path in found])
    infos = _probe_all([path for _, path in found], workers, progress)
    class_of = _class_folders(found)

    records: list[MediaRecord] = []
    groups: list[str] = []
    bad_files: dict[Path, str] = {}
    unmatched_count = 0
    for folder, path in found:
        info = infos[path]
        if isinstance(info, str):
            bad_files[path] = info
            continue
        relative = path.relative_to(folder).as_posix()
        row = rows.get(relative) or by_name.get(path.name)
        unmatched_count += labels is not None and row is None
        label, split, group = row or (None, None, None)
        groups.append(group or relative)
        records.append(
            MediaRecord(
                path=path,
                label=label if labels and labels.label_column else class_of.get(path),
                split=split,
                **vars(info),
            )
        )
    if test_fraction > 0:
        drawn = assign_split(groups, test_fraction, seed)
        records = [
            r if r.split else MediaRecord(**{**vars(r), "split": s}) for r, s in zip(records, drawn, strict=True)
        ]
    return ScanResult(Manifest(tuple(records)), bad_files, unmatched_count)


def _media_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ScanError(f"scan: {folder} must be a folder, got {'a file' if folder.exists() else 'nothing there'}")
    suffixes = VIDEO_SUFFIXES | AUDIO_SUFFIXES
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes and p.is_file())


def _class_folders(found: Iterable[tuple[Path, Path]]) -> dict[Path, str]:
    names = {
        path: path.relative_to(folder).parts[0] for folder, path in found if len(path.relative_to(folder).parts) > 1
    }
    return names if len(set(names.values())) > 1 else {}


def _probe_all(
    paths: Sequence[Path], workers: int, progress: Callable[[int, int], None] | None
) -> dict[Path, MediaInfo | str]:
    def facts(path: Path) -> MediaInfo | str:
        try:
            return probe(path)
        except MediaError as error:
            return str(error)

    infos: dict[Path, MediaInfo | str] = {}
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for path, info in zip(paths, pool.map(facts, paths), strict=True):
            infos[path] = info
            if progress is not None:
                progress(len(infos), len(paths))
    return infos


_Row = tuple[str | None, str | None, str | None]


def _read_table(table: LabelTable) -> dict[str, _Row]:
    """``{path in the table: (label, split, group)}``."""
    if not table.csv_path.is_file():
        raise ScanError(f"label table {table.csv_path}: no such file")
    try:
        with table.csv_path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            lines = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ScanError(f"label table {table.csv_path}: cannot be read ({error})") from error
    path_column = table.path_column or next((c for c in _PATH_COLUMNS if c in columns), "path")
    for name in (path_column, table.label_column, table.split_column, table.group_column):
        if name is not None and name not in columns:
            raise ScanError(f"label table {table.csv_path}: no column {name!r}; it has {', '.join(columns)}")

    def cell(line: dict[str, str], column: str | None) -> str | None:
        return (line[column] or None) if column is not None else None

    return {
        line[path_column]: (
            cell(line, table.label_column),
            cell(line, table.split_column),
            cell(line, table.group_column),
        )
        for line in lines
        if line[path_column]
    }


def _unique_names(rows: dict[str, _Row], files: Iterable[Path]) -> dict[str, _Row]:
    """File name -> row, for names that both table and files hold once: two files must not share a label by chance."""
    in_table = Counter(Path(path).name for path in rows)
    in_files = Counter(path.name for path in files)
    names = ((Path(path).name, row) for path, row in rows.items())
    return {name: row for name, row in names if in_table[name] == 1 and in_files[name] == 1}
