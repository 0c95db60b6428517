"""Feature sequences of several modalities with targets, such as those of CMU-MOSI and CMU-MOSEI, from plain arrays.

A file ``.npz``, ``.safetensors`` or ``.h5`` holds these arrays for every split, which is ``train``, ``valid`` or
``test``:

    ``<split>/<modality>``          (n, T, width)   numbers; T may differ between modalities, width not between splits
    ``<split>/labels``              (n,) or (n, k)  floats: regression; integers (n,): class numbers; 0 and 1, (n, k):
                                                    several labels an item. Axes of size 1 after the first are dropped.
    ``<split>/lengths/<modality>``  (n,)            optional: number of valid steps, the first ones, in [0, T];
                                                    0: the item lacks the modality. Without it, all are T.
    ``<split>/ids``                 (n,)            optional: names of the items, as text (not in .safetensors)

Two things are not guessed. *Rows of zeros are steps like any other* unless the lengths end before them: a zero vector
can be a measurement, and some published files are padded in front, others behind. And an item lacks a modality only if
its length is 0.

Pickles, the form in which the published files come, are refused: reading one runs the code that it holds.
``tools/convert_mosi_pickle.py`` of the repository makes an .npz of one and runs no code from it.
"""

import logging
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

log = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
_LABELS, _LENGTHS, _IDS = "labels", "lengths", "ids"
_ROWS_TAKEN = ("present", "targets")  # names of `SequenceData.rows` that are no modality


class SequenceError(ValueError):
    """A file or arrays that are no set of feature sequences; the message says which and why."""


@dataclass(frozen=True, eq=False)
class SequenceData:
    """Feature sequences of N items in some modalities, with targets and splits.

    Attributes
    ----------
    features
        By modality, shape (N, T, width), all at least 1: finite. What stands after the length is ignored.
    lengths
        By modality, shape (N,): number of valid steps in [0, T]; 0: the item lacks the modality. Every item has one.
    targets
        Float32 (N, k), finite; or int64 (N,), class numbers from 0.
    splits
        Rows of each split; no row is in two.
    ids
        Names of the items, all different; empty if unknown.
    replaced
        By modality, how many values were NaN or infinite in the file and are 0 here.

    Raises
    ------
    SequenceError
        If anything is not as described above.
    """

    features: Mapping[str, NDArray[np.float32]]
    lengths: Mapping[str, NDArray[np.int64]]
    targets: NDArray[np.float32] | NDArray[np.int64]
    splits: Mapping[str, NDArray[np.int64]]
    ids: tuple[str, ...] = ()
    replaced: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.targets)
        if not self.features or self.features.keys() != self.lengths.keys():
            raise SequenceError(
                f"sequences: must have features and lengths of the same modalities, at least one, got "
                f"{', '.join(self.features) or 'none'} and {', '.join(self.lengths) or 'none'}"
            )
        for name, values in self.features.items():
            _check_modality(name, values, self.lengths[name], count)
        lacking = np.flatnonzero(~self.present.any(axis=1))
        if lacking.size:
            raise SequenceError(
                f"sequences: every item must have at least one modality, got {lacking.size} without any, the first "
                f"{self._named(int(lacking[0]))}"
            )
        _check_targets(self.targets)
        if self.ids and (len(self.ids) != count or len(set(self.ids)) != count):
            twice = [name for name, times in Counter(self.ids).items() if times > 1]
            raise SequenceError(
                f"sequences: ids must be {count} different names, got {len(self.ids)}"
                f"{f', and {twice[0]!r} twice; an item in two splits is a leak' if twice else ''}"
            )
        rows = np.concatenate([np.zeros(0, np.int64), *self.splits.values()])
        if not all(len(split) for split in self.splits.values()) or len(set(rows.tolist())) != len(rows):
            raise SequenceError("sequences: splits must not be empty, and no row may be in two")
        if rows.size and (rows.min() < 0 or rows.max() >= count):
            raise SequenceError(f"sequences: splits must hold rows in [0, {count}), got {rows.min()} to {rows.max()}")

    @property
    def present(self) -> NDArray[np.bool_]:
        """Shape (N, modalities): whether the item has the modality, in the order of ``features``."""
        return np.stack([lengths > 0 for lengths in self.lengths.values()], axis=1)

    @property
    def widths(self) -> dict[str, int]:
        """Size of a step's feature vector by modality."""
        return {name: values.shape[2] for name, values in self.features.items()}

    def rows(self) -> dict[str, Tensor]:
        """The rows of all items for a head: ``<modality>``, ``<modality>_length``, ``present`` and ``targets``.

        The tensors share the memory of the arrays.
        """
        rows = {name: torch.from_numpy(values) for name, values in self.features.items()}
        rows |= {f"{name}_length": torch.from_numpy(values) for name, values in self.lengths.items()}
        return rows | {"present": torch.from_numpy(self.present), "targets": torch.from_numpy(self.targets)}

    def _named(self, row: int) -> str:
        return repr(self.ids[row]) if self.ids else f"row {row}"


def read_sequences(path: Path) -> SequenceData:
    """Feature sequences from a file; the module's docstring says what it must hold.

    All splits become one array a modality: where T differs between them, zeros fill up the shorter. Values that are
    NaN, infinite or too large for float32 (MOSI's sound has -inf) become 0; they are counted in
    `SequenceData.replaced`, and a warning is logged.

    Raises
    ------
    SequenceError
        The file is missing, of another type, damaged or a pickle, lacks an array, holds an unknown one, or arrays do
        not fit.
    """
    arrays = _read_arrays(path)
    modalities = _modalities(path, arrays)
    targets = _joined_targets(path, arrays)
    counts = {split: len(arrays[f"{split}/{_LABELS}"]) for split in SPLITS}
    # The features last: they are taken out of `arrays`, and the lengths are checked against them.
    lengths = {modality: _joined_lengths(path, arrays, modality, counts) for modality in modalities}
    ids = _joined_ids(path, arrays, counts)
    features: dict[str, NDArray[np.float32]] = {}
    replaced: dict[str, int] = {}
    for modality in modalities:
        features[modality], replaced[modality] = _joined_features(path, arrays, modality)
    ends = np.cumsum([0, *counts.values()])
    splits = {split: np.arange(ends[i], ends[i + 1]) for i, split in enumerate(SPLITS)}
    try:
        return SequenceData(features, lengths, targets, splits, ids, replaced)
    except SequenceError as error:
        raise SequenceError(f"{path}: {error}") from error


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    kind = path.suffix.lower()
    if kind in (".pkl", ".pickle", ".p"):
        raise SequenceError(
            f"sequences {path}: pickles are not read, because reading one runs the code that it holds; make an .npz "
            f"with `python tools/convert_mosi_pickle.py {path} {path.with_suffix('.npz')}` of cmacc's repository"
        )
    if kind not in (".npz", ".h5", ".hdf5", ".safetensors"):
        raise SequenceError(f"sequences {path}: must be .npz, .h5 or .safetensors, got {kind or 'no suffix'}")
    if not path.is_file():
        raise SequenceError(f"sequences {path}: must be a file, got {'a folder' if path.is_dir() else 'nothing'}")
    try:
        if kind == ".npz":
            return _read_npz(path)
        # TypeError: of a type that NumPy does not know, such as bfloat16.
        return load_file(path) if kind == ".safetensors" else _read_h5(path)
    except SequenceError:
        raise
    except (OSError, EOFError, RuntimeError, TypeError, ValueError, zlib.error, BadZipFile, SafetensorError) as error:
        raise SequenceError(f"sequences {path}: must hold plain arrays that can be read, got: {error}") from error


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    if not is_zipfile(path):
        raise SequenceError(f"sequences {path}: must be an archive of NumPy arrays, got another kind of file")
    with np.load(path, allow_pickle=False) as file:
        return {name: np.asarray(file[name]) for name in file.files}


def _read_h5(path: Path) -> dict[str, NDArray[Any]]:
    try:
        import h5py
    except ImportError as error:
        raise SequenceError(f"sequences {path}: .h5 needs the extra `heads`: pip install 'cmacc[heads]'") from error
    names: list[str] = []
    arrays: dict[str, NDArray[Any]] = {}
    with h5py.File(path, "r") as file:
        file.visit(names.append)
        for name in names:
            held = file[name]
            if isinstance(held, h5py.Dataset):
                is_text = h5py.check_string_dtype(held.dtype) is not None
                arrays[name] = np.asarray(held.asstr()[()], np.str_) if is_text else np.asarray(held[()])
    return arrays


def _modalities(path: Path, arrays: Mapping[str, NDArray[Any]]) -> list[str]:
    """Those of train, which the other splits must have too; every array must have a place in the layout."""
    of_split: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in arrays:
        split, *place = name.split("/")
        if split not in SPLITS or len(place) != (2 if place[:1] == [_LENGTHS] else 1):
            raise SequenceError(
                f"sequences {path}, {name}: arrays must be named <split>/<modality>, <split>/labels, <split>/ids or "
                f"<split>/lengths/<modality>, with split one of {', '.join(SPLITS)}"
            )
        if len(place) == 1 and place[0] not in (_LABELS, _IDS):
            of_split[split].append(place[0])
    modalities = of_split["train"]
    for split, names in of_split.items():
        if not names or set(names) != set(modalities) or f"{split}/{_LABELS}" not in arrays:
            raise SequenceError(
                f"sequences {path}: {split} must hold {_LABELS} and the modalities of train "
                f"({', '.join(modalities) or 'at least one'}), got {', '.join(names) or 'no modality'} and "
                f"{'' if f'{split}/{_LABELS}' in arrays else 'no '}{_LABELS}"
            )
    for name in arrays:
        if f"/{_LENGTHS}/" in name and name.split("/")[2] not in modalities:
            raise SequenceError(f"sequences {path}, {name}: must be of a modality, one of {', '.join(modalities)}")
    return modalities


def _require(is_right: bool, path: Path, name: str, wanted: str, array: NDArray[Any]) -> None:
    if not is_right:
        raise SequenceError(f"sequences {path}, {name}: must be {wanted}, got {array.dtype} {array.shape}")


def _joined_targets(path: Path, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32] | NDArray[np.int64]:
    parts: list[NDArray[Any]] = []
    for split in SPLITS:
        name, part = f"{split}/{_LABELS}", arrays[f"{split}/{_LABELS}"]
        part = part.reshape(part.shape[:1] + tuple(size for size in part.shape[1:] if size != 1))
        _require(part.ndim in (1, 2) and part.dtype.kind in "fiub", path, name, "numbers, (n,) or (n, k)", part)
        alike = not parts or (part.shape[1:], part.dtype.kind) == (parts[0].shape[1:], parts[0].dtype.kind)
        _require(alike, path, name, f"of the same kind and size as {SPLITS[0]}/{_LABELS}", part)
        parts.append(part)
    joined = np.concatenate(parts)
    if joined.ndim == 1 and joined.dtype.kind in "iu":
        return joined.astype(np.int64)
    return joined.reshape(len(joined), -1).astype(np.float32)


def _joined_lengths(
    path: Path, arrays: Mapping[str, NDArray[Any]], modality: str, counts: Mapping[str, int]
) -> NDArray[np.int64]:
    """Also checks the features: without them, lengths mean nothing."""
    parts: list[NDArray[np.int64]] = []
    width = arrays[f"{SPLITS[0]}/{modality}"].shape[-1:]
    for split, count in counts.items():
        values = arrays[f"{split}/{modality}"]
        is_right = values.ndim == 3 and len(values) == count and 0 not in values.shape and values.dtype.kind in "fiu"
        wanted = f"numbers ({count}, T, width), none of them 0, of the same width in all splits"
        _require(is_right and values.shape[2:] == width, path, f"{split}/{modality}", wanted, values)
        steps = values.shape[1]
        part = arrays.get(f"{split}/{_LENGTHS}/{modality}", np.full(count, steps))
        is_right = part.shape == (count,) and part.dtype.kind in "iu" and bool(((part >= 0) & (part <= steps)).all())
        _require(is_right, path, f"{split}/{_LENGTHS}/{modality}", f"{count} integers in [0, {steps}]", part)
        parts.append(part.astype(np.int64))
    return np.concatenate(parts)


def _joined_features(path: Path, arrays: dict[str, NDArray[Any]], modality: str) -> tuple[NDArray[np.float32], int]:
    """And the number of values that became 0. Takes the arrays out: a large set need not be in memory twice."""
    parts = [arrays.pop(f"{split}/{modality}") for split in SPLITS]
    joined = np.zeros((sum(map(len, parts)), max(p.shape[1] for p in parts), parts[0].shape[2]), np.float32)
    start = 0
    with np.errstate(over="ignore"):
        for part in parts:
            joined[start : start + len(part), : part.shape[1]] = part
            start += len(part)
    broken = ~np.isfinite(joined)
    count = int(broken.sum())
    if count:
        joined[broken] = 0
        share = 100 * count / joined.size
        log.warning("sequences %s: %d values of %s (%.2g %%) are not finite and became 0", path, count, modality, share)
    return joined, count


def _joined_ids(path: Path, arrays: Mapping[str, NDArray[Any]], counts: Mapping[str, int]) -> tuple[str, ...]:
    names = [f"{split}/{_IDS}" for split in SPLITS]
    if not any(name in arrays for name in names):
        return ()
    ids: list[str] = []
    for name, count in zip(names, counts.values(), strict=True):
        part = arrays.get(name, np.zeros(0))
        is_right = part.shape == (count,) and part.dtype.kind == "U"
        _require(is_right, path, name, f"{count} texts, since a split has ids", part)
        ids += part.tolist()
    return tuple(ids)


def _check_modality(name: str, values: NDArray[np.float32], lengths: NDArray[np.int64], count: int) -> None:
    if name in _ROWS_TAKEN or name.endswith("_length"):
        raise SequenceError(f"sequences: a modality must not be called present, targets or ..._length, got {name}")
    if values.ndim != 3 or len(values) != count or 0 in values.shape:
        raise SequenceError(f"sequences, {name}: must have shape ({count}, T, width), none 0, got {values.shape}")
    if not np.isfinite(values).all():
        raise SequenceError(f"sequences, {name}: features must be finite, got NaN or infinite values")
    if lengths.shape != (count,) or not ((lengths >= 0) & (lengths <= values.shape[1])).all():
        raise SequenceError(
            f"sequences, {name}: must have {count} lengths in [0, {values.shape[1]}], got {lengths.shape} up to "
            f"{lengths.max(initial=0)}"
        )


def _check_targets(targets: NDArray[np.float32] | NDArray[np.int64]) -> None:
    if targets.dtype.kind == "i":
        if targets.ndim != 1 or not targets.size or targets.min() < 0:
            raise SequenceError(
                f"sequences: integer targets must be class numbers from 0, of shape (N,), got {targets.shape}"
                f"{f' down to {targets.min()}' if targets.size else ''}; save numbers to regress on as floats"
            )
    elif targets.ndim != 2 or 0 in targets.shape or not np.isfinite(targets).all():
        raise SequenceError(f"sequences: targets must be finite, of shape (N, k), none of them 0, got {targets.shape}")
