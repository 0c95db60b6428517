"""Checkpoints: everything that shapes the next step, in safetensors and JSON, written aside and renamed.

A checkpoint is a folder ``checkpoints/step-00000100/`` with ``model.safetensors`` (encoders, momentum copies,
dictionaries and pools), ``optimizer.safetensors``, and ``state.json``. Folders appear by one rename, so what has the
name is whole. The order of the files, windows, augmentation and selection need no state: they are functions of the seed
and the step.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cmacc.pretraining.learner import Learner

_FORMAT = 2


class CheckpointError(ValueError):
    """A checkpoint that is missing, broken, or of other encoders; the message names the file and the tensor."""


def save_checkpoint(learner: Learner, run_dir: Path, step: int, keep_every: int) -> Path:
    """Save the state before step ``step`` and remove older checkpoints that are not to be kept.

    Returns
    -------
    Path
        The checkpoint's folder.
    """
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    optimizer_tensors, optimizer_rest = _split_optimizer(learner.optimizer.state_dict())
    model_tensors = {
        f"{name}.{key}": value.detach().contiguous()
        for name, module in _modules(learner).items()
        for key, value in module.state_dict().items()
    }
    random_state = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        random_state["random.cuda"] = torch.cuda.get_rng_state()
    save_file(model_tensors, aside / "model.safetensors")
    save_file({**optimizer_tensors, **random_state}, aside / "optimizer.safetensors")
    (aside / "state.json").write_text(json.dumps({"format": _FORMAT, "step": step, "optimizer": optimizer_rest}))
    if folder.exists():  # the same step saved twice: a stop right after a regular save
        shutil.rmtree(folder)
    os.replace(aside, folder)
    for older in checkpoint_folders(run_dir)[:-1]:
        kept = keep_every > 0 and _step_of(older) % keep_every == 0
        if not kept:
            shutil.rmtree(older)
    return folder


def load_checkpoint(learner: Learner, folder: Path) -> int:
    """Restore a learner in place.

    Returns
    -------
    int
        The step to go on with.

    Raises
    ------
    CheckpointError
        The folder is not a checkpoint of such a learner.
    """
    state = _read_state(folder)
    tensors = _read_tensors(folder / "model.safetensors")
    for name, module in _modules(learner).items():
        _load_module(module, name, tensors, folder)
    saved = _read_tensors(folder / "optimizer.safetensors")
    torch.set_rng_state(saved.pop("random.cpu"))
    cuda_state = saved.pop("random.cuda", None)
    if cuda_state is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(cuda_state)
    learner.optimizer.load_state_dict(_join_optimizer(saved, state["optimizer"]))
    return int(state["step"])


def load_encoder(encoder: nn.Module, folder: Path) -> int:
    """Restore only the online encoders, and return the step that they are from.

    Raises
    ------
    CheckpointError
        The folder is not a checkpoint of such encoders.
    """
    state = _read_state(folder)
    _load_module(encoder, "encoder", _read_tensors(folder / "model.safetensors"), folder)
    return int(state["step"])


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """All whole checkpoints of a run, oldest step first."""
    return sorted((run_dir / "checkpoints").glob("step-*"), key=_step_of)


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


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _modules(learner: Learner) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module | None] = {
        "encoder": learner.encoder,
        "twin": learner.twin,
        "video_dictionary": learner.video_dictionary,
        "audio_dictionary": learner.audio_dictionary,
    }
    return {name: module for name, module in modules.items() if module is not None}


def _load_module(module: nn.Module, name: str, tensors: dict[str, Tensor], folder: Path) -> None:
    own = module.state_dict()
    saved = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    for key in sorted(own.keys() | saved.keys()):
        if key not in saved:
            raise CheckpointError(f"checkpoint {folder}: {name}.{key} is missing")
        if key not in own:
            raise CheckpointError(f"checkpoint {folder}: {name}.{key} has no place in this configuration")
        if own[key].shape != saved[key].shape:
            raise CheckpointError(
                f"checkpoint {folder}: {name}.{key} must have shape {tuple(own[key].shape)}, "
                f"got {tuple(saved[key].shape)}"
            )
    module.load_state_dict(saved)


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"checkpoint {folder}: state.json cannot be read ({error})") from error
    if state.get("format") != _FORMAT:
        raise CheckpointError(f"checkpoint {folder}: format must be {_FORMAT}, got {state.get('format')}")
    return state


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error})") from error


def _split_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by the name ``state.<parameter>.<name>``, and the parameter groups, which JSON can hold."""
    tensors = {
        f"state.{index}.{name}": value.detach().contiguous()
        for index, entries in state["state"].items()
        for name, value in entries.items()
    }
    return tensors, {"param_groups": state["param_groups"]}


def _join_optimizer(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        _, index, name = key.split(".", 2)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, **rest}
