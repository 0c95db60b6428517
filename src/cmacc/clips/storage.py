"""Folders and object stores alike: packed data lies in a local folder or under any URL that fsspec opens."""

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
    """A sample inside a tar shard: where its picture (.mp4) and its sound (.flac) lie; None where it has none."""

    shard: str
    video: Extent | None
    audio: Extent | None


def read_extent(address: str, extent: Extent) -> bytes:
    """Read part of a file, local or at a URL.

    Raises
    ------
    MediaError
        It is missing, or ends before the part does.
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
    """A new file beside ``path`` that takes its place when the ``with`` ends well, and is gone if it does not.

    A reader never sees half a file, not even after a power cut: the content is on disk before the name is, and the name
    before the ``with`` ends. What a killed process leaves behind begins with a dot.
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
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Wait until all files of a folder, and its list of names, are on disk: before it is renamed into place."""
    for path in sorted(folder.rglob("*")):
        fsync_path(path)
    fsync_path(folder)


class Store:
    """A flat folder of whole files: a local one, or any URL that fsspec opens (``s3://``, ``memory://``...).

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
        """Names of the files, sorted; none where there is no such folder. Unfinished ones are skipped."""
        try:
            found = self._system.ls(self._path, detail=False)
        except FileNotFoundError:
            return []
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in found)
        return sorted(name for name in names if not name.startswith("."))

    def exists(self, name: str) -> bool:
        """Whether the file is there now, whatever was listed before."""
        self._system.invalidate_cache(self._path)
        return bool(self._system.exists(f"{self._path}/{name}"))

    def read(self, name: str) -> bytes:
        """The whole file.

        Raises
        ------
        FileNotFoundError
            It is not there.
        """
        return bytes(self._system.cat_file(f"{self._path}/{name}"))

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """The file, to read and to seek in."""
        with self._system.open(f"{self._path}/{name}", "rb") as file:
            yield file

    @contextmanager
    def new(self, name: str) -> Iterator[Path]:
        """A local file to write, which when the ``with`` ends well appears in its place, whole."""
        if self._is_local:
            with written_aside(Path(self.address(name))) as aside:
                yield aside
            return
        with tempfile.TemporaryDirectory() as folder:
            aside = Path(folder) / name
            yield aside
            self._system.put_file(str(aside), f"{self._path}/{name}")  # an object is seen when all of it is there

    def write(self, name: str, data: bytes) -> None:
        """Put a small file in its place, whole."""
        with self.new(name) as aside:
            aside.write_bytes(data)

    def delete(self, name: str) -> None:
        """Remove a file."""
        self._system.rm_file(f"{self._path}/{name}")
