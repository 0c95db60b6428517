"""Lists of chosen samples, such as `cmacc select` writes: a manifest, or a text file with a path on each line."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cmacc.clips.catalog.listing import Listing, ListingError, normal, open_text, place_within
from cmacc.clips.catalog.manifest import Manifest


class ChosenSample(NamedTuple):
    """A sample of a list: its path, and, from a manifest, its key and start; None stands for all of the file."""

    path: str
    key: str | None = None
    start_seconds: float | None = None


def read_chosen(path: Path | str) -> list[ChosenSample]:
    """Read a list of samples.

    Parameters
    ----------
    path
        A manifest (.parquet or .csv), or a text file of any other name with a path on each line, absolute or relative
        to the folder that the list is used with. Empty lines are skipped.

    Raises
    ------
    ListingError, ManifestError
        The file is missing or invalid, or names nothing.
    """
    path = Path(path)
    if path.suffix in (".parquet", ".csv"):
        manifest = Manifest.read(path)
        columns = map(manifest.column, ("path", "key", "start_seconds"))
        chosen = [ChosenSample(*row) for row in zip(*columns, strict=True)]
    else:
        with open_text(f"list {path}", path) as file:
            chosen = [ChosenSample(line.strip()) for line in file if line.strip()]
    if not chosen:
        raise ListingError(f"list {path}: must name at least one sample, got none")
    return chosen


def keep_chosen(listing: Listing, chosen: Sequence[ChosenSample]) -> Listing:
    """The listing with only the chosen files and segments.

    Its ``missing`` and ``listed_count`` are those of the list, and files that are not in the list are not counted.
    """
    real_roots = {file.root: os.path.realpath(file.root) for file in listing.files}
    wanted: dict[str, list[ChosenSample]] = {}
    for one in chosen:
        if (place := place_within(one.path, list(real_roots.values()))) is not None:
            wanted.setdefault(place, []).append(one)
    files, found = [], set[ChosenSample]()
    for file in listing.files:
        within = file.path.relative_to(file.root).as_posix()
        names = wanted.get(normal(within), []) + wanted.get(normal(f"{real_roots[file.root]}/{within}"), [])
        matching = [one for one in names if one.start_seconds in (None, file.start_seconds)]
        if matching:
            files.append(file)
            found.update(matching)
    missing = tuple(one.path for one in chosen if one not in found)
    return dataclasses.replace(
        listing, files=tuple(files), missing=missing, missing_splits=(), unmatched_count=0, listed_count=len(chosen)
    )
