"""The HDF5 files of AVE: row numbers of the splits, and features of segments, read by rows.

The published ``visual_feature.h5`` has 7.7 GiB (4,143 videos of 10 x 7 x 7 x 512 numbers in float64). As float32, the
rows of a batch of 64 are 64 MB, those of the training split 3.4 GB, all of them 4.2 GB. So nothing is read before it is
asked for. Files are only open while they are read: a copy of a reader in another process is safe.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FEATURES_KEY = "avadataset"
_ORDER_KEY = "order"


class AveError(ValueError):
    """An AVE data set that cannot be read, or only in part."""


class FeatureFile:
    """The features of one modality, in an .h5 file; read by rows.

    Parameters
    ----------
    path
        A file with the data set ``avadataset``, or with a single one of any name: floating-point numbers of shape
        (rows, segments, ...).

    Attributes
    ----------
    path
        The file.
    shape
        Shape of its data set.

    Raises
    ------
    AveError
        The file cannot be read, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _opened(path, _FEATURES_KEY) as (_, data):
            self.shape: tuple[int, ...] = tuple(data.shape)
            if data.dtype.kind != "f" or len(self.shape) < 3 or 0 in self.shape:
                raise AveError(
                    f"AVE features {path}: must be floating-point numbers of shape (rows, segments, ..., width), got "
                    f"{data.dtype} of shape {self.shape}"
                )

    def bytes_of(self, rows: int) -> int:
        """Memory that `read` needs for so many rows, as float32."""
        return 4 * rows * math.prod(self.shape[1:])

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """The given rows, in the given order, which may repeat rows.

        Raises
        ------
        AveError
            A row does not exist, or has a number that is not finite.
        """
        wanted = np.asarray(rows, np.int64)
        out = np.empty((len(wanted), *self.shape[1:]), np.float32)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < self.shape[0]:
            raise AveError(
                f"AVE features {self.path}: rows must be in [0, {self.shape[0]}), got {wanted.min()} to {wanted.max()}"
            )
        with _opened(self.path, _FEATURES_KEY) as (_, data), np.errstate(over="ignore"):
            # One by one: h5py wants a list of rows sorted and without repeats. Ascending, the order of the disk.
            for place in wanted.argsort(kind="stable"):
                row = int(wanted[place])
                out[place] = data[row]
                if not np.isfinite(out[place]).all():
                    raise AveError(
                        f"AVE features {self.path}: must be finite in float32, got another number in row {row}"
                    )
        return out


def read_order(path: Path) -> list[int]:
    """The row numbers in an ``*_order.h5``.

    Raises
    ------
    AveError
        The file cannot be read, or holds something else.
    """
    with _opened(path, _ORDER_KEY) as (key, data):
        if data.dtype.kind not in "iu" or len(data.shape) != 1:
            raise AveError(
                f"AVE list {path}: {key} must be a vector of row numbers, got {data.dtype} of shape {data.shape}"
            )
        numbers: list[int] = data[:].tolist()
    if min(numbers, default=0) < 0:
        raise AveError(f"AVE list {path}: row numbers must be at least 0, got {min(numbers)}")
    return numbers


@contextmanager
def _opened(path: Path, key: str) -> Iterator[tuple[str, Any]]:
    """The data set of that key, or the only one; h5py is an extra, and its errors name neither file nor reason."""
    try:
        import h5py
    except ImportError as error:
        raise AveError(f"AVE file {path}: .h5 needs the extra `heads`: pip install 'cmacc[heads]' ({error})") from error
    if not path.is_file():
        raise AveError(f"AVE file {path}: must exist, got no such file")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise AveError(
            f"AVE file {path}: must be a whole HDF5 file, got {path.stat().st_size} bytes that are not (an interrupted "
            "download, or a pointer of Git LFS?)"
        ) from error
    with file:
        names = [name for name in file if isinstance(file[name], h5py.Dataset)]
        name = key if key in names else names[0] if len(names) == 1 else None
        if name is None:
            raise AveError(f"AVE file {path}: must hold the data set {key}, got {', '.join(names) or 'none'}")
        yield name, file[name]
