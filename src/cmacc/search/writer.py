"""Write the table of an index: one writer at a time, whole samples in each commit, clean-up at the end.

LanceDB's commits are atomic, so readers never see half of one, and a killed writer leaves the last commit. Its traps:

* Concurrent writers fail with commit conflicts. A lock allows one writer (`writer_lock`).
* Every commit adds files, and compaction keeps the old ones beside the new: a table grows to several times its size.
  `WindowWriter.finish` compacts, and deletes old versions and what killed writers left. The lock makes that safe.
  A reader of a deleted version opens the latest one (`cmacc.search.table`).
"""

import dataclasses
import hashlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from cmacc.clips.progress import Progress, silent
from cmacc.clips.storage import Store
from cmacc.encoders import MODALITIES
from cmacc.pretraining.clip_encoder import Modality
from cmacc.search.table import (
    EXACT_ROWS,
    WINDOWS,
    Approximate,
    Description,
    SearchError,
    WindowTable,
    among,
    connect,
    raw_vectors,
    table_schema,
    vector_column,
)

if TYPE_CHECKING:
    from lancedb.table import LanceTable

_LEAST_RECALL = 0.95
_LEAST_PROBES = 10
_ROWS_OF_A_PARTITION = 4096
_TESTED_QUERIES = 100
_PATHS_AT_ONCE = 500
_ROWS_AT_ONCE = 10_000


@contextmanager
def writer_lock(address: str | Path, what: str = "writer") -> Iterator[None]:
    """The right to write, held by one process at a time; given back by the system if the process is killed.

    For an object store it holds on this machine only.

    Raises
    ------
    SearchError
        Another process holds it.
    """
    store = Store(address)
    if "://" in store.root:
        name = hashlib.sha256(f"{store.root} {what}".encode()).hexdigest()[:16]
        path = Path(tempfile.gettempdir()) / f"cmacc-{name}.lock"
    else:
        path = Path(store.root) / f".{what}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise SearchError(
            f"index {store.root}: one writer at a time, and another process is at work there (it holds {path}); wait "
            "for it, or stop it. Searching goes on meanwhile"
        ) from error
    try:
        yield
    finally:
        lock.release()


def discard(address: str | Path) -> None:
    """Delete the table, the description and the files of parts of an index. Hold the `writer_lock`."""
    connection, store = connect(address), Store(address)
    connection.drop_table(WINDOWS, ignore_missing=True)  # type: ignore[call-arg]  # not in the abstract class
    Description.delete(store)
    for name in part_names(store):
        store.delete(name)


def part_names(store: Store) -> list[str]:
    """Names of the files beside a table that hold parts of it."""
    return [name for name in store.names() if name.startswith("part-") and name.endswith(".parquet")]


class WindowWriter:
    """Adds and removes samples of an index. Hold the `writer_lock`.

    Parameters
    ----------
    address
        Folder or URL of the index.
    description
        What it is made of; written beside the table before its first row.
    """

    def __init__(self, address: str | Path, description: Description) -> None:
        self._address = address
        self._store = Store(address)
        self._description = description
        self._schema = table_schema(description)
        description.write(self._store)
        connection = connect(address)
        self._table: LanceTable = connection.create_table(  # type: ignore[assignment]
            WINDOWS, schema=self._schema, mode="create", exist_ok=True
        )
        self._first_version = int(self._table.version)

    def columns(self, *names: str) -> pa.Table:
        """Columns of all rows."""
        return self._table.search().select(list(names)).to_arrow()

    def add(self, rows: pa.Table) -> None:
        """Add whole samples in one commit."""
        self._table.add(rows.cast(self._schema))

    def rows_where(self, condition: str) -> pa.Table:
        """The rows for which a condition in SQL holds."""
        return self._table.search().where(condition).to_arrow()

    def remove(self, paths: Sequence[str]) -> None:
        """Remove all samples of these paths."""
        for begin in range(0, len(paths), _PATHS_AT_ONCE):
            self._table.delete(among(paths[begin : begin + _PATHS_AT_ONCE]))

    def finish(self, progress: Progress = silent) -> Description:
        """Compact the table, delete its old versions, and build what a large one needs; returns the new description."""
        rows, has_changed = len(self), int(self._table.version) != self._first_version
        self._table.optimize()
        if rows > EXACT_ROWS:
            self._index(rows, has_changed, progress)
        elif self._description.approximate is not None:
            for index in self._table.list_indices():
                self._table.drop_index(index.name)
            self._describe(None)
        # One millisecond, because lancedb warns of 0, which readers would not survive; ours do.
        time.sleep(0.01)
        self._table.optimize(cleanup_older_than=timedelta(milliseconds=1), delete_unverified=True)
        return self._description

    def _index(self, rows: int, has_changed: bool, progress: Progress) -> None:
        """Build the approximate index if there is none for so many rows, and find how many partitions queries need."""
        from lancedb.index import Bitmap, BTree, IvfRq, IvfSq

        former = self._description.approximate
        if former is not None and rows < 2 * former.rows:
            if has_changed:
                self._describe(self._measured(former.rows, progress))
            return
        columns = {"vector": self._description.size}
        columns |= {vector_column(m, "text"): size for m, size in self._description.text_sizes.items()}
        for done, (column, size) in enumerate(columns.items()):
            progress("index", done, len(columns) + 1)
            # RQ is the fastest here, and the smallest; it packs the bits of eight numbers into a byte.
            kind = IvfRq if size % 8 == 0 else IvfSq
            partitions = _partition_count(rows)
            self._table.create_index(column, config=kind(distance_type="dot", num_partitions=partitions))
        self._table.create_index("path", config=BTree())
        self._table.create_index("modality", config=Bitmap())
        progress("index", len(columns) + 1, len(columns) + 1)
        self._describe(self._measured(rows, progress))

    def _measured(self, built_rows: int, progress: Progress) -> Approximate:
        """The least number of partitions whose recall is high enough, by queries drawn from the table.

        Vectors of a modality are nearer to each other than to those of the other one, so a search in the other one
        comes to its partitions late. The recall is the least one of the four kinds of search, not their mean.
        """
        reader = WindowTable(self._address)
        ids = np.random.default_rng(0).choice(len(reader), min(len(reader), _TESTED_QUERIES), replace=False)
        drawn = self._table.take_offsets(sorted(ids.tolist())).select(["modality", "vector"]).to_arrow()
        queries = raw_vectors(drawn.column("vector"))
        of_modality = np.array(drawn.column("modality").to_pylist())
        least = self._tenth_scores(queries, progress)
        probes = _LEAST_PROBES
        while True:
            recalls = []
            for modality, tenths in least.items():
                found = [
                    (
                        reader.nearest(query, modality, 10, probes=probes).column("score").to_numpy() >= tenth - 1e-5
                    ).sum()
                    for query, tenth in zip(queries, tenths, strict=True)
                ]
                recalls += [np.mean(np.array(found)[of_modality == by]) / 10 for by in np.unique(of_modality)]
            if min(recalls) >= _LEAST_RECALL or probes >= _partition_count(built_rows):
                return Approximate(built_rows, probes, float(min(recalls)))
            probes *= 2

    def _tenth_scores(self, queries: NDArray[np.float32], progress: Progress) -> dict[Modality, NDArray[np.float32]]:
        """For each modality, the score of the tenth nearest row of every query, by a pass over all rows."""
        best = {modality: np.full((len(queries), 10), -np.inf, np.float32) for modality in MODALITIES}
        done = 0
        for batch in self._table.search().select(["modality", "vector"]).to_batches(_ROWS_AT_ONCE):
            vectors = raw_vectors(batch.column("vector"))
            for modality, kept in best.items():
                scores = queries @ vectors[np.asarray(batch.column("modality")) == modality].T
                kept[:] = np.sort(np.concatenate([kept, scores], axis=1), axis=1)[:, -10:]
            done += len(vectors)
            progress("recall", done, len(self))
        return {modality: kept[:, 0] for modality, kept in best.items() if np.isfinite(kept[:, 0]).all()}

    def _describe(self, approximate: Approximate | None) -> None:
        self._description = dataclasses.replace(self._description, approximate=approximate)
        self._description.write(self._store)

    def __len__(self) -> int:
        return int(self._table.count_rows())


def _partition_count(rows: int) -> int:
    return max(1, rows // _ROWS_OF_A_PARTITION)
