"""The files and labels of an index, for lists to choose from. Filters run here, because a page cannot hold 100,000."""

import threading

import pyarrow as pa
import pyarrow.compute as pc

from cmacc.app.queries import Picked
from cmacc.search import WindowTable


class IndexFiles:
    """The files of an index; read again when the index has changed."""

    def __init__(self, table: WindowTable) -> None:
        self._table = table
        self._lock = threading.Lock()
        self._version: object = None
        self._files: pa.Table = pa.table({"path": [], "key": [], "label": [], "name": []})

    def matching(self, text: str, count: int) -> tuple[list[Picked], int]:
        """The first files, by name, whose name contains a text in capitals or not; and how many there are."""
        files = self._read()
        if text:
            files = files.filter(pc.match_substring(files.column("name"), text, ignore_case=True))
        first = files.slice(0, count)
        paths, keys = first.column("path").to_pylist(), first.column("key").to_pylist()
        return [Picked(path, key) for path, key in zip(paths, keys, strict=True)], int(files.num_rows)

    def labels(self) -> list[str]:
        """All labels, sorted."""
        return sorted(label for label in pc.unique(self._read().column("label")).to_pylist() if label is not None)

    def _read(self) -> pa.Table:
        with self._lock:
            version = self._table.version, self._table.description.made
            if version != self._version:
                rows = self._table.columns("path", "key", "label")
                files = rows.group_by(["path", "key"]).aggregate([("label", "max")])
                files = files.rename_columns({"label_max": "label"})
                name = pc.coalesce(files.column("key"), files.column("path"))
                self._files = files.append_column("name", name).sort_by("name")
                self._version = version
            return self._files
