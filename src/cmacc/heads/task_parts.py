"""What the tasks that train heads have in common: checks of options, and where the state of a training is kept."""

import contextlib
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from cmacc.pretraining.provenance import code_version
from cmacc.transfer.tasks import TaskError


def check_training(task: str, seeds: Sequence[int], epochs: int | None) -> None:
    """Check the seeds of the heads, and the number of epochs if one is given.

    Raises
    ------
    TaskError
        There is no seed, one is given twice or is negative, or there are fewer than 1 epochs.
    """
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise TaskError(f"task {task}: --seeds must be different numbers of at least 0, got {seeds}")
    if epochs is not None and epochs < 1:
        raise TaskError(f"task {task}: --epochs must be at least 1, got {epochs}")


def state_folder(out: Path, identity: str) -> Path:
    """Folder in ``out`` for the states of the trainings on some data.

    Its name changes with ``identity`` (hashes of features and rows) and the code: the state of another evaluation must
    not go on as this one.
    """
    what = f"{identity} {code_version('heads', 'pretraining')}"
    return out / "heads" / hashlib.sha256(what.encode()).hexdigest()[:16]


def delete_states(folder: Path) -> None:
    """Delete the states in a folder of `state_folder`, and the folder around it once it is empty."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # another evaluation's state is in it
        folder.parent.rmdir()
