"""Create a manifest from a listing: examine every file in a guarded process, find copies, and draw splits.

The result of every examination is written to a journal immediately, so that a killed scan can be resumed, and a later
scan only examines files that have changed.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cmacc.clips.catalog.examine import FINDINGS, VERSION, Examination, Finding, examine, unreadable
from cmacc.clips.catalog.fingerprint import near_duplicates
from cmacc.clips.catalog.listing import ListedFile, Listing
from cmacc.clips.catalog.manifest import Manifest, MediaRecord, assign_split
from cmacc.clips.media.decoding import MediaInfo
from cmacc.clips.media.guard import GuardDeathError, GuardError, guarded
from cmacc.clips.parallel import results_of, workers_of
from cmacc.clips.progress import Progress, silent
from cmacc.clips.storage import written_aside

EXCLUDED_BY_DEFAULT = ("unreadable", "corrupt", "too_short")
_FILES_PER_TASK = 8
_THREADS = 2


class ScanError(ValueError):
    """A scan is not possible; the message states the reason."""


@dataclass(frozen=True)
class ScanResult:
    """The result of a scan.

    Attributes
    ----------
    manifest
        The files that can be used.
    examinations
        Examinations of all files, in the order of the listing, including findings from comparisons between files.
    skipped
        ``{path: reason}`` of the files that are not in the manifest.
    listing
        The listing that was scanned.
    """

    manifest: Manifest
    examinations: dict[Path, Examination]
    skipped: dict[Path, str]
    listing: Listing


def scan(
    listing: Listing,
    *,
    exclude: Sequence[str] = EXCLUDED_BY_DEFAULT,
    min_seconds: float = 0.0,
    test_fraction: float = 0.0,
    seed: int = 0,
    executor: Executor | None = None,
    timeout_seconds: float = 60.0,
    journal: Path | None = None,
    progress: Progress = silent,
) -> ScanResult:
    """Examine every listed file and create a manifest of the usable ones.

    Parameters
    ----------
    listing
        Listing from `list_folders` or a similar function.
    exclude
        Names of findings (see `FINDINGS`) that exclude a file from the manifest.
    min_seconds
        Files shorter than this get the finding ``too_short``.
    test_fraction
        Share of files (or of groups) with split ``test``. Only files without a split in the listing are assigned.
        Duplicates and near-duplicates stay together.
    seed
        Seed of the split.
    executor, timeout_seconds, journal, progress
        See `examine_files`.

    Raises
    ------
    ScanError
        The listing is empty, ``exclude`` names an unknown finding, or ``test_fraction`` is out of range.
    """
    unknown = [name for name in exclude if name not in FINDINGS]
    if unknown:
        raise ScanError(f"scan: exclude must name findings ({', '.join(FINDINGS)}), got {', '.join(unknown)}")
    if not 0 <= test_fraction < 1:
        raise ScanError(f"scan: test_fraction must be in [0, 1), got {test_fraction}")
    if not listing.files:
        raise ScanError(
            f"scan: the listing must hold at least one media file, got none of {listing.listed_count} listed ones, and "
            f"{listing.unmatched_count} media files that the list does not name"
        )
    examined = examine_files(
        listing, executor=executor, timeout_seconds=timeout_seconds, journal=journal, progress=progress
    )
    paths = list(dict.fromkeys(file.path for file in listing.files))
    examinations = {path: _with_length(examined[path], min_seconds) for path in paths}
    alike = _mark_copies(examinations)

    skipped: dict[Path, str] = dict(listing.skipped)
    records: list[MediaRecord] = []
    groups: list[str] = []
    for file in listing.files:
        reason = _why_skipped(file, examinations[file.path], exclude, min_seconds)
        if reason is not None:
            skipped[file.path] = reason
            continue
        records.append(_record(file, examinations[file.path]))
        groups.append(file.group or file.path.relative_to(file.root).as_posix())
    if test_fraction > 0:
        together = _joined(groups, [str(record.path) for record in records], alike)
        drawn = assign_split(together, test_fraction, seed)
        # Files of a group with a split in the listing get the same split.
        given = {group: record.split for group, record in zip(together, records, strict=True) if record.split}
        records = [
            record if record.split else dataclasses.replace(record, split=given.get(group, split))
            for record, group, split in zip(records, together, drawn, strict=True)
        ]
    return ScanResult(Manifest(records), examinations, skipped, listing)


def examine_files(
    listing: Listing,
    *,
    part: tuple[int, int] = (1, 1),
    executor: Executor | None = None,
    timeout_seconds: float = 60.0,
    journal: Path | None = None,
    progress: Progress = silent,
) -> dict[Path, Examination]:
    """Examine the files of a listing. Results for unchanged files are taken from the journal.

    Parameters
    ----------
    listing
        The files.
    part
        ``(i, n)``: examine only the i-th of n parts, counted from 1, for batch schedulers. Parts share the journal
        folder.
    executor
        Executor of the tasks; by default, two threads of this process.
    timeout_seconds
        Time limit per file, after which it counts as unreadable.
    journal
        Folder of the journal; none by default.
    progress
        Called with ("files", files done, total files).
    """
    paths = list(dict.fromkeys(file.path for file in listing.files))[part[0] - 1 :: part[1]]
    stamps = {path: _stamp(path) for path in paths}
    done = _journaled(journal, stamps, timeout_seconds) if journal is not None else {}
    todo = [path for path in paths if path not in done]
    progress("files", len(done), len(paths))
    tasks = [todo[i : i + _FILES_PER_TASK] for i in range(0, len(todo), _FILES_PER_TASK)]
    name = "journal.jsonl" if part[1] == 1 else f"journal-{part[0]}-of-{part[1]}.jsonl"
    look = partial(_examine_guarded, timeout_seconds=timeout_seconds)
    with (
        _JournalFile(journal / name if journal is not None else None) as notes,
        nullcontext(executor) if executor is not None else workers_of(_THREADS) as workers,
    ):
        for group, found in results_of(workers, look, tasks):
            for path, (examination, condition) in zip(group, found, strict=True):
                stamp = stamps[path]
                if condition is not None and stamp is not None:
                    notes.write(path, [*stamp, *condition], examination)
                done[path] = examination
            progress("files", len(done), len(paths))
    if journal is not None and part[1] == 1:
        _tidy_journal(journal, stamps)
    return done


def _examine_guarded(paths: list[Path], timeout_seconds: float) -> list[tuple[Examination, list[int | float] | None]]:
    """The examination of each file, and its validity.

    The validity is [] if the result holds as long as the file does not change, [seconds] if the file exceeded that time
    limit, and None after a disk or network error, which may not occur in the next scan.
    """
    found: list[tuple[Examination, list[int | float] | None]] = []
    for path in paths:
        try:
            found.append((Examination.from_json(guarded(examine, path, timeout_seconds=timeout_seconds)), []))
        except GuardDeathError as error:
            found.append((unreadable(str(error)), [timeout_seconds]))
        except GuardError as error:
            found.append((unreadable(str(error)), None))
    return found


# ---- the journal ----------------------------------------------------------------------------------------------------


def _stamp(path: Path) -> list[int | float] | None:
    """A stamp that changes with the file; None if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [VERSION, status.st_size, status.st_mtime_ns]


class _JournalFile:
    """Writes a line for every examined file; with path None, it writes nothing."""

    def __init__(self, path: Path | None) -> None:
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
            # A kill may have truncated the last line, so start a new one. Empty lines are skipped.
            self._file.write("\n")

    def __enter__(self) -> "_JournalFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, path: Path, stamp: list[int | float], examination: Examination) -> None:
        if self._file is not None:
            entry = {"path": str(path), "stamp": stamp, "examination": examination.to_json()}
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()


def _read_journal(folder: Path) -> Iterator[tuple[Path, dict[str, Any], str]]:
    """Path, entry and line of all journal files; later lines for a path replace earlier ones."""
    for file in sorted(folder.glob("journal*.jsonl")):
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # a line truncated by a kill: its file is examined again
                if isinstance(entry, dict) and isinstance(entry.get("stamp"), list):
                    yield Path(entry["path"]), entry, line


def _journaled(
    folder: Path, stamps: dict[Path, list[int | float] | None], timeout_seconds: float
) -> dict[Path, Examination]:
    """The journal entries of these files that are still valid."""
    known = {}
    for path, entry, _ in _read_journal(folder):
        *stamp, limit = [*entry["stamp"], float("inf")][:4]
        if stamps.get(path) == stamp and timeout_seconds <= limit:
            known[path] = Examination.from_json(entry["examination"])
    return known


def _tidy_journal(folder: Path, stamps: dict[Path, list[int | float] | None]) -> None:
    """Rewrite the journal as one file with one line per file, so that it does not grow with every scan."""
    lines = {path: line for path, entry, line in _read_journal(folder) if stamps.get(path) == entry["stamp"][:3]}
    with written_aside(folder / "journal.jsonl") as aside, aside.open("w", encoding="utf-8") as file:
        file.writelines(lines[path] for path in stamps if path in lines)
    for part in folder.glob("journal-*-of-*.jsonl"):
        part.unlink()


# ---- from examinations to records -----------------------------------------------------------------------------------


def _with_length(examination: Examination, min_seconds: float) -> Examination:
    info = examination.info
    if info is None or info.duration_seconds >= min_seconds:
        return examination
    short = Finding("too_short", f"{info.duration_seconds:.2f} s, must be at least {min_seconds:g} s")
    return dataclasses.replace(examination, findings=(short, *examination.findings))


def _mark_copies(examinations: dict[Path, Examination]) -> list[tuple[str, str]]:
    """Add the findings ``duplicate`` and ``near_duplicate`` to the later file of each pair; return all pairs."""
    pairs: list[tuple[str, str]] = []

    def mark(path: Path, name: str, original: Path, detail: str) -> None:
        findings = (*examinations[path].findings, Finding(name, detail))
        examinations[path] = dataclasses.replace(examinations[path], findings=findings)
        pairs.append((str(original), str(path)))

    first_with: dict[str, Path] = {}
    originals: list[Path] = []
    for path, examination in list(examinations.items()):
        if examination.info is None:
            continue
        original = first_with.setdefault(examination.content_hash, path)
        if original == path:
            originals.append(path)
        else:
            mark(path, "duplicate", original, f"of {original}")

    def prints(name: str) -> list[bytes | None]:
        return [bytes.fromhex(text) if (text := getattr(examinations[path], name)) else None for path in originals]

    for first, second, picture, sound in near_duplicates(prints("picture_print"), prints("sound_print")):
        shares = [
            f"{share:.0%} of the {what}"
            for what, share in (("picture", picture), ("sound", sound))
            if share is not None
        ]
        detail = f"of {originals[first]} ({', '.join(shares)} print differs)"
        if examinations[originals[second]].has("near_duplicate"):  # of another file: one finding is enough
            pairs.append((str(originals[first]), str(originals[second])))
        else:
            mark(originals[second], "near_duplicate", originals[first], detail)
    return pairs


def _joined(groups: list[str], paths: list[str], alike: list[tuple[str, str]]) -> list[str]:
    """Merged group names: files of one group, and copies of each other, share one."""
    leader = {name: name for name in groups}

    def leading(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    group_of = dict(zip(paths, groups, strict=True))
    for first, second in alike:
        if first in group_of and second in group_of:
            low, high = sorted((leading(group_of[first]), leading(group_of[second])))
            leader[high] = low
    return [leading(name) for name in groups]


def _why_skipped(file: ListedFile, examination: Examination, exclude: Sequence[str], min_seconds: float) -> str | None:
    for finding in examination.findings:
        if finding.name in exclude or examination.info is None:
            return f"{finding.name}: {finding.detail}"
    assert examination.info is not None, "an unreadable file has a finding"
    if file.start_seconds >= examination.info.duration_seconds:
        return f"its segment begins at {file.start_seconds:g} s of {examination.info.duration_seconds:.1f} s"
    if "too_short" in exclude and _seconds(file, examination.info) < min_seconds:
        return (
            f"too_short: its segment has {_seconds(file, examination.info):.2f} s, must be at least {min_seconds:g} s"
        )
    return None


def _seconds(file: ListedFile, info: MediaInfo) -> float:
    """Length of the sample: the part of the segment that is within the file."""
    return min(file.end_seconds or float("inf"), info.duration_seconds) - file.start_seconds


def _record(file: ListedFile, examination: Examination) -> MediaRecord:
    assert examination.info is not None
    return MediaRecord(
        path=file.path,
        **{**vars(examination.info), "duration_seconds": _seconds(file, examination.info)},
        label=file.label,
        split=file.split,
        group=file.group,
        start_seconds=file.start_seconds,
        content_hash=examination.content_hash,
        findings=tuple(dict.fromkeys(finding.name for finding in examination.findings)),
    )
