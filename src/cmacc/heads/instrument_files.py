"""Notes of instruments on disk, as a task: TinySOL with its official folds, names of its kind, or class folders.

1. With a table (``TinySOL_metadata.csv``, or one with its columns): classes and folds are those of the table.
2. Else by file names, ``Vn-ord-A3-mf-4c-N``: instrument, technique, pitch, dynamics, string and so on.
3. Else by the folder of each class.

Without a table there are no official folds; they are drawn by class, copies of a file together.

Beside files and folds, the task has prompts for the names of the classes and the triplets of those that the ontology
knows (`cmacc.heads.instrument_ontology`), so that a card shows which tower of sound and text is weak.

Sources: Cella, Ghisi, Lostanlen, Levy, Fineberg and Maresz 2020, "OrchideaSOL: A dataset of extended instrumental
techniques for computer-aided orchestration"; TinySOL 6.0 (zenodo.org/records/3685367) has 2,913 notes of 14
instruments in 5 folds. Vasilakis, Bittner and Pauwels 2024, "I can listen but cannot read: an evaluation of two-tower
multimodal systems for instrument recognition" (ISMIR, arXiv 2407.18058), for the prompts.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cmacc.clips import LabelTable, ListedFile, Listing, Manifest, list_folders
from cmacc.clips.progress import Progress, silent
from cmacc.heads.instrument_ontology import (
    TINYSOL_CLASSES,
    instrument_named,
    instruments,
    sound_triplets,
    tree_distances,
)
from cmacc.heads.listed import ScanOptions, WholeSet, listed_task
from cmacc.transfer.tasks import Split, TaskData, TaskError, grouped_folds

TINYSOL_TABLE = "TinySOL_metadata.csv"
PROMPTS = (
    "A {} track",
    "This is a recording of {}",
    "Solo musical instrument sound of {}",
    "Sound of {} musical instrument",
)
"""The paper's templates that name an instrument; it also has controls: "A no {} track", and random words."""
_TINYSOL = WholeSet(2_913, len(TINYSOL_CLASSES))
_COLUMNS = LabelTable(Path(), label_column="Instrument (in full)", split_column="Fold", path_column="Path")
_NAME = re.compile(r"(?P<instrument>[A-Za-z]+)-(?P<technique>[a-z+_]+)-(?P<pitch>[A-G]#?\d)-(?P<dynamics>[a-z]+)-.+")
_PATTERN = "INSTRUMENT-TECHNIQUE-PITCH-DYNAMICS-... such as Vn-ord-A3-mf-4c-N"
_FOLDS = 5


def instrument_of(file: str) -> str:
    """The instrument that a file name of TinySOL's kind tells.

    Raises
    ------
    TaskError
        The name does not follow the pattern, or its abbreviation is none of TinySOL's.

    Examples
    --------
    >>> instrument_of("Strings/Violin/ordinario/Vn-ord-A3-mf-4c-N.wav"), instrument_of("BTb-ord-A#1-ff-N-T30d.wav")
    ('violin', 'bass tuba')
    """
    stem = os.path.splitext(file.rpartition("/")[2])[0]
    match = _NAME.fullmatch(stem)
    if match is None:
        raise TaskError(f"instrument file {file}: name must be {_PATTERN}, got {stem!r}")
    by_abbreviation = {one.abbreviation: one.name for one in instruments().values() if one.abbreviation}
    if match["instrument"] not in by_abbreviation:
        known = ", ".join(sorted(by_abbreviation))
        raise TaskError(f"instrument file {file}: instrument must be one of {known}, got {match['instrument']!r}")
    return by_abbreviation[match["instrument"]]


def instruments_task(
    root: Path,
    *,
    table: Path | None = None,
    folds: int | None = None,
    seed: int = 0,
    allow_partial: bool = False,
    workers: int = 1,
    journal: Path | None = None,
    progress: Progress = silent,
) -> TaskData:
    """Recognition of instruments from notes, on audio alone.

    Classes have the names of the ontology where it knows them, else those of the table or folder, in lower case.

    Parameters
    ----------
    root
        Folder of the files.
    table
        Table with the columns Path, Fold and Instrument (in full). Default: `TINYSOL_TABLE`, searched within ``root``.
    folds
        Number of folds, drawn by class. Default: the table's; 5 without a table.
    seed
        Seed of the folds.
    allow_partial
        Whether files or classes may be missing: of TinySOL's 2,913 notes where its table or its names are there, of the
        rows of another table, and of nothing for class folders.
    workers
        Number of files examined at a time.
    journal
        Folder for the journal of the scan, so that later calls need not examine the files again.
    progress
        Called with (examined files, all files).

    Raises
    ------
    TaskError
        Something is missing and ``allow_partial`` is not set, or there are fewer files of a class than needed.
    ListingError
        The folder holds no media file, or the table cannot be read or lacks a column.
    """
    if table is None:
        table = next(iter(sorted(root.glob(f"**/{TINYSOL_TABLE}"))), None)
    fold_of: dict[str, str] = {}
    if table is not None:
        listing, others, whole, fold_of = _of_table(root, table)
    else:
        listing, others, whole = _of_names(root)
    drawn = None if fold_of and folds is None else (_FOLDS if folds is None else folds)
    data = listed_task(
        "instruments",
        table.name if table is not None else str(root.name),
        root,
        listing,
        ("audio",),
        whole,
        partial(_divided, fold_of=fold_of, drawn=drawn, seed=seed),
        allow_partial=allow_partial,
        left_out=others,
        options=ScanOptions(workers, journal, progress),
    )
    return replace(data, prompts=PROMPTS, triplets=_triplets(data.manifest.classes()))


def _triplets(classes: list[str]) -> NDArray[np.int64]:
    """The sound triplets of those classes that the ontology knows, as numbers of classes."""
    known = [number for number, name in enumerate(classes) if instrument_named(name) is not None]
    found = sound_triplets(tree_distances([classes[number] for number in known]))
    return np.asarray(np.asarray(known, np.int64)[found])


def _of_table(root: Path, table: Path) -> tuple[Listing, dict[str, str], WholeSet, dict[str, str]]:
    """The files of a table, why others are not used, what it wants, and the fold of each file."""
    listing = list_folders([root], replace(_COLUMNS, csv_path=table))
    others = {str(file.path): f"has no instrument in {table.name}" for file in listing.files if file.label is None}
    others |= dict.fromkeys(listing.missing, "is missing")
    fold_of: dict[str, str] = {}
    files: list[ListedFile] = []
    for file in listing.files:
        if file.label is None:
            continue
        if file.split is None or not file.split.isdecimal():
            raise TaskError(f"{table.name}: Fold of {file.path.name} must be a number, got {file.split!r}")
        fold_of[str(file.path)] = file.split
        files.append(replace(file, label=_class_name(file.label), split=None))
    if len(set(fold_of.values())) < 2:
        raise TaskError(
            f"{table.name}: must have at least 2 folds with files in {root}, got {len(set(fold_of.values()))}"
        )
    # Of another table, the classes of missing files are not known here; their number is known.
    whole = WholeSet(listing.listed_count, len({file.label for file in files}))
    if table.name == TINYSOL_TABLE:
        whole = _TINYSOL
    return replace(listing, files=tuple(files)), others, whole, fold_of


def _of_names(root: Path) -> tuple[Listing, dict[str, str], WholeSet]:
    """The files named as TinySOL's; if there are none, those in class folders."""
    listing = list_folders([root])
    files: list[ListedFile] = []
    others: dict[str, str] = {}
    for file in listing.files:
        try:
            files.append(replace(file, label=instrument_of(str(file.path))))
        except TaskError as error:
            others[str(file.path)] = str(error)
    if files:
        return replace(listing, files=tuple(files)), others, _TINYSOL
    files = [replace(file, label=_class_name(file.label)) for file in listing.files if file.label is not None]
    if not files:
        raise TaskError(
            f"task instruments: {root} must hold {TINYSOL_TABLE}, files named {_PATTERN}, or at least 2 class folders, "
            f"got {len(listing.files):,} files in none; {next(iter(others.values()))}"
        )
    others = {str(file.path): "stands in no class folder" for file in listing.files if file.label is None}
    return replace(listing, files=tuple(files)), others, WholeSet(len(files), len({file.label for file in files}))


def _class_name(label: str) -> str:
    known = instrument_named(label)
    return " ".join(label.replace("_", " ").lower().split()) if known is None else known.name


def _divided(
    manifest: Manifest, class_of: NDArray[np.int64], *, fold_of: Mapping[str, str], drawn: int | None, seed: int
) -> tuple[Split, ...]:
    if drawn is not None:
        return grouped_folds("instruments", manifest, class_of, drawn, seed)
    folds = [fold_of[path] for path in manifest.column("path")]
    return tuple(
        Split(
            f"fold {number}",
            tuple(i for i, fold in enumerate(folds) if fold != number),
            tuple(i for i, fold in enumerate(folds) if fold == number),
        )
        for number in sorted(set(folds), key=int)
    )
