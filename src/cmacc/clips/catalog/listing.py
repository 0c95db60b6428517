"""From folders and a table of labels to a list of files, before any of them is opened.

The stage before `probe`: it reads folders and tables, opens no media file and fetches nothing. What is listed lies in
the folders that were named: paths and links that lead out of them are skipped and named, so that a table from elsewhere
cannot point a scan at other files of the machine. Named data sets stand in `cmacc.clips.catalog.layouts`.
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
_MOST_ENDINGS = 10  # named; the rest is counted
_PATH_COLUMNS = ("path", "file", "filename", "video")


class ListingError(ValueError):
    """A listing that cannot be made as asked: no files, or a table or list that does not fit."""


@dataclass(frozen=True)
class ListedFile:
    """A file, or a segment of a longer one, and what is said of it.

    Attributes
    ----------
    path
        The file, absolute.
    root
        The folder that it was found under, absolute.
    label, split, group
        None where unknown. Samples of a group (one scene, one speaker) belong into one split.
    start_seconds, end_seconds
        The segment, half open; 0 and None for the whole file.
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
    """What was found, and what does not fit.

    Attributes
    ----------
    files
        In the order of the folders, in each sorted by path, then by start; no file twice but for different segments.
    missing
        Rows of the table or official list without a file, by the list's own name for them.
    unmatched_count
        Media files in the folder that stand for no row, 0 without a table. `list_folders` keeps them; a named data
        set skips them: they are not part of its protocol.
    listed_count
        Rows in the table or list, 0 without one.
    missing_splits
        Of an official list: the split of each of the ``missing``.
    skipped
        ``(path, reason)``: links that lead out of the folder or nowhere, links to folders, folders that cannot be
        read, and rows whose path leaves the folder. A row whose file is a skipped link is also among the ``missing``.
    other_endings
        ``(extension, number of files)`` of the files that were passed over because theirs is none of a media file's,
        the most frequent first; ``""`` for files without one.
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
    """A table of facts about files: which columns say what.

    A CSV file with a header; a ``.json`` file that holds a list of objects, or one object ``{path: {column: value}}``;
    or a ``.jsonl`` file with one object a line.

    Attributes
    ----------
    csv_path
        The table, whatever its kind.
    label_column, split_column, group_column
        None where the table does not say.
    path_column
        None means the first of path, file, filename, video that the table has.
    """

    csv_path: Path
    label_column: str | None = "label"
    split_column: str | None = None
    group_column: str | None = None
    path_column: str | None = None


def list_folders(folders: Sequence[Path | str], labels: LabelTable | None = None) -> Listing:
    """Every media file under ``folders``.

    Without a table, or with one that has no label column, a file's label is the first folder beneath the given one,
    provided that there are at least two such class folders. A row belongs to a file by its path beneath the folder,
    else by file name alone where table and folders both hold that name once. A file that two of the folders hold, or
    that a link inside them names again, counts once: twice in a batch, it would be its own negative.

    Parameters
    ----------
    folders
        Searched recursively; links to folders are not followed, and are listed in ``skipped``.
    labels
        Table of labels, splits and groups.

    Raises
    ------
    ListingError
        A folder is missing, none holds a media file, or the table is missing, cannot be read, lacks a column or says
        two things of one path.
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
            # Of a file and the links to it that which the table names stands for all, else the file itself.
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
    """A media file beneath a folder; ``relative`` with slashes, ``real`` what it is once links are resolved."""

    relative: str
    real: str
    is_link: bool

    @property
    def name(self) -> str:
        """The file's name with its ending."""
        return self.relative.rsplit("/", 1)[-1]

    @property
    def first_folder(self) -> str | None:
        """The first folder beneath the searched one, None for a file that lies in that itself."""
        return self.relative.split("/", 1)[0] if "/" in self.relative else None


class FoundMedia(NamedTuple):
    """The media files of one folder, sorted as paths sort, and what was skipped."""

    root: Path
    real_root: str
    files: list[FoundFile]
    skipped: list[tuple[Path, str]]
    other_endings: dict[str, Counter[str]]
    """By folder, so that a folder that is searched twice is counted once."""

    def path(self, file: FoundFile) -> Path:
        """The file's absolute path."""
        return Path(os.path.join(self.root, file.relative))


def find_media(owner: str, folder: Path | str) -> FoundMedia:
    """Search a folder and its folders by `os.scandir`, which needs no call to the system per regular file.

    Links to folders are not followed: that alone keeps a link to a folder above from an endless search, and a link to
    a folder beside from listing its files twice. They are listed as skipped. A link to a file is good while what it
    leads to lies beneath the folder.

    Parameters
    ----------
    owner
        Who asks, for the message.
    folder
        May itself be reached through a link.

    Raises
    ------
    ListingError
        There is no such folder.
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
                    if not _is_text(entry.name):  # which neither a manifest nor a page can hold
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
    """`Listing.other_endings` of several folders."""
    by_folder = {folder: counts for media in searched for folder, counts in media.other_endings.items()}
    counts = sum(by_folder.values(), Counter[str]())
    return tuple(sorted(counts.items(), key=lambda one: (-one[1], one[0])))


def other_files(endings: Sequence[tuple[str, int]]) -> str:
    """`Listing.other_endings` in words; empty where there are none.

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
        return None  # of no concern, wherever it leads
    if not real.startswith(f"{real_root}/"):
        return f"is a link to {real}, outside {real_root}"
    return None if os.path.isfile(real) else f"is a link to {real}, where no file is"


def require_media(owner: str, searched: Sequence[FoundMedia]) -> None:
    """Raise `ListingError` where no folder holds a media file; what was skipped is then the likely cause."""
    if any(media.files for media in searched):
        return
    skipped = [entry for media in searched for entry in media.skipped]
    cause = f"; skipped {len(skipped)}, such as {skipped[0][0]}, which {skipped[0][1]}" if skipped else ""
    if others := other_files(by_ending(searched)):
        cause += f"; {others}"
    raise ListingError(f"{owner}: no media file under {', '.join(str(media.root) for media in searched)}{cause}")


def normal(name: str) -> str:
    """The composed form of Unicode: macOS hands names out decomposed, so that they differ from those in a list."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def place_within(path: str, real_roots: Sequence[str]) -> str | None:
    """A path of a table in plain form, relative or absolute as it is; None where it leaves every one of the folders.

    Parameters
    ----------
    path
        Relative to any of the folders, or absolute.
    real_roots
        The folders without links.
    """
    plain = posixpath.normpath(path)
    if not posixpath.isabs(plain):
        return None if plain in (".", "..") or plain.startswith("../") else normal(plain)
    # The folder may be reached through a link; the file's own link is `find_media`'s matter.
    plain = posixpath.join(os.path.realpath(posixpath.dirname(plain)), posixpath.basename(plain))
    return normal(plain) if any(plain.startswith(f"{root}/") for root in real_roots) else None


@contextmanager
def open_text(what: str, path: Path) -> Iterator[TextIO]:
    """A table or list as UTF-8 text, with or without the mark that spreadsheets put before it.

    Raises
    ------
    ListingError
        There is no such file, or it is not what it should be; also for what the caller meets while reading.
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
"""Where it stands, and its cells by column."""


def _read_table(table: LabelTable, real_roots: Sequence[str]) -> tuple[dict[str, _Facts], dict[Path, str]]:
    """The rows by their plain path, and those that leave the folders."""
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
    """Without what spreadsheets and editors leave around a name, which would make two names of one."""
    return text.replace("\ufeff", "").strip()


def _csv_lines(file: TextIO, table: LabelTable, what: str) -> tuple[list[str], list[_Line]]:
    # Blanks after commas would be part of a value and hide its quotes.
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
    """File name -> the row's key, for names that table and folders both hold once: no label is shared by chance."""
    in_table = Counter(key.rsplit("/", 1)[-1] for key in rows)
    bearers: dict[str, set[str]] = {}
    for media in searched:
        for file in media.files:
            bearers.setdefault(normal(file.name), set()).add(file.real)
    names = ((key.rsplit("/", 1)[-1], key) for key in rows)
    return {name: key for name, key in names if in_table[name] == 1 and len(bearers.get(name, ())) == 1}
