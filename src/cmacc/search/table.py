"""The table behind an index: embeddings of the windows of whole videos in LanceDB, with a description beside it.

The folder of an index (or the URL of an object store) holds:

* ``description.json``: the encoder and its weights, the root of all paths, the length and the distance of windows.
* ``windows.lance``: the table, with one row for each window and modality (`table_schema`).

Up to `EXACT_ROWS` rows, vectors are read into memory and compared by a matrix product: LanceDB's own exact search
decodes its files again for every query, and takes 14 times as long or more (benchmarks/search.py). Larger tables have
an approximate index inside LanceDB (`cmacc.search.writer`).

Readers take no lock. A reader keeps the version of the table that it opened; if a writer has cleaned that version up in
the meantime, the reader opens the latest one and reads again.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from numpy.typing import NDArray

from cmacc.clips.storage import Store
from cmacc.pretraining.clip_encoder import Modality

if TYPE_CHECKING:
    from lancedb.db import DBConnection
    from lancedb.table import LanceTable

# Below, all rows are compared; the approximate index of larger tables misses up to one in twenty.
EXACT_ROWS = 200_000
WINDOWS = "windows"
# How many candidates of the approximate index are compared exactly. With 100, its one bit a number limits the recall of
# ten rows to 0.94 in a million, however many partitions are looked into. Of many rows, each costs a read.
_REFINED = 300
_LEAST_REFINE_FACTOR = 2
# What identifies a sample (a file, a segment of one, or a member of a shard), and the order of its windows.
SAMPLE = ("path", "key", "sample_start_seconds", "sample_end_seconds")
# The columns that say what a row is about. Seconds are on the clock of the file.
FACT_TYPES = {
    "path": pa.string(),  # relative to the root
    "key": pa.string(),  # of a sample in a packed shard
    "sample_start_seconds": pa.float64(),
    "sample_end_seconds": pa.float64(),
    "start_seconds": pa.float64(),
    "end_seconds": pa.float64(),
    "modality": pa.string(),
    "label": pa.string(),
    "content_hash": pa.string(),
}
FACTS = tuple(FACT_TYPES)
# Where vectors can be compared: video with audio, or the features of a modality's tower with text.
Space = Literal["shared", "text"]

_DESCRIPTION = "description.json"
_FORMAT = 1
_MOST_TRIES = 5
_ROWS_AT_ONCE = 10_000
_Result = TypeVar("_Result")


class SearchError(ValueError):
    """An index that cannot be opened, written or asked; the message says which and why."""


@dataclass(frozen=True)
class Approximate:
    """The approximate index of a large table.

    Attributes
    ----------
    rows
        Rows of the table when it was built.
    probes
        Number of partitions that a query looks into.
    recall_at_10
        Share of the ten nearest rows that it finds, against exact search: the least one of searches with pictures and
        sounds in pictures and sounds.
    """

    rows: int
    probes: int
    recall_at_10: float


@dataclass(frozen=True)
class Description:
    """What an index is made of.

    Attributes
    ----------
    encoder
        Name of the encoder: a run or export folder, for example.
    weights
        Fingerprint of its weights.
    root
        Absolute folder or URL that all paths are relative to.
    window_seconds, hop_seconds
        Length of a window, and the distance between the starts of two.
    size
        Width of the vectors in the shared space.
    text_sizes
        Width of the features that text is compared with, for each modality that has them.
    made
        A random name, other for every index that is made.
    approximate
        The approximate index; None while the table is searched exactly.
    """

    encoder: str
    weights: str
    root: str
    window_seconds: float
    hop_seconds: float
    size: int
    text_sizes: Mapping[Modality, int]
    made: str = ""
    approximate: Approximate | None = None

    @property
    def kind(self) -> str:
        """What the rows of two indexes must share to stand in one."""
        facts = [self.weights, self.window_seconds, self.hop_seconds, self.size, dict(self.text_sizes)]
        return json.dumps(facts, sort_keys=True)

    def relative(self, path: str) -> str:
        """A path relative to the root.

        Raises
        ------
        SearchError
            It lies outside of it.
        """
        root = self.root.rstrip("/")
        if "://" not in path:
            path = os.path.normpath(path)
        if not path.startswith(f"{root}/"):
            resolved = path if "://" in path else str(Path(path).parent.resolve() / Path(path).name)
            if not resolved.startswith(f"{root}/"):
                raise SearchError(
                    f"embed: {path} must be under the root of the index, {self.root}; name a folder above both with "
                    "--root"
                )
            path = resolved
        return path[len(root) + 1 :]

    def write(self, store: Store) -> None:
        """Write it beside the table, atomically."""
        store.write(_DESCRIPTION, json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=1).encode())

    @staticmethod
    def exists(store: Store) -> bool:
        """Whether there is one in a folder."""
        return store.exists(_DESCRIPTION)

    @staticmethod
    def delete(store: Store) -> None:
        """Delete it, if it is there."""
        if store.exists(_DESCRIPTION):
            store.delete(_DESCRIPTION)

    @classmethod
    def read(cls, store: Store) -> "Description | None":
        """The description in a folder; None if there is none.

        Raises
        ------
        SearchError
            It is damaged, or of another version of cmacc.
        """
        try:
            data = json.loads(store.read(_DESCRIPTION))
            if data.pop("format") != _FORMAT:
                raise SearchError(
                    f"index {store.root}: made by another version of cmacc; make it again with cmacc embed"
                )
            near = data.pop("approximate")
            return cls(**data, approximate=None if near is None else Approximate(**near))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, SearchError):
                raise
            raise SearchError(f"index {store.root}: {_DESCRIPTION} is damaged ({error})") from error


def table_schema(description: Description) -> pa.Schema:
    """Columns of the table: `FACT_TYPES`, the fingerprint of the weights, and vectors in float16."""
    columns = {**FACT_TYPES, "weights": pa.string(), "vector": pa.list_(pa.float16(), description.size)}
    for modality, size in description.text_sizes.items():
        columns[vector_column(modality, "text")] = pa.list_(pa.float16(), size)
    return pa.schema(columns)


@dataclass(frozen=True)
class Rows:
    """Windows of one modality. Those of a sample stand together, in order of time.

    Attributes
    ----------
    facts
        ``(n,)``: a table of the columns `FACTS`.
    vectors
        ``(n, d)``, of unit length.
    """

    facts: pa.Table
    vectors: Float[np.ndarray, "rows dim"]

    @classmethod
    def of(cls, table: pa.Table, column: str) -> "Rows":
        """Rows from the columns of a LanceDB result, in any order."""
        table = _in_order(table)
        return cls(table.select(FACTS), _unit_vectors(table.column(column)))

    @classmethod
    def outline(cls, table: pa.Table) -> "Rows":
        """The same without vectors."""
        table = _in_order(table)
        return cls(table.select(FACTS), np.empty((len(table), 0), np.float32))

    def __len__(self) -> int:
        return int(self.facts.num_rows)

    @cached_property
    def first(self) -> Int[np.ndarray, " samples"]:
        """``(m + 1,)``: first row of every sample, and the number of rows."""
        if len(self) == 0:
            return np.zeros(1, np.int64)
        changes = np.zeros(len(self) - 1, bool)
        for name in SAMPLE:
            codes = self.facts.column(name).combine_chunks().dictionary_encode(null_encoding="encode").indices
            changes |= np.diff(codes.to_numpy()) != 0
        return np.concatenate([[0], np.flatnonzero(changes) + 1, [len(self)]]).astype(np.int64)

    def runs(self, count: int) -> "Rows":
        """Means of so many consecutive windows, as longer windows; of all windows of a sample that has fewer."""
        if count == 1 or len(self) == 0:
            return self
        ends = np.repeat(self.first[1:], np.diff(self.first))  # of the sample of each row
        begins = np.repeat(self.first[:-1], np.diff(self.first))
        rows = np.arange(len(self))
        starts = rows[(rows + count <= ends) | (rows == begins)]
        lasts = np.minimum(starts + count, ends[starts]) - 1
        sums = self.vectors[starts]
        for step in range(1, count):
            inside = starts + step <= lasts
            sums[inside] += self.vectors[starts[inside] + step]
        sums /= np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
        facts = self.facts.take(pa.array(starts))
        place = facts.column_names.index("end_seconds")
        facts = facts.set_column(place, "end_seconds", pa.array(self.seconds("end_seconds")[lasts]))
        return Rows(facts, sums)

    def seconds(self, name: str) -> Float[np.ndarray, " rows"]:
        """A column of seconds."""
        return np.asarray(self.facts.column(name).to_numpy())


class WindowTable:
    """The table of an index, for reading.

    Parameters
    ----------
    address
        Folder or URL of the index.

    Attributes
    ----------
    store
        Its folder.

    Raises
    ------
    SearchError
        There is no index, or it cannot be opened, or the extra ``search`` is not installed.
    """

    def __init__(self, address: str | Path) -> None:
        self.store = Store(address)
        self._connection = connect(address)
        self._open()

    def _open(self) -> None:
        description = Description.read(self.store)
        if description is None:
            raise SearchError(
                f"index {self.store.root}: no index there; make one with cmacc embed ENCODER VIDEOS --out"
            )
        self.description = description
        try:
            self._table: LanceTable = self._connection.open_table(WINDOWS)  # type: ignore[assignment]
        except ValueError as error:
            raise SearchError(f"index {self.store.root}: it has no videos yet; run cmacc embed again") from error
        self._count = int(self._table.count_rows())

    def __len__(self) -> int:
        return self._count  # counting takes a millisecond, as long as a search

    @property
    def version(self) -> int:
        """Version of the table that is read; it grows with every change."""
        return int(self._table.version)

    def refresh(self) -> bool:
        """Go on to the latest version; whether there is a newer one, or another index in the same place."""
        before, made = self.version, self.description.made
        latest = Description.read(self.store)
        if latest is None or latest.made != made:
            self._open()
        else:
            self._retried(lambda table: table.checkout_latest())  # type: ignore[no-untyped-call]
            self.description = latest
            self._count = int(self._table.count_rows())
        return (self.version, self.description.made) != (before, made)

    def columns(self, *names: str, where: str | None = None) -> pa.Table:
        """Columns of all rows, or of those for which a condition in SQL holds.

        Raises
        ------
        SearchError
            The condition is not valid.
        """

        def read(table: "LanceTable") -> pa.Table:
            query = table.search().select(list(names))
            return (query if where is None else query.where(where)).to_arrow()

        return self._asked(read, where)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows with all columns, some at a time."""
        yield from self._table.search().to_batches(_ROWS_AT_ONCE)

    def parts(self, modality: Modality, *, where: str | None = None, space: Space = "shared") -> Iterator[Rows]:
        """The same as `rows`, some at a time.

        Raises
        ------
        SearchError
            A writer has changed the index meanwhile.
        """
        column = vector_column(modality, space)
        query = self._table.search().select([*FACTS, column])
        try:
            for batch in query.where(both_conditions(f"modality = '{modality}'", where)).to_batches(_ROWS_AT_ONCE):
                yield Rows.of(pa.Table.from_batches([batch]), column)
        except RuntimeError as error:
            raise SearchError(f"index {self.store.root}: it has changed while it was read; search again") from error

    def rows(self, modality: Modality, *, where: str | None = None, space: Space = "shared") -> Rows:
        """The windows of one modality with their vectors, all of them or those for which a condition in SQL holds.

        Raises
        ------
        SearchError
            The condition is not valid.
        """
        column = vector_column(modality, space)
        table = self.columns(*FACTS, column, where=both_conditions(f"modality = '{modality}'", where))
        return Rows.of(table, column)

    def nearest(
        self,
        vector: Float[np.ndarray, " dim"],
        modality: Modality,
        count: int,
        *,
        where: str | None = None,
        space: Space = "shared",
        probes: int | None = None,
    ) -> pa.Table:
        """The rows of a modality nearest to a vector, by LanceDB: `FACTS` and ``score``, best first.

        Parameters
        ----------
        vector
            Of unit length.
        modality, where, space
            As in `rows`.
        count
            Number of rows.
        probes
            Number of partitions that are looked into. Default: as many as were found to be enough when the approximate
            index was built; without one, all rows are compared.
        """
        near = self.description.approximate
        if probes is None and near is not None:
            probes = near.probes

        def read(table: "LanceTable") -> pa.Table:
            query = table.search(vector.astype(np.float32), vector_column_name=vector_column(modality, space))
            query = query.distance_type("dot").select([*FACTS, "_distance"]).limit(count)
            query = query.where(both_conditions(f"modality = '{modality}'", where), prefilter=True)
            if probes is not None:
                factor = max(_LEAST_REFINE_FACTOR, _REFINED // count)
                query = query.nprobes(probes).refine_factor(factor)
            return query.to_arrow()

        found = self._asked(read, where)
        scores = 1.0 - found.column("_distance").to_numpy()  # LanceDB's dot distance
        return found.drop_columns(["_distance"]).append_column("score", pa.array(scores))

    def _asked(self, read: "Callable[[LanceTable], pa.Table]", where: str | None) -> pa.Table:
        try:
            return self._retried(read)
        except (ValueError, RuntimeError) as error:
            reason = re.sub(r",? \S+\.rs:\d+:\d+", "", str(error).removeprefix("Invalid input, ").splitlines()[0])
            if "Not found" in reason:
                raise SearchError(
                    f"index {self.store.root}: a file of it is missing ({reason}); make it again with cmacc embed "
                    "--rebuild"
                ) from error
            if where is None:
                raise
            raise SearchError(f"index {self.store.root}: --where is not a valid condition: {reason}") from error

    def _retried(self, read: "Callable[[LanceTable], _Result]") -> _Result:
        """The result, from a newer version of the table if the files of this one are gone."""
        for left in reversed(range(_MOST_TRIES)):
            try:
                return read(self._table)
            except (RuntimeError, OSError) as error:
                if "Not found" not in str(error) or left == 0:
                    raise
                self._open()
        raise AssertionError("unreachable")


def connect(address: str | Path) -> "DBConnection":
    """LanceDB's connection to a folder or URL.

    Raises
    ------
    SearchError
        The extra ``search`` is not installed.
    """
    try:
        import lancedb  # takes a second
    except ImportError as error:
        raise SearchError("search needs the extra `search`: pip install 'cmacc[search]'") from error
    return lancedb.connect(str(address))


def vector_column(modality: Modality, space: Space = "shared") -> str:
    """Name of the column with the vectors of a modality in a space."""
    return "vector" if space == "shared" else f"text_{modality}"


def sql_text(text: str) -> str:
    """A string as a literal in a condition."""
    return "'" + text.replace("'", "''") + "'"


def among(paths: Sequence[str]) -> str:
    """Condition for the rows of these paths."""
    return f"path IN ({', '.join(map(sql_text, paths))})"


def among_stretches(stretches: Sequence[tuple[str, str | None, float, float]]) -> str:
    """Condition for windows by path, key, and the first and last of their starts in seconds."""
    if not stretches:
        return "false"
    # The paths once more: only for them is there an index.
    each = (
        f"(path = {sql_text(path)} AND {'key IS NULL' if key is None else f'key = {sql_text(key)}'} AND "
        f"start_seconds >= {first!r} AND start_seconds <= {last!r})"
        for path, key, first, last in stretches
    )
    return f"{among(list(dict.fromkeys(path for path, *_ in stretches)))} AND ({' OR '.join(each)})"


def both_conditions(first: str, second: str | None) -> str:
    """Condition that both hold; the second may be missing."""
    return first if second is None else f"({first}) AND ({second})"


def raw_vectors(column: pa.ChunkedArray | pa.Array) -> NDArray[np.float32]:
    """Vectors of a column as they are stored, ``(n, d)``."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return np.asarray(array.flatten().to_numpy().astype(np.float32).reshape(-1, column.type.list_size))


def _in_order(table: pa.Table) -> pa.Table:
    """By sample and time."""
    return table.combine_chunks().sort_by([(name, "ascending") for name in (*SAMPLE, "start_seconds")])


def _unit_vectors(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """The same with unit length, which float16 has rounded."""
    rows = raw_vectors(column)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), np.float32)
