"""The manifest: one row a file, as Parquet or CSV, the only thing that later stages know of a folder.

A path is written relative to the manifest's own folder where the file lies beneath it (so that the two can be moved
together), and absolute otherwise.
"""

import csv
import dataclasses
import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("duration_seconds", pa.float64()),
        ("fps", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("has_audio", pa.bool_()),
        ("audio_rate_hz", pa.int32()),
        ("label", pa.string()),
        ("split", pa.string()),
    ]
)
_TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_REQUIRED = ("path", "duration_seconds", "has_audio")


class ManifestError(ValueError):
    """A manifest that cannot be read or used; the message says what is wrong and where."""


@dataclass(frozen=True)
class MediaRecord:
    """One file. ``label`` and ``split`` are None where unknown; ``width`` is 0 for a file without picture."""

    path: Path
    duration_seconds: float
    fps: float
    width: int
    height: int
    has_audio: bool
    audio_rate_hz: int
    label: str | None = None
    split: str | None = None

    @property
    def has_picture(self) -> bool:
        """Whether the file has a video stream."""
        return self.width > 0


@dataclass(frozen=True)
class Manifest:
    """Rows in a fixed order. A row's index is the sample id that dictionaries and logs use."""

    records: tuple[MediaRecord, ...]

    def __len__(self) -> int:
        return len(self.records)

    def classes(self) -> list[str]:
        """All labels, sorted; a label's place in this list is its class index."""
        return sorted({record.label for record in self.records if record.label is not None})

    def label_indices(self) -> list[int]:
        """Class index of every row, -1 where there is none."""
        index = {label: i for i, label in enumerate(self.classes())}
        return [index[r.label] if r.label is not None else -1 for r in self.records]

    def ids_where(self, condition: Callable[[MediaRecord], bool]) -> list[int]:
        """Sample ids of the rows for which ``condition`` holds."""
        return [i for i, record in enumerate(self.records) if condition(record)]

    def fingerprint(self) -> str:
        """Sixteen hex digits that change when a file name, its duration, label or split changes (not its place)."""
        digest = hashlib.sha256()
        for record in self.records:
            row = (record.path.name, f"{record.duration_seconds:.3f}", record.label or "", record.split or "")
            digest.update("\0".join(row).encode() + b"\n")
        return digest.hexdigest()[:16]

    @classmethod
    def read(cls, path: Path | str) -> "Manifest":
        """Read a ``.parquet`` or ``.csv`` manifest.

        Raises
        ------
        ManifestError
            The file is missing, of another kind, lacks a required column, or a value does not parse.
        """
        path = Path(path)
        if not path.is_file():
            raise ManifestError(f"manifest {path}: no such file; make one with `cmacc scan FOLDER --out {path}`")
        try:
            if path.suffix == ".csv":
                with path.open(newline="", encoding="utf-8-sig") as file:
                    rows: list[dict[str, object]] = list(csv.DictReader(file))
            elif path.suffix == ".parquet":
                rows = pq.read_table(path).to_pylist()
            else:
                raise ManifestError(f"manifest {path}: must end in .parquet or .csv, got {path.suffix!r}")
        except (pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
            raise ManifestError(f"manifest {path}: cannot be read ({error})") from error
        return cls(tuple(_record(row, path, number) for number, row in enumerate(rows, start=1)))

    def write(self, path: Path | str) -> None:
        """Write as ``.parquet`` or ``.csv`` by the name's ending, aside first, then renamed into place.

        Raises
        ------
        ManifestError
            The name has another ending.
        """
        path = Path(path)
        if path.suffix not in (".parquet", ".csv"):
            raise ManifestError(f"manifest {path}: must end in .parquet or .csv, got {path.suffix!r}")
        root = path.parent.resolve()
        rows = [{**dataclasses.asdict(r), "path": _portable(r.path, root)} for r in self.records]
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            if path.suffix == ".parquet":
                pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), aside)
            else:
                with open(aside, "w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, fieldnames=_SCHEMA.names)
                    writer.writeheader()
                    writer.writerows(rows)
            os.chmod(aside, 0o644)
            os.replace(aside, path)
        except BaseException:
            os.unlink(aside)
            raise


def assign_split(keys: Sequence[str], test_fraction: float, seed: int = 0) -> list[str]:
    """Share files out between ``train`` and ``test``; files with the same key stay together.

    Keys are ordered by a hash of key and seed and the first ``round(test_fraction * number of distinct keys)`` are
    test, so that the outcome depends neither on the order of the files nor on their folder.

    Raises
    ------
    ValueError
        ``test_fraction`` is not in [0, 1).
    """
    if not 0 <= test_fraction < 1:
        raise ValueError(f"assign_split: test_fraction must be in [0, 1), got {test_fraction}")
    ordered = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}\0{key}".encode()).digest())
    test = set(ordered[: round(test_fraction * len(ordered))])
    return ["test" if key in test else "train" for key in keys]


def _portable(path: Path, root: Path) -> str:
    absolute = path.absolute()
    for spelling in (absolute, absolute.parent.resolve() / absolute.name):  # the folder may be reached through a link
        if spelling.is_relative_to(root):
            return str(spelling.relative_to(root))
    return str(absolute)


def _record(row: dict[str, object], manifest: Path, number: int) -> MediaRecord:
    missing = [name for name in _REQUIRED if row.get(name) in (None, "")]
    if missing:
        raise ManifestError(f"manifest {manifest}, row {number}: {', '.join(missing)} must be given, got nothing")
    try:
        return MediaRecord(
            path=manifest.parent.resolve() / str(row["path"]),
            duration_seconds=_number(row, "duration_seconds"),
            fps=_number(row, "fps"),
            width=int(_number(row, "width", default=1.0)),
            height=int(_number(row, "height", default=1.0)),
            has_audio=_truth(row, "has_audio"),
            audio_rate_hz=int(_number(row, "audio_rate_hz")),
            label=_text(row, "label"),
            split=_text(row, "split"),
        )
    except ValueError as error:
        raise ManifestError(f"manifest {manifest}, row {number}: {error}") from error


def _number(row: dict[str, object], name: str, default: float = 0.0) -> float:
    value = row.get(name)
    number = float(str(value)) if value not in (None, "") else default
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def _truth(row: dict[str, object], name: str) -> bool:
    value = str(row[name]).strip().lower()
    if value not in _TRUTHS:
        raise ValueError(f"{name} must be true or false, got {row[name]!r}")
    return _TRUTHS[value]


def _text(row: dict[str, object], name: str) -> str | None:
    value = row.get(name)
    return str(value) if value not in (None, "") else None
