"""Plain arrays from a published pickle of CMU-MOSI or CMU-MOSEI: ``tools/convert_mosi_pickle.py IN.pkl OUT.npz``.

It stands outside of the package, which reads no pickle. A pickle is a program: loading one may call any function of any
module. This loader knows the few names that pickled NumPy arrays need, and puts functions of its own in their place; at
any other name it stops. NumPy's own functions are not called either: with a made-up data type, they can be brought to
follow any address in memory. A file can still ask for more memory than there is. So this is for files that one has a
reason to trust, and runs only where the user runs it.

The pickle must hold ``{split: {modality: (n, T, width), "labels" or "regression_labels": (n, ...), ...}}`` for the
splits train, valid and test. ``id`` becomes ``ids``, ``<modality>_lengths`` becomes ``lengths/<modality>``; all else is
left out, and its names are printed. The layout of the .npz is that of ``cmacc.heads.sequences``. NaN and
infinity stay; they are replaced, and counted, when the .npz is read.
"""

import argparse
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "valid", "test")
LABELS = ("labels", "regression_labels")


class ConversionError(ValueError):
    """A pickle that is refused or does not hold what is described above; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert; 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pickle", type=Path, help="the published file")
    parser.add_argument("npz", type=Path, help="file to write; must not exist")
    parser.add_argument("--modalities", nargs="+", default=["text", "audio", "vision"], help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        if options.npz.suffix != ".npz" or options.npz.exists():
            raise ConversionError(f"{options.npz}: must be a new file that ends in .npz")
        arrays, left_out = converted(load(options.pickle), options.modalities)
    except (ConversionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    np.savez_compressed(options.npz, **arrays)
    for name, array in arrays.items():
        print(f"{name}: {array.dtype} {array.shape}")
    print(f"left out: {', '.join(left_out) or 'nothing'}")
    return 0


def load(path: Path) -> object:
    """The dicts, lists, texts, numbers and arrays of a pickle.

    Raises
    ------
    ConversionError
        It names anything else, or is damaged.
    """
    try:
        with path.open("rb") as file:
            # Pickles of Python 2 hold the bytes of arrays as text, which only latin1 gives back unchanged.
            return _ArrayUnpickler(file, encoding="latin1").load()
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from error
    except OSError:
        raise
    # A damaged pickle may fail in any way while its instructions are carried out.
    except Exception as error:
        raise ConversionError(
            f"{path}: must be a pickle of plain arrays, got {type(error).__name__}: {error}"
        ) from error


def converted(held: object, modalities: Sequence[str]) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """Arrays in the layout of ``cmacc.heads.sequences``, and the names of what was left out.

    Raises
    ------
    ConversionError
        A split, a modality or the labels are missing, or something is not an array of numbers.
    """
    arrays: dict[str, NDArray[Any]] = {}
    left_out: list[str] = []
    for split in SPLITS:
        of_split = held.get(split) if isinstance(held, dict) else None
        if not isinstance(of_split, dict):
            got = ", ".join(map(str, held)) if isinstance(held, dict) else type(held).__name__
            raise ConversionError(f"must hold a dict for each of {', '.join(SPLITS)}, got {got}")
        labels = next((name for name in LABELS if name in of_split), None)
        missing = [name for name in modalities if name not in of_split]
        if missing or labels is None:
            wanted = missing[0] if missing else " or ".join(LABELS)
            raise ConversionError(
                f"{split}: must hold {wanted}, got {', '.join(map(str, of_split))}; name others with --modalities"
            )
        used = {labels, "id"}
        arrays[f"{split}/labels"] = _numbers(f"{split}/{labels}", of_split[labels])
        for name in modalities:
            arrays[f"{split}/{name}"] = _numbers(f"{split}/{name}", of_split[name]).astype(np.float32)
            lengths = f"{name}_lengths"
            if lengths in of_split:
                counted = _numbers(f"{split}/{lengths}", of_split[lengths])
                arrays[f"{split}/lengths/{name}"] = counted.astype(np.int64).reshape(-1)
            used |= {name, lengths}
        if "id" in of_split:
            ids = of_split["id"]
            if not isinstance(ids, (list, tuple, _Array)):
                raise ConversionError(f"{split}/id: must be a list or an array, got {type(ids).__name__}")
            arrays[f"{split}/ids"] = np.asarray([_text(one) for one in ids], np.str_)
        left_out += [f"{split}/{name}" for name in of_split if name not in used]
    return arrays, left_out


def _numbers(name: str, values: object) -> NDArray[Any]:
    try:
        array = np.asarray(values)
        array = array.astype(np.float64) if array.dtype == object else array
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{name}: must be an array of numbers, got: {error}") from error
    if array.dtype.kind not in "fiub":
        raise ConversionError(f"{name}: must be an array of numbers, got {array.dtype}")
    return array


def _text(value: object) -> str:
    """An item's name; MulT's files hold it in parts: film, start and end."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, (list, tuple, np.ndarray, _Array)):
        return " ".join(_text(part) for part in value)
    return str(value)


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # NumPy 2 calls numpy.core numpy._core.
        stand_in = _STAND_INS.get((module.replace("numpy._core", "numpy.core"), name))
        if stand_in is None:
            raise ConversionError(f"names {module}.{name}, which arrays do not need; it was not run")
        return stand_in


class _DType:
    """A data type of numbers, texts or objects."""

    def __init__(self, letters: str) -> None:
        self.dtype = np.dtype(letters)
        if self.dtype.kind not in "fiubSUO" or self.dtype.shape:
            raise ConversionError(f"holds an array of type {letters!r}, must be of numbers or texts")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])  # the rest says again what the letters said


class _Array:
    """An array to be: pickles make an empty one first and then tell what it holds."""

    def __init__(self) -> None:
        self.values: NDArray[Any] = np.zeros(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, dtype, is_fortran, held = state[-4:]
        if isinstance(held, list):
            flat = np.empty(len(held), object)
            flat[:] = held
            self.values = flat.reshape(shape, order="F" if is_fortran else "C")
        else:
            self.fill(held, dtype, shape, "F" if is_fortran else "C")

    def fill(
        self, held: bytes | bytearray | str, dtype: _DType, shape: tuple[int, ...], order: Literal["C", "F"]
    ) -> None:
        data = held.encode("latin1") if isinstance(held, str) else held
        self.values = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)  # refuses objects

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.values, dtype)

    def __iter__(self) -> Iterator[object]:
        return iter(self.values)


def _reconstruct(of_class: object, shape: object, letter: object) -> _Array:
    return _Array()


def _dtype(letters: str, align: object = False, copy: object = True) -> _DType:
    return _DType(letters)


def _scalar(dtype: _DType, held: bytes | str) -> object:
    array = _Array()
    array.fill(held, dtype, (), "C")
    return array.values.item()


def _from_buffer(held: bytes | bytearray, dtype: _DType, shape: tuple[int, ...], order: Literal["C", "F"]) -> _Array:
    array = _Array()
    array.fill(held, dtype, shape, order)
    return array


def _latin1_bytes(text: str, encoding: str) -> bytes:
    """Bytes in pickles of protocol 2 and below; other encodings would load modules."""
    if encoding != "latin1":
        raise ConversionError(f"asks for the encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Empty bytes in pickles of protocol 2 and below."""
    return b""


_STAND_INS: Mapping[tuple[str, str], Callable[..., object] | str] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "dtype"): _dtype,
    # Only handed to `_reconstruct`. As text, it cannot be called.
    ("numpy", "ndarray"): "numpy.ndarray",
    ("_codecs", "encode"): _latin1_bytes,
    ("builtins", "bytes"): _no_bytes,
    ("__builtin__", "bytes"): _no_bytes,
}


if __name__ == "__main__":
    sys.exit(main())
