"""Checkpoints on disk: complete and checked, or not there; which are kept; which one a path names.

A checkpoint is a folder ``checkpoints/step-00000100/`` of safetensors and a ``state.json`` with the SHA-256 of every
file and of its own content. It is written under a name that begins with a dot, and renamed when everything is on disk:

    .step-00000100.new      is being written
    .step-00000100.old      is being replaced by another one of the same step
    .step-00000100.gone     is being deleted
    damaged-step-00000100   could not be read when the run was resumed, which began at the one before
    best.json               the step of the best one, and what it reached

A run folder has one process that writes. What a killed one left is dealt with at the next start or saving.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmacc.clips.storage import fsync_path, fsync_tree, written_aside
from cmacc.pretraining.reading import dataclass_of

log = logging.getLogger("cmacc")

_FORMAT, _FORMATS = 4, (2, 3, 4)
_STATE, _BEST = "state.json", "best.json"
TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")
_NEWEST_KEPT = 2
_NAME = re.compile(r"step-(\d+)")
# Parts of tensor names in cmacc 0.1.0, whose checkpoints are read for one more version, and their current names.
_FORMER_NAMES = (("twin.", "key_encoder."), (".tickets", ".handles"))


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of other encoders, or not written; the message names file and tensor."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint with a file that is missing or not as it was written."""


@dataclass(frozen=True)
class _Best:
    step: int
    value: float
    metric: str


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """All complete checkpoints of a run, sorted by step."""
    folders = (run_dir / "checkpoints").glob("step-*")
    return sorted((folder for folder in folders if _NAME.fullmatch(folder.name)), key=step_of)


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def last_checkpoint(run_dir: Path) -> Path:
    """The newest checkpoint of a run.

    Raises
    ------
    CheckpointError
        There is none.
    """
    folders = checkpoint_folders(run_dir)
    if not folders:
        raise CheckpointError(f"run {run_dir}: no checkpoint in {run_dir / 'checkpoints'}")
    return folders[-1]


def best_checkpoint(run_dir: Path) -> Path:
    """The checkpoint that `mark_best` marked.

    Raises
    ------
    CheckpointError
        None is marked, or it is no longer there.
    """
    best = _read_best(run_dir)
    if best is None:
        raise CheckpointError(f"run {run_dir}: no checkpoint is marked as the best; a run with eval_every marks one")
    folder = _folder_of(run_dir, best.step)
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder}: marked as the best by {_BEST}, and not there")
    return folder


def mark_best(run_dir: Path, step: int, value: float, metric: str) -> bool:
    """Mark the checkpoint of ``step`` as the best if its value is above that of the marked one.

    The marked checkpoint is kept until another one is marked. A NaN is never the best.

    Parameters
    ----------
    run_dir
        Run folder.
    step
        Step of a saved checkpoint.
    value
        What it reached; higher is better.
    metric
        Name of the value. The value of another metric is not compared with it: the mark goes to the new checkpoint.

    Returns
    -------
    bool
        Whether it was marked.

    Raises
    ------
    CheckpointError
        There is no checkpoint of that step, or ``best.json`` cannot be read.
    """
    if not _folder_of(run_dir, step).is_dir():
        raise CheckpointError(f"checkpoint {_folder_of(run_dir, step)}: must be saved before it is marked as the best")
    best = _read_best(run_dir)
    if math.isnan(value) or (
        best is not None and best.metric == metric and best.value >= value and _folder_of(run_dir, best.step).is_dir()
    ):
        return False
    with written_aside(run_dir / "checkpoints" / _BEST) as aside:
        aside.write_text(json.dumps(dataclasses.asdict(_Best(step, float(value), metric))) + "\n")
    return True


def run_of(path: Path) -> Path:
    """The run folder of a path that names a run (``RUN``) or one of its checkpoints, see `checkpoint_at`."""
    return path.parent.parent if _names_checkpoint(path) else path


def checkpoint_at(path: Path) -> Path:
    """The checkpoint that a path names.

    Parameters
    ----------
    path
        ``RUN/checkpoints/step-00000100``; ``RUN/checkpoints/best``, the one that `mark_best` marked; or ``RUN``, its
        last one.

    Raises
    ------
    CheckpointError
        It is not there.
    """
    if not _names_checkpoint(path):
        return last_checkpoint(path)
    if path.name == "best":
        return best_checkpoint(run_of(path))
    if not path.is_dir():
        saved = ", ".join(folder.name for folder in checkpoint_folders(run_of(path))) or "none"
        raise CheckpointError(f"checkpoint {path}: must be among those of its run ({saved}), got nothing there")
    return path


def whole_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint that can be read, to resume from; None if the run has none at all.

    Damaged ones that are newer get other names (``damaged-step-...``), and a warning names what was wrong with them.
    Only for the process that writes the run folder, and before any other process reads it.

    Raises
    ------
    CheckpointError
        There are checkpoints, and none can be read.
    """
    clean_up(run_dir)
    damaged: dict[Path, DamagedCheckpointError] = {}
    for folder in reversed(checkpoint_folders(run_dir)):
        try:
            checked_state(folder, TENSOR_FILES)
        except DamagedCheckpointError as error:
            damaged[folder] = error
            continue
        for other, what in damaged.items():
            log.warning("%s; the folder is now called %s", what, _set_aside(other).name)
        if damaged:
            log.warning("going on from the checkpoint before, %s", folder.name)
        return folder
    if damaged:
        newest = next(iter(damaged.values()))
        raise CheckpointError(
            f"run {run_dir}: none of its {len(damaged)} checkpoints can be read, the newest because of: {newest}; "
            "restore one from a copy, or start the run again (--overwrite)"
        )
    return None


def write_folder(
    run_dir: Path, step: int, files: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any], keep_every: int
) -> Path:
    """Write a checkpoint, and then delete the older ones that are not kept.

    Kept are the newest two, the best, and those at multiples of ``keep_every`` (0: none of these).

    Raises
    ------
    CheckpointError
        It cannot be written, for example because the disk is full. Those before it are as they were.
    """
    folder = _folder_of(run_dir, step)
    aside, replaced = (folder.with_name(f".{folder.name}.{role}") for role in ("new", "old"))
    try:
        clean_up(run_dir)
        aside.mkdir(parents=True)
        for name, tensors in files.items():
            save_file(tensors, aside / name)
            (aside / name).chmod(0o644)  # safetensors makes files that only their owner can read
        digests = {name: _digest_of_file(aside / name) for name in files}
        whole = {"format": _FORMAT, "step": step, **state, "files": digests}
        (aside / _STATE).write_text(json.dumps(whole | {"digest": _digest_of(whole)}))
        fsync_tree(aside)
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(aside, folder)
        fsync_path(folder.parent)  # the name too, before older checkpoints are deleted
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            clean_up(run_dir)
        raise CheckpointError(f"checkpoint {folder}: cannot be written ({error}); earlier ones remain") from error
    try:
        clean_up(run_dir)  # the replaced one
        _delete_older(run_dir, keep_every)
    except (OSError, CheckpointError) as error:
        log.warning("older checkpoints of run %s are not deleted: %s", run_dir, error)
    return folder


def clean_up(run_dir: Path) -> None:
    """Finish what a killed process was doing to the run's checkpoints. Only for the process that writes them."""
    for path in (run_dir / "checkpoints").glob(".step-*"):
        name, _, role = path.name[1:].partition(".")
        if role == "old" and not path.with_name(name).exists():
            os.replace(path, path.with_name(name))
        else:
            shutil.rmtree(path)
    for path in (run_dir / "checkpoints").glob(f".{_BEST}.*"):
        path.unlink()


def checked_state(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """The content of ``state.json``, after a check of it and of the named files.

    Those of formats before 4 have no checksums: of these only what makes them unreadable is found.

    Raises
    ------
    DamagedCheckpointError
        A file is missing, or not as it was written.
    CheckpointError
        It has the format of another version.
    """
    state = _read_state(folder / _STATE)
    for name in names:
        path = folder / name
        try:
            if "files" not in state:
                with safe_open(path, "pt"):  # checks the size too
                    pass
            elif (found := _digest_of_file(path)) != state["files"][name]:
                raise DamagedCheckpointError(
                    f"checkpoint {path}: must have SHA-256 {state['files'][name]}, as when it was written, got {found} "
                    f"({path.stat().st_size} bytes)"
                )
        except (OSError, SafetensorError) as error:
            raise DamagedCheckpointError(f"checkpoint {path}: cannot be read ({error})") from error
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by their present names.

    Raises
    ------
    DamagedCheckpointError
        The file is missing or not as it was written.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpointError(f"checkpoint {path}: cannot be read ({error})") from error
    return {_present_name(name): value for name, value in tensors.items()}


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"checkpoint {path}: cannot be read ({error})") from error
    if not isinstance(state, dict):
        raise DamagedCheckpointError(f"checkpoint {path}: must hold an object, got {type(state).__name__}")
    digest = state.pop("digest", None)
    found = _digest_of(state)
    if (digest is not None or state.get("format") == _FORMAT) and digest != found:
        raise DamagedCheckpointError(
            f"checkpoint {path}: its content must have SHA-256 {digest}, as when it was written, got {found}"
        )
    if state.get("format") not in _FORMATS:
        raise CheckpointError(
            f"checkpoint {path.parent}: format must be {', '.join(map(str, _FORMATS[:-1]))} or {_FORMAT}, got "
            f"{state.get('format')}"
        )
    if type(state.get("step")) is not int:
        raise DamagedCheckpointError(f"checkpoint {path}: step must be an integer, got {state.get('step')}")
    return state


def _delete_older(run_dir: Path, keep_every: int) -> None:
    best = _read_best(run_dir)
    for folder in checkpoint_folders(run_dir)[:-_NEWEST_KEPT]:
        step = step_of(folder)
        if (keep_every > 0 and step % keep_every == 0) or (best is not None and step == best.step):
            continue
        # Under its own name, one that is half deleted would look complete.
        gone = folder.with_name(f".{folder.name}.gone")
        os.replace(folder, gone)
        shutil.rmtree(gone)


def _set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, and return its new path."""
    new = folder.with_name(f"damaged-{folder.name}")
    number = 1
    while new.exists():
        number += 1
        new = folder.with_name(f"damaged-{folder.name}-{number}")
    os.replace(folder, new)
    return new


def _read_best(run_dir: Path) -> _Best | None:
    path = run_dir / "checkpoints" / _BEST
    try:
        return dataclass_of(_Best, json.loads(path.read_bytes()), "")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); delete it, and no checkpoint is the best") from error


def _folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def _names_checkpoint(path: Path) -> bool:
    return path.parent.name == "checkpoints" and (path.name == "best" or _NAME.fullmatch(path.name) is not None)


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _present_name(name: str) -> str:
    for former, present in _FORMER_NAMES:
        name = name.replace(former, present)
    return name
