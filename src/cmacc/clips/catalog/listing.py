"""List media files from folders and a table of labels, without opening them.

This stage precedes `probe`: it reads folders and tables, but no media files, and downloads nothing. All listed files
are in the given folders. Paths and links that lead out of them are skipped and reported, so that a table from elsewhere
cannot point a scan at other files of the machine. For public data sets, see `cmacc.clips.catalog.layouts`.
"""

import csv
import json
import os
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

VIDEO_SUFFIXES = frozenset(
    (
        ".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".m2t", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4",
        ".mpe", ".mpeg", ".mpg", ".mts", ".mxf", ".ogm", ".ogv", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv",
    )
)  # fmt: skip
AUDIO_SUFFIXES = frozenset(
    (
        ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".amr", ".ape", ".au", ".caf", ".eac3", ".flac", ".m4a", ".m4b",
        ".mka", ".mp2", ".mp3", ".oga", ".ogg", ".opus", ".spx", ".tta", ".wav", ".weba", ".wma", ".wv",
    )
)  # fmt: skip
_MEDIA_SUFFIXES = VIDEO_SUFFIXES | AUDIO_SUFFIXES
_MOST_ENDINGS = 10  # listed; the rest is only counted
_PATH_COLUMNS = ("path", "file", "filename", "video")


class ListingError(ValueError):
    """A listing is not possible: there are no files, or a table or list is invalid."""


@dataclass(frozen=True)
class ListedFile:
    """A file, or a segment of a longer one, with its label, split and group.

    Attributes
    ----------
    path
        Absolute path of the file.
    root
        Absolute path of the folder that was searched.
    label, split, group
        None if unknown. Samples of a group (one scene, one speaker) belong in one split.
    start_seconds, end_seconds
        Half-open interval of the segment; 0 and None for the whole file.
    """

    path: Path
    root: Path
    label: str | None
    split: str | None
    group: str | None
    start_seconds: float = 0.0
    end_seconds: float | None = None


@dataclass(frozen=True)
class Listing:
    """Listed files, and mismatches with the table or official list.

    Attributes
    ----------
    files
        The files, in the order of the folders, then sorted by path and start. Files only repeat with different
        segments.
    missing
        Names of the rows of the table or official list without a file.
    unmatched_count
        Number of media files without a row, 0 without a table. `list_folders` keeps them; the functions for public data
        sets skip them, because they are not part of the protocol.
    listed_count
        Number of rows in the table or list, 0 without one.
    missing_splits
        For an official list, the split of each row in ``missing``.
    skipped
        ``(path, reason)``: links that lead out of the folder or are broken, links to folders, folders that cannot be
        read, and rows whose path leaves the folder. A row whose file is a skipped link is also in ``missing``.
    other_endings
        ``(extension, number of files)`` of files that were ignored because it is not an extension of media files, most
        frequent first; ``""`` for files without extension.
    """

    files: tuple[ListedFile, ...]
    missing: tuple[str, ...]
    unmatched_count: int
    listed_count: int
    skipped: tuple[tuple[Path, str], ...] = ()
    missing_splits: tuple[str | None, ...] = ()
    other_endings: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class LabelTable:
    """A table with labels, splits or groups of files, and the names of its columns.

    The table is a CSV file with a header; a ``.json`` file with a list of objects, or one object
    ``{path: {column: value}}``; or a ``.jsonl`` file with one object per line.

    Attributes
    ----------
    csv_path
        Path of the table, in any of these formats.
    label_column, split_column, group_column
        None if the table has no such column.
    path_column
        None selects the first of path, file, filename, video that exists.
    """

    csv_path: Path
    label_column: str | None = "label"
    split_column: str | None = None
    group_column: str | None = None
    path_column: str | None = None


def list_folders(folders: Sequence[Path | str], labels: LabelTable | None = None) -> Listing:
    """List all media files under ``folders``.

    Without a table, or if it has no label column, the label of a file is the name of the first folder below the given
    one, if there are at least two such class folders. Rows are matched to files by path relative to the folder, or by
    file name only if the name is unique in both the table and the folders. A file that is in two of the folders, or
    that a link inside them refers to, is listed once: twice in a batch, it would be its own negative.

    Parameters
    ----------
    folders
        Folders to search recursively. Links to folders are not followed, but listed in ``skipped``.
    labels
        Table of labels, splits and groups.

    Raises
    ------
    ListingError
        A folder is missing, there are no media files, or the table is missing, cannot be read, lacks a column or has
        conflicting rows for one path.
    """
    owner = "list_folders"
    searched = [find_media(owner, folder) for folder in folders]
    require_media(owner, searched)
    skipped = {path: reason for media in searched for path, reason in media.skipped}
    rows: dict[str, _Facts] = {}
    leaving: dict[Path, str] = {}
    if labels is not None:
        rows, leaving = _read_table(labels, [media.real_root for media in searched])

    by_name = _unique_names(rows, searched)
    chosen: dict[str, tuple[FoundMedia, FoundFile, _Facts | None]] = {}
    used: set[str] = set()
    for media in searched:
        for file in media.files:
            row = None
            for key in (file.relative, f"{media.real_root}/{file.relative}", by_name.get(normal(file.name), "")):
                if row := rows.get(normal(key)):
                    used.add(normal(key))
                    break
            before = chosen.get(file.real)
            # Among a file and the links to it, prefer the one that the table names, and then the file itself.
            if before is None or (row is None, file.is_link) < (before[2] is None, before[1].is_link):
                chosen[file.real] = (media, file, row)

    from_folders = labels is None or labels.label_column is None
    classes = {file.first_folder for _, file, _ in chosen.values()} - {None} if from_folders else set()
    files = []
    for media, file, row in chosen.values():
        label, split, group = row[1:] if row else (None, None, None)
        if len(classes) > 1:
            label = file.first_folder
        files.append(ListedFile(media.path(file), media.root, label, split, group))
    return Listing(
        files=tuple(files),
        missing=tuple(row.path for key, row in rows.items() if key not in used),
        unmatched_count=0 if labels is None else sum(row is None for _, _, row in chosen.values()),
        listed_count=len(rows) + len(leaving),
        skipped=tuple((skipped | leaving).items()),
        other_endings=by_ending(searched),
    )


class FoundFile(NamedTuple):
    """A media file under a folder: its ``relative`` path, with slashes, and its ``real`` path, with links resolved."""

    relative: str
    real: str
    is_link: bool

    @property
    def name(self) -> str:
        """File name with extension."""
        return self.relative.rsplit("/", 1)[-1]

    @property
    def first_folder(self) -> str | None:
        """The first folder below the searched one; None for a file directly in it."""
        return self.relative.split("/", 1)[0] if "/" in self.relative else None


class FoundMedia(NamedTuple):
    """The media files of one folder, sorted by path, and skipped entries."""

    root: Path
    real_root: str
    files: list[FoundFile]
    skipped: list[tuple[Path, str]]
    other_endings: dict[str, Counter[str]]
    """By folder, so that a folder that is searched twice counts once."""

    def path(self, file: FoundFile) -> Path:
        """Absolute path of the file."""
        return Path(os.path.join(self.root, file.relative))


def find_media(owner: str, folder: Path | str) -> FoundMedia:
    """Search a folder recursively with `os.scandir`, which needs no system call per regular file.

    Links to folders are not followed, but listed as skipped: a link to a parent folder would cause an endless search,
    and a link to another folder would list its files twice. Links to files are followed if the target is under the
    folder.

    Parameters
    ----------
    owner
        Name of the caller, for error messages.
    folder
        Folder to search; its path may contain links.

    Raises
    ------
    ListingError
        The folder does not exist.
    """
    if not os.path.isdir(folder):
        got = "a file" if os.path.exists(folder) else "nothing there"
        raise ListingError(f"{owner}: {folder} must be a folder, got {got}")
    root, real_root = Path(folder).absolute(), os.path.realpath(folder).rstrip("/")
    files: list[FoundFile] = []
    skipped: list[tuple[Path, str]] = []
    other_endings: dict[str, Counter[str]] = {}
    waiting = [""]
    while waiting:
        folder_within = waiting.pop()
        others = other_endings[f"{real_root}/{folder_within}"] = Counter()
        try:
            with os.scandir(f"{real_root}/{folder_within}") as entries:
                for entry in entries:
                    relative = folder_within + entry.name
                    if not _is_text(entry.name):  # manifests and pages cannot store such a name
                        shown = os.fsencode(f"{root}/{relative}").decode("utf-8", "backslashreplace")
                        skipped.append((Path(shown), "its name is not UTF-8"))
                        continue
                    ending = os.path.splitext(entry.name)[1].lower()
                    is_media = ending in _MEDIA_SUFFIXES
                    if entry.is_symlink():
                        real = os.path.realpath(entry.path)
                        if reason := _reason_against_link(real, real_root, is_media):
                            skipped.append((Path(f"{root}/{relative}"), reason))
                        elif is_media:
                            files.append(FoundFile(relative, real, True))
                    elif entry.is_dir(follow_symlinks=False):
                        waiting.append(f"{relative}/")
                    elif entry.is_file(follow_symlinks=False):
                        if is_media:
                            files.append(FoundFile(relative, f"{real_root}/{relative}", False))
                        else:
                            others[ending] += 1
        except OSError as error:
            skipped.append((Path(f"{root}/{folder_within}"), f"cannot be read ({error.strerror})"))
    files.sort(key=lambda file: file.relative.split("/"))
    return FoundMedia(root, real_root, files, sorted(skipped), other_endings)


def by_ending(searched: Sequence[FoundMedia]) -> tuple[tuple[str, int], ...]:
    """Compute `Listing.other_endings` for several folders."""
    by_folder = {folder: counts for media in searched for folder, counts in media.other_endings.items()}
    counts = sum(by_folder.values(), Counter[str]())
    return tuple(sorted(counts.items(), key=lambda one: (-one[1], one[0])))


def other_files(endings: Sequence[tuple[str, int]]) -> str:
    """Describe `Listing.other_endings` in words; empty if there are none.

    Examples
    --------
    >>> other_files([(".txt", 8), (".jpg", 4)])
    '12 files were not examined because of the file extension: .txt 8, .jpg 4'
    """
    if not endings:
        return ""
    total = sum(count for _, count in endings)
    named = [f"{ending or 'no extension'} {count:,}" for ending, count in endings[:_MOST_ENDINGS]]
    if len(endings) > _MOST_ENDINGS:
        named.append(f"others {sum(count for _, count in endings[_MOST_ENDINGS:]):,}")
    files = f"{total:,} files were" if total > 1 else "1 file was"
    return f"{files} not examined because of the file extension: {', '.join(named)}"


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _reason_against_link(real: str, real_root: str, is_media: bool) -> str | None:
    if os.path.isdir(real):
        return f"is a link to the folder {real}; links to folders are not followed"
    if not is_media:
        return None  # irrelevant, wherever it leads
    if not real.startswith(f"{real_root}/"):
        return f"is a link to {real}, outside {real_root}"
    return None if os.path.isfile(real) else f"is a link to {real}, where no file is"


def require_media(owner: str, searched: Sequence[FoundMedia]) -> None:
    """Raise `ListingError` if no folder has a media file; the message includes skipped entries as the likely cause."""
    if any(media.files for media in searched):
        return
    skipped = [entry for media in searched for entry in media.skipped]
    cause = f"; skipped {len(skipped)}, such as {skipped[0][0]}, which {skipped[0][1]}" if skipped else ""
    if others := other_files(by_ending(searched)):
        cause += f"; {others}"
    raise ListingError(f"{owner}: no media file under {', '.join(str(media.root) for media in searched)}{cause}")


def normal(name: str) -> str:
    """Normalise to composed Unicode (NFC): macOS returns decomposed file names, which differ from those in lists."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def place_within(path: str, real_roots: Sequence[str]) -> str | None:
    """Normalise a path from a table, keeping it relative or absolute; None if it is outside of all folders.

    Parameters
    ----------
    path
        Path relative to any of the folders, or absolute.
    real_roots
        The folders, with links resolved.
    """
    plain = posixpath.normpath(path)
    if not posixpath.isabs(plain):
        return None if plain in (".", "..") or plain.startswith("../") else normal(plain)
    # Only resolve links in the folder's path; `find_media` handles links to files.
    plain = posixpath.join(os.path.realpath(posixpath.dirname(plain)), posixpath.basename(plain))
    return normal(plain) if any(plain.startswith(f"{root}/") for root in real_roots) else None


@contextmanager
def open_text(what: str, path: Path) -> Iterator[TextIO]:
    """Open a table or list as UTF-8 text, with or without a byte order mark.

    Raises
    ------
    ListingError
        The file does not exist or is invalid; this includes errors while the caller reads it.
    """
    if not path.is_file():
        raise ListingError(f"{what}: no such file")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield file
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise ListingError(f"{what}: cannot be read ({error})") from error


class _Facts(NamedTuple):
    path: str
    label: str | None
    split: str | None
    group: str | None


_Line = tuple[str, dict[str, Any]]
"""Its location in the table, and its cells by column."""


def _read_table(table: LabelTable, real_roots: Sequence[str]) -> tuple[dict[str, _Facts], dict[Path, str]]:
    """The rows by normalised path, and the rows whose path leaves the folders."""
    what = f"label table {table.csv_path}"
    read = {".json": _json_lines, ".jsonl": _jsonl_lines}.get(table.csv_path.suffix.lower(), _csv_lines)
    with open_text(what, table.csv_path) as file:
        columns, lines = read(file, table, what)
    path_column = table.path_column or next((c for c in _PATH_COLUMNS if c in columns), "path")
    for name in (path_column, table.label_column, table.split_column, table.group_column):
        if name is not None and name not in columns:
            raise ListingError(f"{what}: no column {name!r}; it has {', '.join(columns)}")

    rows: dict[str, _Facts] = {}
    leaving: dict[Path, str] = {}
    wanted = (path_column, table.label_column, table.split_column, table.group_column)
    for place, line in lines:
        path, label, split, group = (
            _cell(line.get(column), f"{what}, {place}: {column}") if column is not None else None for column in wanted
        )
        if path is None:
            continue
        key = place_within(path, real_roots)
        if key is None:
            leaving[Path(path)] = f"leaves the scanned folders; so {what}, {place}"
            continue
        facts = _Facts(path, label, split, group)
        if (before := rows.setdefault(key, facts))[1:] != facts[1:]:
            raise ListingError(f"{what}, {place}: {path!r} must say what it said before, {before[1:]}, got {facts[1:]}")
    return rows, leaving


def _cell(value: object, what: str) -> str | None:
    if isinstance(value, list | dict):
        raise ListingError(f"{what} must be a text or a number, got {value!r}")
    return None if value is None else _trimmed(str(value)) or None


def _trimmed(text: str) -> str:
    """Strip byte order marks and white space, which spreadsheets and editors add, so that equal names compare equal."""
    return text.replace("\ufeff", "").strip()


def _csv_lines(file: TextIO, table: LabelTable, what: str) -> tuple[list[str], list[_Line]]:
    # Otherwise spaces after commas would be part of a value and hide its quotes.
    reader = csv.DictReader(file, skipinitialspace=True)
    columns = reader.fieldnames = [_trimmed(name) for name in reader.fieldnames or ()]
    return columns, [(f"line {reader.line_num}", line) for line in reader]


def _jsonl_lines(file: TextIO, table: LabelTable, what: str) -> tuple[list[str], list[_Line]]:
    texts = [(f"line {number}", text) for number, text in enumerate(file, start=1) if text.strip()]
    return _objects(((place, json.loads(text)) for place, text in texts), what)


def _json_lines(file: TextIO, table: LabelTable, what: str) -> tuple[list[str], list[_Line]]:
    content = json.load(file)
    if isinstance(content, list):
        return _objects(((f"entry {number}", entry) for number, entry in enumerate(content, start=1)), what)
    if not isinstance(content, dict):
        raise ListingError(f"{what}: must hold a list of objects or one object by path, got {str(content)[:40]!r}")
    path_column = table.path_column or "path"
    columns, lines = _objects(((f"entry {path!r}", entry) for path, entry in content.items()), what)
    named = [(place, line | {path_column: path}) for path, (place, line) in zip(content, lines, strict=True)]
    return [path_column, *(column for column in columns if column != path_column)], named


def _objects(entries: Iterable[tuple[str, object]], what: str) -> tuple[list[str], list[_Line]]:
    lines: list[_Line] = []
    columns: dict[str, None] = {}
    for place, entry in entries:
        if not isinstance(entry, dict):
            raise ListingError(f"{what}, {place}: must be an object, got {str(entry)[:40]!r}")
        lines.append((place, {_trimmed(name): value for name, value in entry.items()}))
        columns |= dict.fromkeys(lines[-1][1])
    return list(columns), lines


def _unique_names(rows: dict[str, _Facts], searched: Sequence[FoundMedia]) -> dict[str, str]:
    """Map file names to row keys, for names that are unique in both table and folders, to avoid accidental matches."""
    in_table = Counter(key.rsplit("/", 1)[-1] for key in rows)
    bearers: dict[str, set[str]] = {}
    for media in searched:
        for file in media.files:
            bearers.setdefault(normal(file.name), set()).add(file.real)
    names = ((key.rsplit("/", 1)[-1], key) for key in rows)
    return {name: key for name, key in names if in_table[name] == 1 and len(bearers.get(name, ())) == 1}
