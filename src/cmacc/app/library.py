"""The files that the page may show. A browser names a file by an id, never by a path.

A file gets its id when the page shows it. Whether it lies under one of the roots is checked when it is read, with links
resolved: what is a link now may have been a file when it was indexed.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from cmacc.clips import MediaError, PackedSample


class Library:
    """Files under some roots, by id.

    Parameters
    ----------
    roots
        Folders whose files may be shown.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = [root.resolve() for root in roots]
        self._sources: dict[str, Path | PackedSample] = {}

    def id_of(self, source: Path | PackedSample) -> str:
        """The id of a file or packed sample; the same for the same one."""
        name = hashlib.sha256(repr(source).encode()).hexdigest()[:24]
        self._sources[name] = source
        return name

    def source(self, name: str) -> Path | PackedSample:
        """The file or packed sample of an id.

        Raises
        ------
        KeyError
            No file has this id.
        MediaError
            The file is gone, or lies outside of the roots.
        """
        source = self._sources[name]
        path = Path(source.shard if isinstance(source, PackedSample) else source)
        real = path.resolve()
        if not any(real.is_relative_to(root) for root in self._roots):
            raise MediaError(f"{path.name}: must lie in the indexed folder, got a link to a file outside of it")
        if not real.is_file():
            raise MediaError(f"{path.name}: there is no such file any more")
        return source
