"""Storage of packed data in local folders and object stores: any URL that fsspec opens."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cmacc.clips.clip import MediaError


@dataclass(frozen=True)
class Extent:
    """The bytes ``[offset, offset + size)`` of a file."""

    offset: int
    size: int


@dataclass(frozen=True)
class PackedSample:
    """A sample inside a tar shard: the positions of its video (.mp4) and its audio (.flac); None if it has none."""

    shard: str
    video: Extent | None
    audio: Extent | None


def read_extent(address: str, extent: Extent) -> bytes:
    """Read part of a file, local or at a URL.

    Raises
    ------
    MediaError
        The file is missing or too short.
    """
    try:
        if "://" in address:
            system, path = fsspec.url_to_fs(address)
            data = bytes(system.cat_file(path, start=extent.offset, end=extent.offset + extent.size))
        else:
            with open(address, "rb") as file:
                data = os.pread(file.fileno(), extent.size, extent.offset)
    except (OSError, ValueError) as error:
        raise MediaError(f"{address}: cannot be read ({type(error).__name__}: {error})") from error
    if len(data) != extent.size:
        raise MediaError(
            f"{address}: must hold {extent.size} bytes at {extent.offset}, got {len(data)}: it was cut off"
        )
    return data


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that replaces it when the ``with`` block succeeds, and is deleted if it fails.

    A reader never sees a partial file, not even after a power failure: the content is on disk before the name, and the
    name before the ``with`` block ends. The name of a file left by a killed process begins with a dot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        aside.chmod(0o644)
        fsync_path(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def fsync_path(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Wait until all files of a folder, and its list of names, are on disk. Call it before renaming the folder."""
    for path in sorted(folder.rglob("*")):
        fsync_path(path)
    fsync_path(folder)


class Store:
    """A flat folder of files: a local one, or any URL that fsspec opens (``s3://``, ``memory://``...).

    Parameters
    ----------
    root
        Path or URL of the folder.

    Raises
    ------
    ValueError
        The URL's protocol is unknown, or needs a package that is not installed.
    """

    def __init__(self, root: str | Path) -> None:
        try:
            self._system, self._path = fsspec.url_to_fs(str(root))
        except ImportError as error:
            raise ValueError(f"{root}: its protocol needs another package ({error})") from error
        self._is_local = isinstance(self._system, LocalFileSystem)
        self.root = self._path if self._is_local else str(root).rstrip("/")

    def address(self, name: str) -> str:
        """Path or URL of a file."""
        return f"{self.root}/{name}"

    def names(self) -> list[str]:
        """Sorted names of the files; empty if there is no such folder. Unfinished files are skipped."""
        try:
            found = self._system.ls(self._path, detail=False)
        except FileNotFoundError:
            return []
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in found)
        return sorted(name for name in names if not name.startswith("."))

    def size_bytes(self) -> int:
        """Bytes of all files, those in subfolders included."""
        self._system.invalidate_cache(self._path)
        return int(self._system.du(self._path))

    def exists(self, name: str) -> bool:
        """Whether the file exists now, ignoring cached listings."""
        self._system.invalidate_cache(self._path)
        return bool(self._system.exists(f"{self._path}/{name}"))

    def read(self, name: str) -> bytes:
        """The whole file.

        Raises
        ------
        FileNotFoundError
            The file does not exist.
        """
        return bytes(self._system.cat_file(f"{self._path}/{name}"))

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Open the file for reading and seeking."""
        with self._system.open(f"{self._path}/{name}", "rb") as file:
            yield file

    @contextmanager
    def new(self, name: str) -> Iterator[Path]:
        """A local file to write, which appears atomically in its place when the ``with`` block succeeds."""
        if self._is_local:
            with written_aside(Path(self.address(name))) as aside:
                yield aside
            return
        with tempfile.TemporaryDirectory() as folder:
            aside = Path(folder) / name
            yield aside
            self._system.put_file(str(aside), f"{self._path}/{name}")  # an object becomes visible when it is complete

    def write(self, name: str, data: bytes) -> None:
        """Write a small file atomically."""
        with self.new(name) as aside:
            aside.write_bytes(data)

    def delete(self, name: str) -> None:
        """Remove a file."""
        self._system.rm_file(f"{self._path}/{name}")
