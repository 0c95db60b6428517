"""What the page shows: an index, a run, or an index with the run that made it."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cmacc.app.library import Library
from cmacc.app.queries import LONGEST_QUERY_SECONDS
from cmacc.clips import Manifest, ManifestError
from cmacc.pretraining import ConfigError, read_config
from cmacc.search import Index, SearchError


class AppError(ValueError):
    """A page that cannot be opened; the message says why."""


@dataclass(frozen=True)
class Opened:
    """What was opened.

    Attributes
    ----------
    name
        Name for the title of the page.
    library
        The files that may be shown.
    index
        The index to search in; None if a run was opened.
    run_dir
        Run folder: the one that was opened, or the one whose encoder made the index; None if there is none.
    longest_query_seconds
        Longest upload to search with.
    """

    name: str
    library: Library
    index: Index | None
    run_dir: Path | None
    longest_query_seconds: float = LONGEST_QUERY_SECONDS


def open_target(address: str, *, encoder: str | None = None, download: bool = False) -> Opened:
    """Open an index (folder or URL) or a run folder.

    Parameters
    ----------
    address
        Folder of the index or the run, or URL of an index.
    encoder
        Where the encoder of the index is, if not where the index says.
    download
        Whether the encoder may be downloaded.

    Raises
    ------
    AppError
        It is neither, or cannot be opened.
    """
    folder = Path(address)
    if "://" in address or (folder / "description.json").exists():
        return _open_index(address, encoder, download)
    if (folder / "config.yaml").exists():
        if encoder is not None:
            raise AppError(f"app {address}: --encoder is for an index, got a run folder")
        return _open_run(folder)
    got = "a file" if folder.is_file() else "a folder that is neither" if folder.is_dir() else "nothing there"
    raise AppError(
        f"app {address}: must be an index (cmacc embed ENCODER VIDEOS --out INDEX) or a run folder "
        f"(cmacc pretrain --out RUN), got {got}"
    )


def _open_index(address: str, encoder: str | None, download: bool) -> Opened:
    try:
        index = Index.open(address, encoder=encoder, download=download)
    except (SearchError, ValueError, OSError) as error:
        raise AppError(f"app {address}: {error}") from error
    description = index.table.description
    made_by = Path(encoder or description.encoder)
    run_dir = made_by.parent.parent if made_by.parent.name == "checkpoints" else made_by
    # An export has no metrics.
    has_run = (run_dir / "config.yaml").is_file() and (run_dir / "metrics.jsonl").is_file()
    name = address.rstrip("/").rsplit("/", 1)[-1]
    return Opened(name, Library([description.root]), index, run_dir if has_run else None)


def _open_run(folder: Path) -> Opened:
    try:
        config = read_config(folder / "config.yaml")
    except ConfigError as error:
        raise AppError(f"app {folder}: {error}") from error
    # Without the manifest, or the files of it, curves can still be shown.
    paths: Iterable[str] = ()
    if config.data.manifest is not None:
        with suppress(ManifestError):
            paths = Manifest.read(config.data.manifest).column("path")
    return Opened(folder.resolve().name, Library(_folders(paths)), None, folder)


def _folders(paths: Iterable[str]) -> set[str]:
    """The folders that hold files of a manifest: their common root may be the whole disk."""
    return {path.rpartition("/")[0] for path in paths}
