"""Names of encoders: a folder of this machine, or ``user/name`` on the Hugging Face hub.

Fetched files are treated like any others: `read_export` checks them, and nothing in them is executed.
"""

import re
from pathlib import Path

from cmacc.pretraining import run_of
from cmacc.transfer.export import LOADED_FILES, is_export
from cmacc.transfer.onnx import ExportError, from_extra

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def local_folder(name: Path | str, *, revision: str | None = None, download: bool = True) -> Path:
    """The folder that a name stands for, fetched from the hub if it is not one of this machine.

    Parameters
    ----------
    name
        A folder, or ``user/name`` on the hub. What exists here comes first. A `Path` is never looked up on the hub.
    revision
        Branch, tag or commit on the hub; by default, its main branch.
    download
        Whether files may be downloaded. Otherwise, and with ``HF_HUB_OFFLINE=1``, only the hub's cache is used.

    Returns
    -------
    Path
        ``name`` itself, also if nothing is there, or a folder in the hub's cache with an export without its graphs.

    Raises
    ------
    ExportError
        ``huggingface_hub`` is not installed, or there is no such repository or revision, or it cannot be reached, or it
        is not an export; or a revision of a local folder was asked for.
    """
    folder = Path(name)
    is_here = folder.exists() or run_of(folder) != folder  # checkpoints/best is no folder
    if isinstance(name, str) and not is_here and _HUB_NAME.fullmatch(name):
        return _fetched(name, revision, download)
    if revision is not None:
        raise ExportError(f"encoder {name}: revision must be None for a folder, got {revision!r}; only the hub has any")
    return folder


def _fetched(name: str, revision: str | None, download: bool) -> Path:
    try:
        hub, errors = from_extra("huggingface_hub"), from_extra("huggingface_hub.errors")
    except ExportError as error:
        raise ExportError(f"encoder {name}: no such folder, and to look for it on the hub, {error}") from error

    def snapshot(files: tuple[str, ...]) -> Path:
        return Path(
            hub.snapshot_download(name, revision=revision, allow_patterns=list(files), local_files_only=not download)
        )

    try:
        # First the description alone: another model's weights under the same file name may fill the disk.
        is_ours = is_export(snapshot(LOADED_FILES[:1]))
        folder = snapshot(LOADED_FILES) if is_ours else None
    except errors.RevisionNotFoundError as error:
        raise ExportError(f"encoder {name}: the hub has it, but no revision {revision!r} of it") from error
    except errors.RepositoryNotFoundError as error:
        raise ExportError(
            f"encoder {name}: must be a folder or a repository on the Hugging Face hub, got neither; a private or "
            "gated one needs an account with access (hf auth login)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        way_out = f" ({_one_line(error)})" if download else "; --download (download=True) looks for it on the hub"
        raise ExportError(
            f"encoder {name}: must be a folder or in the Hugging Face hub's cache, got neither{way_out}"
        ) from error
    except Exception as error:  # the network libraries below the hub's have errors of their own
        raise ExportError(f"encoder {name}: cannot be fetched ({type(error).__name__}: {_one_line(error)})") from error
    if folder is None:
        raise ExportError(f"encoder {name}: must be an export of cmacc, got another repository of the hub")
    return folder


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
