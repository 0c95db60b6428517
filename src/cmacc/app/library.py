"""The files that the page may show. A browser names a file by an id, never by a path.

A file gets its id when the page shows it. Whether it lies in one of the folders is checked when it is read, with links
resolved: what is a link now may have been a file when it was indexed. Only the resolved path is opened then.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cmacc.clips import MediaError, PackedSample
from cmacc.clips.storage import Extent, Store

# About 100 MB of paths. The ids that were shown longest ago are forgotten first.
_MOST_IDS = 300_000
_PLACES = ("path", "key", "video_offset", "video_size", "audio_offset", "audio_size")


class Member(NamedTuple):
    """A packed sample as an index knows it: by its shard and its key."""

    shard: str
    key: str


Source = Path | PackedSample | Member


class Library:
    """Files in some folders, by id. Safe to use from several threads.

    Parameters
    ----------
    roots
        Folders whose files may be shown, those in subfolders included. URLs (of folders with packed shards) too.
    """

    def __init__(self, roots: Iterable[Path | str]) -> None:
        self._folders: set[Path] = set()
        self._addresses: list[str] = []
        for root in roots:
            if "://" in str(root):
                self._addresses.append(f"{str(root).rstrip('/')}/")
            else:
                self._folders.add(Path(root).resolve())
        self._sources: OrderedDict[str, Source] = OrderedDict()
        self._lock = threading.Lock()

    def id_of(self, source: Source) -> str:
        """The id of a file or packed sample; the same for the same one."""
        name = hashlib.sha256(repr(source).encode()).hexdigest()[:24]
        with self._lock:
            self._sources[name] = source
            self._sources.move_to_end(name)
            while len(self._sources) > _MOST_IDS:
                self._sources.popitem(last=False)
        return name

    def id_of_row(self, path: str, key: str | None) -> str:
        """The same by a path (absolute, or a URL) and the key of a packed sample, as the rows of an index have them."""
        return self.id_of(Path(path) if key is None else Member(path, key))

    def named(self, name: str) -> Source:
        """What an id stands for, whether or not the file is there.

        Raises
        ------
        KeyError
            No file has this id.
        """
        with self._lock:
            return self._sources[name]

    def source(self, name: str) -> Path | PackedSample:
        """The file of an id with links resolved, or the packed sample.

        Raises
        ------
        KeyError
            No file has this id.
        MediaError
            The file is gone, or lies outside of the folders; or it is packed, and its pack has no index.
        """
        source = self.named(name)
        if isinstance(source, Path):
            return Path(self._allowed(str(source)))
        shard = self._allowed(source.shard)
        if isinstance(source, Member):
            return _packed(shard, source.key)
        return PackedSample(shard, source.video, source.audio)

    def _allowed(self, path: str) -> str:
        name = path.rsplit("/", 1)[-1]
        if "://" in path:
            if ".." in path.split("/") or not any(path.startswith(address) for address in self._addresses):
                raise MediaError(f"{name}: must lie under the root of the index, got another URL")
            return path
        real = Path(path).resolve()
        if self._folders.isdisjoint(real.parents):
            raise MediaError(f"{name}: must lie in an indexed folder, got a file or a link outside of it")
        if not real.is_file():
            raise MediaError(f"{name}: there is no such file any more")
        return str(real)


def _packed(shard: str, key: str) -> PackedSample:
    places = _places(shard)
    if key not in places:
        raise MediaError(f"{key}: must be in the index of its pack, got no such sample there")
    return places[key]


@lru_cache(maxsize=64)
def _places(shard: str) -> dict[str, PackedSample]:
    """The places of all samples of a shard, by key, from the index beside it."""
    folder, _, name = shard.rpartition("/")
    try:
        with Store(folder).open("index.parquet") as file:
            table = pq.read_table(pa.BufferReader(file.read()), columns=list(_PLACES))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise MediaError(f"{name}: its pack must have an index.parquet beside it ({type(error).__name__})") from error

    def extent(row: dict[str, int | None], kind: str) -> Extent | None:
        offset, size = row[f"{kind}_offset"], row[f"{kind}_size"]
        return None if offset is None or size is None else Extent(offset, size)

    rows = (row for row in table.to_pylist() if row["path"].rsplit("/", 1)[-1] == name)
    return {row["key"]: PackedSample(shard, extent(row, "video"), extent(row, "audio")) for row in rows}
