"""Tasks: files, labels and splits of an evaluation.

`cmacc.transfer.official` creates the tasks of official data sets from their lists, `cmacc.heads` those of emotion and
instruments.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cmacc.clips import Manifest
from cmacc.pretraining.clip_encoder import Modality
from cmacc.transfer.card import DataFacts

TaskName = Literal["ucf101", "hmdb51", "esc50", "esc10", "labelled", "pairs", "zero_shot", "emotion", "instruments"]
"""Name of a task: a data set with its splits, or what to do with a manifest."""


class TaskError(ValueError):
    """Data on which a task cannot be done; the message says what is missing."""


@dataclass(frozen=True)
class Split:
    """A split into training and held-out files, as rows of the manifest."""

    name: str
    train: tuple[int, ...]
    test: tuple[int, ...]


@dataclass(frozen=True)
class TaskData:
    """The data of a task.

    Attributes
    ----------
    task
        Name of the task.
    manifest
        The files.
    class_of
        ``(N,)`` class index of every row, -1 without a label.
    splits
        The splits over which results are averaged.
    modalities
        Modalities that the task uses.
    facts
        Description for the card.
    skipped
        ``{file: reason}`` of files that belong to the data but cannot be used.
    prompts
        Templates of protocol ``zero_shot`` where none are given; empty: the recipe's.
    triplets
        ``(T, 3)`` class indices (anchor, positive, negative) of an ontology in which the positive is nearer to the
        anchor than the negative; empty without one.
    """

    task: TaskName
    manifest: Manifest
    class_of: NDArray[np.int64]
    splits: tuple[Split, ...]
    modalities: tuple[Modality, ...]
    facts: DataFacts
    skipped: dict[str, str]
    prompts: tuple[str, ...] = ()
    triplets: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 3), np.int64))

    @property
    def sample_ids(self) -> list[int]:
        """The files of all splits, each once, in the order of the manifest."""
        return sorted({i for split in self.splits for i in (*split.train, *split.test)})

    def groups(self, sample_ids: Sequence[int]) -> NDArray[np.int64]:
        """``(n,)`` number of each file's group (clips cut from one scene). A file without a group is its own group."""
        names = self.manifest.column("group")
        keys = [names[i] if names[i] is not None else i for i in sample_ids]
        number = {key: n for n, key in enumerate(dict.fromkeys(keys))}
        return np.asarray([number[key] for key in keys], np.int64)


def pairs_task(path: Path, *, all_files: bool = False) -> TaskData:
    """Retrieval between the video and audio of the files in a manifest's split ``test``.

    Parameters
    ----------
    path
        Manifest.
    all_files
        Use every file, whatever its split: for data that the encoder was not trained on. The split of the result is
        then called ``all``.

    Raises
    ------
    TaskError
        There are fewer than two such files with video and audio.
    """
    manifest = Manifest.read(path)
    ids = manifest.ids_where(lambda r: r.has_audio and r.has_picture and (all_files or r.split == "test"))
    if len(ids) < 2:
        held_out = "" if all_files else " in split 'test'"
        way_out = (
            "; hold files out with `cmacc scan --test-fraction 0.2` before training, or pass --all-files to measure on "
            "every file of data that the encoder was not trained on"
        )
        raise TaskError(
            f"task pairs: manifest {path} must hold at least 2 files with video and audio{held_out}, got {len(ids)}"
            f"{'' if all_files else way_out}"
        )
    facts = DataFacts(str(path.absolute()), manifest.fingerprint(), len(ids), len(ids), 0, 0)
    return TaskData(
        "pairs",
        manifest,
        np.full(len(manifest), -1, np.int64),
        (Split("all" if all_files else "test", (), tuple(ids)),),
        ("video", "audio"),
        facts,
        {},
    )


def labelled_task(path: Path, *, folds: int | None = None, seed: int = 0, allow_partial: bool = False) -> TaskData:
    """Classification on the labels of any manifest, by its splits ``train`` and ``test`` or in k folds.

    Parameters
    ----------
    path
        Manifest.
    folds
        k: every labelled file is held out once, whatever its split, and files of a group together
        (`sklearn.model_selection.StratifiedGroupKFold`). None: the manifest's splits.
    seed
        Seed of the folds.
    allow_partial
        Whether to skip held-out files of a class without training files, instead of raising an error.

    Raises
    ------
    TaskError
        There are no labelled files in a split, fewer than two classes, fewer than k groups, or a class has no training
        files.
    """
    manifest = Manifest.read(path)
    class_of = np.asarray(manifest.label_indices(), np.int64)
    if folds is not None:
        splits = grouped_folds("labelled", manifest, class_of, folds, seed)
    else:
        of_split: dict[str, list[int]] = {"train": [], "test": []}
        for i, side in enumerate(manifest.column("split")):
            if side in of_split and class_of[i] >= 0:
                of_split[side].append(i)
        for name, ids in of_split.items():
            if not ids:
                raise TaskError(
                    f"task labelled: the manifest must hold labelled files in split {name!r}, got none; "
                    "`cmacc scan` reads labels from class folders or --labels, splits from --split-column or "
                    "--test-fraction; or divide it with --folds"
                )
        splits = (Split("test", tuple(of_split["train"]), tuple(of_split["test"])),)
    hashed = manifest.fingerprint() if folds is None else fingerprint(manifest, splits)
    kept = tuple(with_trained_classes("labelled", split, class_of, manifest, allow_partial) for split in splits)
    listed, used = (sorted({i for split in some for i in (*split.train, *split.test)}) for some in (splits, kept))
    facts = DataFacts(
        path=str(path.absolute()),
        fingerprint=hashed,
        files=len(used),
        files_listed=len(listed),
        classes=len(set(class_of[used])),
        classes_listed=len(set(class_of[listed])),
    )
    skipped = {
        f"{path} in {before.name}": "its class has no training files"
        for before, after in zip(splits, kept, strict=True)
        for path in (manifest.records[i].name for i in sorted(set(before.test) - set(after.test)))
    }
    return TaskData("labelled", manifest, class_of, kept, ("video", "audio"), facts, skipped)


def zero_shot_task(path: Path, *, all_files: bool = False) -> TaskData:
    """Classification of the labelled files in a manifest's split ``test`` by text, without training files.

    Parameters
    ----------
    path
        Manifest.
    all_files
        Use every labelled file, whatever its split. The split of the result is then called ``all``.

    Raises
    ------
    TaskError
        There are no such files, or fewer than two classes.
    """
    manifest = Manifest.read(path)
    ids = manifest.ids_where(lambda r: r.label is not None and (all_files or r.split == "test"))
    if not ids:
        held_out = "" if all_files else " in split 'test'"
        way_out = "" if all_files else ", or pass --all-files to use every labelled file"
        raise TaskError(
            f"task zero_shot: manifest {path} must hold labelled files{held_out}, got none; `cmacc scan` reads labels "
            f"from class folders or --labels{way_out}"
        )
    classes = len(manifest.classes())
    if classes < 2:
        raise TaskError(f"task zero_shot: manifest {path} must hold at least 2 classes, got {classes}")
    return TaskData(
        "zero_shot",
        manifest,
        np.asarray(manifest.label_indices(), np.int64),
        (Split("all" if all_files else "test", (), tuple(ids)),),
        ("video", "audio"),
        DataFacts(str(path.absolute()), manifest.fingerprint(), len(ids), len(ids), classes, classes),
        {},
    )


def fingerprint(manifest: Manifest, splits: Sequence[Split]) -> str:
    """Hash of the files, their labels and their splits: sixteen hex digits."""
    digest = hashlib.sha256(manifest.fingerprint().encode())
    names = [
        content or Path(path).name
        for content, path in zip(*map(manifest.column, ("content_hash", "path")), strict=True)
    ]
    for split in splits:
        for ids in (split.train, split.test):
            digest.update(f"{split.name} {' '.join(sorted(names[i] for i in ids))}\n".encode())
    return digest.hexdigest()[:16]


def with_trained_classes(
    task: str, split: Split, class_of: NDArray[np.int64], manifest: Manifest, allow_partial: bool
) -> Split:
    """The split without held-out files of classes that have no training files, which no classifier could predict.

    Raises
    ------
    TaskError
        There are such files and ``allow_partial`` is not set, or fewer than two classes or no held-out file remain.
    """
    trained = {class_of[i] for i in split.train}
    if len(trained) < 2:
        raise TaskError(
            f"task {task}, {split.name}: the training split must hold at least 2 classes, got {len(trained)}"
        )
    without = sorted({int(class_of[i]) for i in split.test} - trained)
    if without and not allow_partial:
        names = [manifest.classes()[c] for c in without]
        raise TaskError(
            f"task {task}, {split.name}: every held-out class must have training files, got none of "
            f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}; --allow-partial skips "
            "their held-out files"
        )
    test = tuple(i for i in split.test if class_of[i] in trained)
    if not test:
        raise TaskError(f"task {task}, {split.name}: no file of a class with training files is held out")
    return Split(split.name, split.train, test)


def grouped_folds(
    task: TaskName, manifest: Manifest, class_of: NDArray[np.int64], count: int, seed: int
) -> tuple[Split, ...]:
    """``count`` folds that hold out every labelled file once, files of a group together, and classes evenly.

    By `sklearn.model_selection.StratifiedGroupKFold`, which gives the same folds for the same files and seed.

    Raises
    ------
    TaskError
        There are fewer than 2 folds, or fewer groups than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    ids = np.flatnonzero(class_of >= 0)
    # Copies of a file form a group, so that none is held out while another one is trained on.
    keys = zip(manifest.column("group"), manifest.column("content_hash"), range(len(manifest)), strict=True)
    key_of = [group or content or f"row {row}" for group, content, row in keys]
    groups = np.asarray([key_of[i] for i in ids])
    distinct = len(set(groups))
    if not 2 <= count <= distinct:
        raise TaskError(f"task {task}: --folds must be in [2, {distinct}], the number of groups, got {count}")
    divided = StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(ids, class_of[ids], groups)
    return tuple(
        Split(f"fold {number}", tuple(ids[train].tolist()), tuple(ids[test].tolist()))
        for number, (train, test) in enumerate(divided, start=1)
    )
