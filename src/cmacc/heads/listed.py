"""From a listing of a public data set to the data of a task: examine the files, demand the whole set, divide it.

`cmacc.transfer.official` does the same for sets that come with lists of their splits. Those here are told by file
names, and divided by speaker or by a column of their table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cmacc.clips import ListedFile, Listing, Manifest
from cmacc.clips.progress import Progress, silent
from cmacc.pretraining.clip_encoder import Modality
from cmacc.transfer.card import DataFacts
from cmacc.transfer.official import examined
from cmacc.transfer.tasks import Split, TaskData, TaskError, TaskName, fingerprint, with_trained_classes


@dataclass(frozen=True)
class WholeSet:
    """The official size of a data set.

    Attributes
    ----------
    files, classes
        Number of files and of their classes.
    speakers
        Number of speakers, which are the groups of the files; 0: they have none.
    """

    files: int
    classes: int
    speakers: int = 0

    def __str__(self) -> str:
        speakers = f" and {self.speakers} speakers" if self.speakers else ""
        return f"{self.files:,} files of {self.classes} classes{speakers}"


@dataclass(frozen=True)
class ScanOptions:
    """How files are examined.

    Attributes
    ----------
    workers
        Number of files examined at a time.
    journal
        Folder for the journal of the scan, so that later calls need not examine the files again.
    progress
        Called with (examined files, all files).
    """

    workers: int = 1
    journal: Path | None = None
    progress: Progress = silent


def listed_task(
    task: TaskName,
    name: str,
    root: Path,
    listing: Listing,
    modalities: tuple[Modality, ...],
    whole: WholeSet,
    divide: Callable[[Manifest, NDArray[np.int64]], tuple[Split, ...]],
    *,
    allow_partial: bool,
    left_out: Mapping[str, str],
    options: ScanOptions,
) -> TaskData:
    """The data of a task, of the listed files that are whole and have every modality.

    Parameters
    ----------
    task, name
        The task, and the name of the data set, for messages.
    root
        Folder of the files.
    listing
        The files, with labels, and speakers as groups.
    modalities
        Modalities that every file must have.
    whole
        What the set must hold.
    divide
        The splits of a manifest with the classes of its rows.
    allow_partial
        Whether files, classes or speakers may be missing.
    left_out
        ``{file: reason}`` of files that were not listed, for the card.
    options
        How files are examined.

    Raises
    ------
    TaskError
        Something is missing and ``allow_partial`` is not set, or no file can be used.
    """
    # Checked before files are examined, which may take an hour, and again afterwards.
    _require_whole(task, name, root, whole, listing.files, left_out, allow_partial)
    scanned = examined(
        listing,
        f"{task} {name} {root.resolve()}",
        workers=options.workers,
        journal=options.journal,
        progress=options.progress,
    )
    manifest = scanned.manifest
    has = {"video": [width > 0 for width in manifest.column("width")], "audio": manifest.column("has_audio")}
    paths = manifest.column("path")
    without = {paths[i]: m for m in modalities for i, present in enumerate(has[m]) if not present}
    unusable = {str(path): reason for path, reason in scanned.skipped.items()}
    unusable |= {path: f"has no {modality}" for path, modality in without.items()}
    kept = [i for i, path in enumerate(paths) if path not in without]
    good = {paths[i] for i in kept}
    usable = [file for file in listing.files if str(file.path) in good]
    _require_whole(task, name, root, whole, usable, unusable, allow_partial)
    if not kept:
        raise TaskError(f"task {task}, {name}: a file of {root} must be usable, got none; {_first(unusable)}")
    if without:
        manifest = Manifest.of_table(manifest.table.take(kept))
    class_of = np.asarray(manifest.label_indices(), np.int64)
    splits = tuple(
        with_trained_classes(task, split, class_of, manifest, allow_partial) for split in divide(manifest, class_of)
    )
    used = {i for split in splits for i in (*split.train, *split.test)}
    facts = DataFacts(
        path=str(root.absolute()),
        fingerprint=fingerprint(manifest, splits),
        files=len(used),
        files_listed=whole.files,
        classes=len({class_of[i] for i in used}),
        classes_listed=whole.classes,
    )
    return TaskData(task, manifest, class_of, splits, modalities, facts, {**left_out, **unusable})


def _require_whole(
    task: TaskName,
    name: str,
    root: Path,
    whole: WholeSet,
    files: list[ListedFile] | tuple[ListedFile, ...],
    faults: Mapping[str, str],
    allow_partial: bool,
) -> None:
    speakers = len({file.group for file in files}) if whole.speakers else 0
    found = WholeSet(len(files), len({file.label for file in files}), speakers)
    short = found.files < whole.files or found.classes < whole.classes or found.speakers < whole.speakers
    if short and not allow_partial:
        cause = f" ({_first(faults)})" if faults else ""
        raise TaskError(
            f"task {task}, {name}: {root} must hold all {whole}, got {found}{cause}; --allow-partial "
            "(allow_partial=True) evaluates the present files, and the card then states their share"
        )


def _first(faults: Mapping[str, str]) -> str:
    file, reason = next(iter(faults.items()))
    more = f", and {len(faults) - 1} more cannot be used" if len(faults) > 1 else ""
    return f"{Path(file).name}: {reason}{more}"
