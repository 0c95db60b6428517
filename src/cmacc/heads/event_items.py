"""What the heads of event localisation are trained on: the rows in use of an AVE, as items, with features.

`cmacc.heads.event_films` makes them from films, by an encoder. `published_set` takes the published features, which stay
as they are, in their files, and are read by the batch.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from cmacc.encoders.training import hash_tensors
from cmacc.heads.ave import SPLITS, AveData, read_ave
from cmacc.heads.ave_features import AveFeatures, read_ave_features, read_background_features
from cmacc.heads.head import Items, ItemsInMemory, Rows
from cmacc.transfer.tasks import TaskError

_ROWS_AT_ONCE = 64  # 64 MB of the published features
_SAMPLED = 16


@dataclass(frozen=True, eq=False)
class EventSet:
    """The rows in use, as items 0 to n - 1 in the order of the annotations.

    Attributes
    ----------
    data
        Annotations and splits.
    rows
        Shape (n,): row of ``data`` of each item, ascending.
    items
        ``video``, ``audio`` and ``labels`` of each item. After the n items of rows come those of ``background``.
    background
        Numbers of the items that are videos without any event, of no row: for weak training alone.
    skipped
        ``{file: reason}`` of films that were skipped.
    """

    data: AveData
    rows: NDArray[np.int64]
    items: Items
    background: range
    skipped: Mapping[str, str]

    def split(self, side: str) -> list[int]:
        """Numbers of the items of ``train``, ``validation`` or ``test``."""
        numbers: list[int] = np.searchsorted(self.rows, self.data.splits[side]).tolist()
        return numbers

    def labels(self, side: str) -> Int[Tensor, "videos seconds"]:
        """Labels of the items of a split."""
        return torch.from_numpy(self.data.labels[self.data.splits[side]])

    def videos(self, side: str) -> NDArray[np.int64]:
        """Number of the video of each item of a split: rows of one video have the same."""
        ids = [self.data.video_ids[row] for row in self.data.splits[side]]
        number_of = {name: number for number, name in enumerate(dict.fromkeys(ids))}
        return np.asarray([number_of[name] for name in ids], np.int64)

    def fingerprint(self) -> str:
        """Hash of ids, labels and splits: sixteen hex digits."""
        digest = hashlib.sha256("\n".join(self.data.classes).encode())
        for side in SPLITS:
            for row in self.data.splits[side].tolist():
                digest.update(f"{side} {self.data.video_ids[row]} {self.data.labels[row].tolist()}\n".encode())
        return digest.hexdigest()[:16]

    @cached_property
    def features_hash(self) -> str:
        """Hash of the features, sixteen hex digits; of those in files, of sixteen rows only."""
        count = len(self.items)
        numbers = np.arange(count)
        if not isinstance(self.items, ItemsInMemory):
            numbers = np.unique(np.linspace(0, count - 1, _SAMPLED).astype(np.int64))
        digest = hashlib.sha256(str(count).encode())
        hash_tensors(digest, dict(self.items.rows(numbers.tolist())))
        return digest.hexdigest()[:16]

    @cached_property
    def pooled(self) -> ItemsInMemory:
        """The items with the picture averaged over places, in memory: 2.6 kB a second of the published features.

        For a head that averages anyway: one pass over the files instead of one per epoch.
        """
        if isinstance(self.items, ItemsInMemory) and self.items.columns["video"].ndim == 3:
            return self.items
        parts = [
            self.items.rows(range(start, min(start + _ROWS_AT_ONCE, len(self.items))))
            for start in range(0, len(self.items), _ROWS_AT_ONCE)
        ]
        pooled = [{**part, "video": part["video"].flatten(2, -2).mean(2)} for part in parts]
        return ItemsInMemory({name: torch.cat([part[name] for part in pooled]) for name in pooled[0]})


class PublishedItems:
    """The published features of some rows, and of videos without any event after them; left in their files.

    Parameters
    ----------
    features
        Of all rows.
    rows
        The rows that are items.
    background
        Videos without any event; None: none.
    """

    def __init__(self, features: AveFeatures, rows: NDArray[np.int64], background: AveFeatures | None = None) -> None:
        self._features, self._rows, self._background = features, rows, background
        self._count = len(rows) + (0 if background is None else background.video.shape[0])

    def __len__(self) -> int:
        return self._count

    def rows(self, ids: Sequence[int]) -> Rows:
        """The rows of those items, from the files."""
        numbers = np.asarray(ids, np.int64)
        is_row = numbers < len(self._rows)
        found = self._features.read(self._rows[numbers[is_row]])
        if self._background is None or is_row.all():
            return found
        others = self._background.read(numbers[~is_row] - len(self._rows))
        # `found` has the rows first, the others after them.
        place = torch.from_numpy(np.argsort(np.argsort(~is_row, kind="stable"), kind="stable"))
        return {name: torch.cat([found[name], others[name]])[place] for name in found}


def published_set(root: Path, *, allow_partial: bool = False, drop_leaks: bool = False) -> EventSet:
    """The rows with the published features, and the videos without any event if their files are there.

    Parameters
    ----------
    root
        Folder of ``Annotations.txt``, the lists, ``visual_feature.h5`` and ``audio_feature.h5``.
    allow_partial, drop_leaks
        As in `read_ave`.

    Raises
    ------
    AveError
        A file is missing or does not fit the others.
    TaskError
        There is no training or test row, or the videos without any event have features of another shape.
    """
    data = read_ave(root, allow_partial=allow_partial, drop_leaks=drop_leaks)
    features = read_ave_features(root, data)
    background = None
    if (root / "visual_feature_noisy.h5").exists() and (root / "audio_feature_noisy.h5").exists():
        background = read_background_features(root, data)
        for own, other in ((features.video, background.video), (features.audio, background.audio)):
            if own.shape[1:] != other.shape[1:]:
                raise TaskError(
                    f"task ave: rows of {other.path} must have shape {own.shape[1:]} as those of {own.path.name}, got "
                    f"{other.shape[1:]}"
                )
    rows = rows_in_use(data)
    items = PublishedItems(features, rows, background)
    return EventSet(data, rows, items, range(len(rows), len(items)), {})


def rows_in_use(data: AveData) -> NDArray[np.int64]:
    """The rows of all splits, ascending.

    Raises
    ------
    TaskError
        There is no training or no test row.
    """
    for side in ("train", "test"):
        if not len(data.splits[side]):
            raise TaskError(f"task ave: {data.root} must hold rows of split {side} that can be used, got none")
    return np.sort(np.concatenate([data.splits[side] for side in SPLITS]))
