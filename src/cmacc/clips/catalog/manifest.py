"""The manifest: one row per sample, as Parquet or CSV. Later stages only use the manifest, not the folders.

Paths are stored relative to the manifest's folder if the file is under it (so that both can be moved together), and
absolute otherwise. In memory the rows are Arrow columns: a million rows take about 200 MB, and there is no Python
object per row that a forked worker would copy on access.
"""

import csv
import dataclasses
import hashlib
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex, overload

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cmacc.clips.storage import Extent, PackedSample, written_aside

SCHEMA = pa.schema(
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
        ("group", pa.string()),
        ("start_seconds", pa.float64()),
        ("content_hash", pa.string()),
        ("findings", pa.string()),
        ("key", pa.string()),
        ("video_offset", pa.int64()),
        ("video_size", pa.int64()),
        ("audio_offset", pa.int64()),
        ("audio_size", pa.int64()),
    ]
)
_TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_REQUIRED = ("path", "duration_seconds", "has_audio")
_TEXTS = ("label", "split", "group", "content_hash", "findings", "key")
# A hand-written CSV may omit the frame size: 1 then means that the file has video.
_DEFAULTS = {"width": 1, "height": 1}


class ManifestError(ValueError):
    """A manifest cannot be read or used; the message states the problem and its location."""


@dataclass(frozen=True)
class MediaRecord:
    """One sample: a file, a segment of one, or a member of a packed shard.

    Attributes
    ----------
    path
        Path of the file or shard; a string if the shard is at a URL.
    duration_seconds
        Length of the sample.
    fps, width, height
        Frame rate and size of the video; ``width`` is 0 without video.
    has_audio, audio_rate_hz
        Whether there is audio, and its sample rate.
    label, split, group
        None if unknown. Samples of a group (one scene, one speaker) belong in one split.
    start_seconds
        Start of the sample in its file; 0 except for segments of longer files.
    content_hash
        SHA-256 of the file, in hex.
    findings
        Names of the findings of `cmacc scan`, such as ``silent`` or ``duplicate``.
    key
        Name of a packed sample in its shards.
    video, audio
        Location of video and audio in a shard; both None for a separate file.
    """

    path: Path | str
    duration_seconds: float
    fps: float
    width: int
    height: int
    has_audio: bool
    audio_rate_hz: int
    label: str | None = None
    split: str | None = None
    group: str | None = None
    start_seconds: float = 0.0
    content_hash: str | None = None
    findings: tuple[str, ...] = ()
    key: str | None = None
    video: Extent | None = None
    audio: Extent | None = None

    @property
    def has_picture(self) -> bool:
        """Whether the file has a video stream."""
        return self.width > 0

    @property
    def name(self) -> str:
        """Name of the sample: its key, or its file name."""
        return self.key or Path(self.path).name

    @property
    def source(self) -> Path | PackedSample:
        """The source for `decode_clips`."""
        if self.video is None and self.audio is None:
            return Path(self.path)
        return PackedSample(str(self.path), self.video, self.audio)


class Manifest:
    """Rows in a fixed order. A row's index is the sample id that dictionaries and logs use.

    Parameters
    ----------
    records
        The rows; `table` holds them as Arrow columns.
    """

    def __init__(self, records: Iterable[MediaRecord] = ()) -> None:
        self.table: pa.Table = pa.Table.from_pylist([_row(record) for record in records], schema=SCHEMA)

    @classmethod
    def of_table(cls, table: pa.Table) -> "Manifest":
        """Create a manifest from a table with `SCHEMA`, whose paths are absolute or URLs."""
        manifest = cls()
        manifest.table = table.select(SCHEMA.names).cast(SCHEMA).combine_chunks()
        return manifest

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and bool(self.table.equals(other.table))

    __hash__ = None  # type: ignore[assignment]

    @property
    def records(self) -> Sequence[MediaRecord]:
        """The rows as `MediaRecord`, created on access."""
        return _Records(self.table)

    def column(self, name: str) -> list[Any]:
        """One column of the table."""
        values: list[Any] = self.table.column(name).to_pylist()
        return values

    def classes(self) -> list[str]:
        """All labels, sorted; the index of a label in this list is its class index."""
        return sorted(label for label in pc.unique(self.table.column("label")).to_pylist() if label is not None)

    def label_indices(self) -> list[int]:
        """Class index of every row, -1 without a label."""
        index: dict[str | None, int] = {label: i for i, label in enumerate(self.classes())}
        return [index.get(label, -1) for label in self.column("label")]

    def ids_where(self, condition: Callable[[MediaRecord], bool]) -> list[int]:
        """Sample ids of the rows for which ``condition`` holds."""
        return [i for i, record in enumerate(self.records) if condition(record)]

    def fingerprint(self) -> str:
        """Hash of the content, label and split of all files (not of their location), sixteen hex digits.

        For rows without a content hash, the file name is used instead.
        """
        digest = hashlib.sha256()
        names = ("path", "duration_seconds", "content_hash", "label", "split", "start_seconds")
        for path, seconds, content, label, split, start in zip(*map(self.column, names), strict=True):
            what = content or path.rsplit("/", 1)[-1]
            segment = f"{start:.3f}+{seconds:.3f}"
            digest.update("\0".join((what, label or "", split or "", segment)).encode() + b"\n")
        return digest.hexdigest()[:16]

    @classmethod
    def read(cls, path: Path | str) -> "Manifest":
        """Read a ``.parquet`` or ``.csv`` manifest.

        Raises
        ------
        ManifestError
            The file is missing, has another format, lacks a required column, or a value does not parse.
        """
        path = Path(path)
        if not path.is_file():
            raise ManifestError(f"manifest {path}: no such file; make one with `cmacc scan FOLDER --out {path}`")
        try:
            if path.suffix == ".csv":
                with path.open(newline="", encoding="utf-8-sig") as file:
                    reader = csv.DictReader(file)
                    lines = list(reader)
                    table = pa.table({n: [line[n] for line in lines] for n in reader.fieldnames or () if n})
            elif path.suffix == ".parquet":
                table = pq.read_table(path)
            else:
                raise ManifestError(f"manifest {path}: must end in .parquet or .csv, got {path.suffix!r}")
        except (pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
            raise ManifestError(f"manifest {path}: cannot be read ({error})") from error
        return cls.of_table(_checked(table, path))

    def write(self, path: Path | str) -> None:
        """Write the manifest atomically, as ``.parquet`` or ``.csv`` according to the extension.

        Raises
        ------
        ManifestError
            The path has another extension.
        """
        path = Path(path)
        if path.suffix not in (".parquet", ".csv"):
            raise ManifestError(f"manifest {path}: must end in .parquet or .csv, got {path.suffix!r}")
        root = path.parent.resolve()
        paths = pa.array([_portable(p, root) for p in self.column("path")], pa.string())
        table = self.table.set_column(0, "path", paths)
        with written_aside(path) as aside:
            if path.suffix == ".parquet":
                pq.write_table(table, aside)
            else:
                with aside.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, fieldnames=SCHEMA.names)
                    writer.writeheader()
                    writer.writerows(table.to_pylist())


class _Records(Sequence[MediaRecord]):
    """The rows of a table as records. Iteration converts blocks, which is ten times faster than row by row."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, index: SupportsIndex) -> MediaRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[MediaRecord]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> MediaRecord | Sequence[MediaRecord]:
        if isinstance(index, slice):
            begin, end, step = index.indices(len(self))
            if step == 1:
                return list(map(_record, self._table.slice(begin, max(0, end - begin)).to_pylist()))
            return [self[i] for i in range(begin, end, step)]
        index = operator.index(index)
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"Manifest: sample id must be in [0, {len(self)}), got {index}")
        return _record(self._table.slice(place, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[MediaRecord]:
        for begin in range(0, len(self), 10_000):
            yield from map(_record, self._table.slice(begin, 10_000).to_pylist())


def assign_split(keys: Sequence[str], test_fraction: float, seed: int = 0) -> list[str]:
    """Split files into ``train`` and ``test``; files with the same key stay together.

    Keys are sorted by a hash of key and seed, and the first ``round(test_fraction * number of distinct keys)`` are
    test. So the result depends neither on the order of the files nor on their folder.

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


def _row(record: MediaRecord) -> dict[str, object]:
    row = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    for name in ("video", "audio"):
        extent = row.pop(name)
        row |= {f"{name}_offset": extent and extent.offset, f"{name}_size": extent and extent.size}
    path = str(record.path)
    return row | {
        "path": path if "://" in path else str(Path(path).absolute()),
        "findings": ",".join(record.findings) or None,
    }


def _record(row: dict[str, Any]) -> MediaRecord:
    extents: dict[str, Any] = {}
    for name in ("video", "audio"):
        offset, size = row.pop(f"{name}_offset"), row.pop(f"{name}_size")
        extents[name] = None if offset is None or size is None else Extent(offset, size)
    path, findings = row.pop("path"), row.pop("findings")
    return MediaRecord(
        path=path if "://" in path else Path(path),
        findings=tuple(findings.split(",")) if findings else (),
        **row,
        **extents,
    )


def _portable(path: str, root: Path) -> str:
    if "://" in path:
        return path
    if path.startswith(f"{root}/"):
        return path[len(f"{root}/") :]
    absolute = Path(path)
    resolved = absolute.parent.resolve() / absolute.name  # the folder path may contain a link
    return str(resolved.relative_to(root)) if resolved.is_relative_to(root) else path


def _checked(table: pa.Table, manifest: Path) -> pa.Table:
    """The table with columns of `SCHEMA`, parsed from text if necessary, and absolute paths."""
    columns = {}
    for field in SCHEMA:
        given = table.column(field.name) if field.name in table.column_names else pa.nulls(len(table))
        columns[field.name] = _parsed(given, field, manifest)
    root = manifest.parent.resolve()
    paths = [p if "://" in p or p.startswith("/") else f"{root}/{p}" for p in columns["path"].to_pylist()]
    columns["path"] = pa.array(paths, pa.string())
    return pa.table(columns, schema=SCHEMA)


def _parsed(column: pa.ChunkedArray | pa.Array, field: pa.Field, manifest: Path) -> pa.Array | pa.ChunkedArray:
    """The column in the type of the field; values are only parsed one by one if types differ or a value is invalid."""
    default = _default(field.name)
    if field.name not in _REQUIRED:
        if pa.types.is_null(column.type):
            column = pa.nulls(len(column), field.type)
        if column.type == field.type and default is not None:
            column = pc.fill_null(column, default)
    if column.type == field.type:
        if pa.types.is_floating(field.type):
            good = pc.is_finite(column)
        elif pa.types.is_string(field.type):
            good = pc.not_equal(column, "")
        else:
            good = pc.is_valid(column)
        if pc.all(pc.fill_null(good, field.name not in _REQUIRED)).as_py():
            return column
    values = []
    for number, value in enumerate(column.to_pylist(), start=1):
        try:
            values.append(_value(field, value))
        except ValueError as error:
            raise ManifestError(f"manifest {manifest}, row {number}: {error}") from error
    return pa.array(values, field.type)


def _default(name: str) -> object:
    """Default for a missing value; None if the column may have missing values."""
    if name in _TEXTS or name.endswith(("_offset", "_size")):
        return None
    return _DEFAULTS.get(name, 0)


def _value(field: pa.Field, value: object) -> object:
    if value is None or value == "":
        if field.name in _REQUIRED:
            raise ValueError(f"{field.name} must be given, got nothing")
        return _default(field.name)
    if pa.types.is_string(field.type):
        return str(value)
    if pa.types.is_boolean(field.type):
        text = str(value).strip().lower()
        if text not in _TRUTHS:
            raise ValueError(f"{field.name} must be true or false, got {value!r}")
        return _TRUTHS[text]
    text = str(value).strip()
    if pa.types.is_integer(field.type) and text.lstrip("+-").isdigit():
        return int(text)  # not via float, which cannot represent all digits of large offsets
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{field.name} must be finite, got {number}")
    return number if pa.types.is_floating(field.type) else int(number)
