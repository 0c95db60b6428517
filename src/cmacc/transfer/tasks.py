"""Tasks: which rows of a manifest take part, and which protocols are run on their features."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from cmacc.clips import Manifest
from cmacc.transfer.features import Features
from cmacc.transfer.protocols import Metric, knn, linear_probe, retrieval

TaskName = Literal["pairs", "labelled"]


class TaskError(ValueError):
    """A manifest on which a task cannot be done; the message says what it lacks."""


@dataclass(frozen=True)
class Outcome:
    """One metric of a task for one encoder."""

    protocol: str
    modality: str
    metric: Metric


@runtime_checkable
class Task(Protocol):
    """Chooses files, then measures their features."""

    def sample_ids(self, manifest: Manifest) -> list[int]:
        """The files that the task needs features of."""
        ...

    def measure(self, manifest: Manifest, features: Features) -> list[Outcome]:
        """The task's metrics."""
        ...


class PairsTask:
    """Find a held-out picture's own sound among all held-out sounds, and the other way round."""

    def sample_ids(self, manifest: Manifest) -> list[int]:
        """Files with picture and sound of the split ``test``; of the whole manifest where nothing is in a split."""
        has_split = any(record.split for record in manifest.records)
        ids = manifest.ids_where(lambda r: r.has_audio and r.has_picture and (r.split == "test" or not has_split))
        if len(ids) < 2:
            raise TaskError(
                f"task pairs: the manifest must hold at least 2 files with picture and sound in split 'test', "
                f"got {len(ids)}; `cmacc scan --test-fraction 0.2` puts files there"
            )
        return ids

    def measure(self, manifest: Manifest, features: Features) -> list[Outcome]:
        """Retrieval in both directions."""
        video, audio = features.video_embedding, features.audio_embedding
        return [
            Outcome("retrieval", modality, metric)
            for modality, metrics in (
                ("video->audio", retrieval(video, audio)),
                ("audio->video", retrieval(audio, video)),
            )
            for metric in metrics
        ]


class LabelledTask:
    """Name the class of held-out files from frozen features: linear probe and kNN, for picture, sound and both."""

    def sample_ids(self, manifest: Manifest) -> list[int]:
        """Labelled files of the splits ``train`` and ``test``."""
        ids = manifest.ids_where(lambda r: r.label is not None and r.split in ("train", "test"))
        for split in ("train", "test"):
            count = sum(manifest.records[i].split == split for i in ids)
            if count == 0:
                raise TaskError(
                    f"task labelled: the manifest must hold labelled files in split {split!r}, got none; "
                    "`cmacc scan` reads labels from class folders or --labels, "
                    "splits from --split-column or --test-fraction"
                )
        if len({manifest.records[i].label for i in ids if manifest.records[i].split == "train"}) < 2:
            raise TaskError("task labelled: the training split must hold at least 2 classes, got 1")
        return ids

    def measure(self, manifest: Manifest, features: Features) -> list[Outcome]:
        """Accuracy of both protocols per modality, over the files that have it."""
        records = [manifest.records[i] for i in features.sample_ids]
        labels = np.asarray(manifest.label_indices(), np.int64)[features.sample_ids]
        is_test = np.asarray([record.split == "test" for record in records])
        has_picture = np.asarray([record.has_picture for record in records])
        has_sound = np.asarray([record.has_audio for record in records])
        outcomes: list[Outcome] = []
        for modality, rows, present in (
            ("video", features.video, has_picture),
            ("audio", features.audio, has_sound),
            ("both", np.concatenate([features.video, features.audio], axis=1), has_picture & has_sound),
        ):
            train, test = present & ~is_test, present & is_test
            if len(np.unique(labels[train])) < 2 or not test.any():
                continue  # silent or sound-only data: that modality has no task here
            outcomes += _both_protocols(modality, rows, labels, train, test)
        return outcomes


_Probe = Callable[[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]], list[Metric]]


def _both_protocols(
    modality: str,
    rows: NDArray[np.float32],
    labels: NDArray[np.int64],
    train: NDArray[np.bool_],
    test: NDArray[np.bool_],
) -> list[Outcome]:
    protocols: tuple[tuple[str, _Probe], ...] = (("linear_probe", linear_probe), ("knn", knn))
    return [
        Outcome(name, modality, metric)
        for name, protocol in protocols
        for metric in protocol(rows[train], labels[train], rows[test], labels[test])
    ]


def build_task(name: TaskName) -> Task:
    """The task of that name.

    Raises
    ------
    ValueError
        ``name`` is unknown.
    """
    if name == "pairs":
        return PairsTask()
    if name == "labelled":
        return LabelledTask()
    raise ValueError(f"build_task: name must be pairs or labelled, got {name!r}")
