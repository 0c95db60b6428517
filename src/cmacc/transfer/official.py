"""UCF101, HMDB51, ESC-50 and ESC-10 with their official lists: splits or folds, and completeness.

An incomplete copy gives another result, which must not be mistaken for that of the data set. It is refused unless
requested, and the card then states the share of files and classes.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmacc.clips import Listing, Manifest, ScanResult, scan, workers_of
from cmacc.clips.catalog import layouts
from cmacc.clips.progress import Progress, silent
from cmacc.pretraining.clip_encoder import Modality
from cmacc.transfer.card import DataFacts
from cmacc.transfer.tasks import Split, TaskData, TaskError, TaskName, fingerprint, with_trained_classes

_SIDES = ("train", "test")


@dataclass(frozen=True)
class OfficialSet:
    """Official facts about a data set.

    Attributes
    ----------
    modality
        Modality of the task. UCF101 and HMDB51 are video only, because which of their clips have audio reveals the
        class.
    part
        Name of its divisions: split or fold.
    parts
        Number of divisions.
    files
        Number of training and held-out files of one division.
    classes
        Number of classes.
    marker
        Name of a file by which its lists are found within the data's folder.
    """

    modality: Modality
    part: str
    parts: int
    files: int
    classes: int
    marker: str


OFFICIAL: dict[TaskName, OfficialSet] = {
    "ucf101": OfficialSet("video", "split", 3, 13_320, 101, "classInd.txt"),
    "hmdb51": OfficialSet("video", "split", 3, 5_100, 51, "brush_hair_test_split1.txt"),
    "esc50": OfficialSet("audio", "fold", 5, 2_000, 50, "esc50.csv"),
    "esc10": OfficialSet("audio", "fold", 5, 400, 10, "esc50.csv"),
}


def official_task(
    task: TaskName,
    root: Path,
    *,
    lists: Path | None = None,
    parts: Sequence[int] | None = None,
    allow_partial: bool = False,
    workers: int = 1,
    journal: Path | None = None,
    progress: Progress = silent,
) -> TaskData:
    """An official data set on disk.

    Every file is examined once (`cmacc.clips.catalog.scan`): its length, damage, and a hash of its content.

    Parameters
    ----------
    task
        A key of `OFFICIAL`.
    root
        Folder of its files, in any layout; they are matched by name without the extension.
    lists
        Folder of the official lists (for ESC, ``esc50.csv``). Default: searched within ``root``.
    parts
        Numbers of the splits or folds to evaluate, from 1. Default: all.
    allow_partial
        Whether files or classes may be missing.
    workers
        Number of files examined at a time.
    journal
        Folder for the journal of the scan, so that later calls need not examine the files again.
    progress
        Called with (examined files, all files).

    Raises
    ------
    TaskError
        The lists are not found, a part does not exist, or something is missing and ``allow_partial`` is not set.
    ListingError
        The folder holds no media files, or a list cannot be read.
    """
    what = OFFICIAL[task]
    numbers = sorted(set(parts or range(1, what.parts + 1)))
    if not set(numbers) <= set(range(1, what.parts + 1)):
        raise TaskError(f"task {task}: --splits must be of 1 to {what.parts}, got {', '.join(map(str, numbers))}")
    place = _lists(task, root, lists)
    listings = {number: _listing(task, root, place, number) for number in numbers}
    if not allow_partial:  # checked before examining files, which may take hours, and again afterwards
        _require_whole(task, root, listings, lambda path: True)
    scanned = examined(
        listings[numbers[0]], f"{task} {root.resolve()}", workers=workers, journal=journal, progress=progress
    )
    manifest = scanned.manifest
    row_of = {path: i for i, path in enumerate(manifest.column("path"))}
    if not allow_partial:
        _require_whole(
            task, root, listings, lambda path: str(path) in row_of, next(iter(scanned.skipped.items()), None)
        )
    _require_stream(task, manifest, what.modality)
    class_of = np.asarray(manifest.label_indices(), np.int64)
    splits = []
    for number, listing in listings.items():
        rows: dict[str | None, list[int]] = {side: [] for side in _SIDES}
        for file in listing.files:
            if file.split in rows and str(file.path) in row_of:
                rows[file.split].append(row_of[str(file.path)])
        split = Split(f"{what.part} {number}", tuple(rows["train"]), tuple(rows["test"]))
        splits.append(with_trained_classes(task, split, class_of, manifest, allow_partial))
    used = {i for split in splits for i in (*split.train, *split.test)}
    facts = DataFacts(
        path=str(root.absolute()),
        fingerprint=fingerprint(manifest, splits),
        files=len(used),
        files_listed=_listed_count(listings),
        classes=len({class_of[i] for i in used}),
        classes_listed=what.classes,
    )
    skipped = {str(path): reason for path, reason in scanned.skipped.items()}
    return TaskData(task, manifest, class_of, tuple(splits), (what.modality,), facts, skipped)


def examined(listing: Listing, name: str, *, workers: int, journal: Path | None, progress: Progress) -> ScanResult:
    """Examine the files of a listing; those that cannot be read or are corrupt are excluded.

    Parameters
    ----------
    listing
        The files.
    name
        Name of the data, for its own folder in ``journal``.
    workers, journal, progress
        As in `official_task`.
    """
    if journal is not None:
        journal = journal / hashlib.sha256(name.encode()).hexdigest()[:16]
    with workers_of(max(1, workers)) as executor:
        return scan(listing, exclude=("unreadable", "corrupt"), executor=executor, journal=journal, progress=progress)


def _require_whole(
    task: TaskName,
    root: Path,
    listings: dict[int, Listing],
    is_good: Callable[[Path], bool],
    damaged: tuple[Path, str] | None = None,
) -> None:
    what = OFFICIAL[task]
    for number, listing in listings.items():
        used = [file for file in listing.files if file.split in _SIDES and is_good(file.path)]
        classes = len({file.label for file in used})
        if len(used) < what.files or classes < what.classes:
            why = f" ({damaged[0].name} is damaged: {damaged[1]})" if damaged is not None else ""
            raise TaskError(
                f"task {task}, {what.part} {number}: {root} must hold all {what.files:,} files of {what.classes} "
                f"classes, got {len(used):,} files of {classes}{why}; --allow-partial evaluates the present files, and "
                "the card then states their share"
            )


def _listed_count(listings: dict[int, Listing]) -> int:
    """Number of distinct files that the divisions train on or hold out. Those of HMDB51 leave some clips unused."""
    names: set[str] = set()
    for listing in listings.values():
        names |= {str(file.path) for file in listing.files if file.split in _SIDES}
        missing = zip(listing.missing, listing.missing_splits, strict=True)
        names |= {name for name, split in missing if split in _SIDES}
    return len(names)


def _listing(task: TaskName, root: Path, lists: Path, number: int) -> Listing:
    if task == "ucf101":
        return layouts.list_ucf101(root, lists, number)
    if task == "hmdb51":
        return layouts.list_hmdb51(root, lists, number)
    return layouts.list_esc50(root, lists, number, only_esc10=task == "esc10")


def _lists(task: TaskName, root: Path, given: Path | None) -> Path:
    """The folder (for ESC, the file) of the official lists: within the given one, or anywhere within ``root``."""
    marker = OFFICIAL[task].marker
    if given is not None and given.is_file():
        return given
    searched = given if given is not None else root
    found = sorted(searched.glob(f"**/{marker}"))
    if not found:
        raise TaskError(
            f"task {task}: the official lists, with {marker}, must be in {searched}, got none; name their folder with "
            "--annotations"
        )
    return found[0] if marker.endswith(".csv") else found[0].parent


def _require_stream(task: TaskName, manifest: Manifest, modality: Modality) -> None:
    without = manifest.ids_where(lambda r: not (r.has_picture if modality == "video" else r.has_audio))
    if without:
        raise TaskError(
            f"task {task}: every file must have {modality}, got "
            f"{len(without)} without, such as {manifest.records[without[0]].name}"
        )
