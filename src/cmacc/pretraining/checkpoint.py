"""Checkpoints: everything that the next step depends on, in safetensors and JSON, written atomically.

A checkpoint is a folder ``checkpoints/step-00000100/`` with ``model.safetensors`` (query encoders, key encoders,
dictionaries and pools), ``optimizer.safetensors``, and ``state.json``. Of a frozen backbone it holds a hash only. It is
written under a temporary name and renamed when everything is on disk, so a folder of that name is complete. Older
checkpoints are deleted only after that. The order of the files, windows, augmentation and selection need no state: they
are functions of the seed and the step.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cmacc.clips.storage import fsync_path, fsync_tree
from cmacc.encoders import MODALITIES, AudioVisualEncoder, Encoder, release
from cmacc.pretraining.config import PretrainConfig
from cmacc.pretraining.learner import Learner, untrained_encoder
from cmacc.pretraining.provenance import Provenance
from cmacc.pretraining.step import DivergenceError

_FORMAT = 3
# Parts of tensor names in cmacc 0.1.0, whose checkpoints are read for one more version, and their current names.
_FORMER_NAMES = (("twin.", "key_encoder."), (".tickets", ".handles"))


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of other encoders; the message names the file and the tensor."""


def save_checkpoint(
    learner: Learner, run_dir: Path, step: int, keep_every: int, provenance: Provenance | None = None
) -> Path:
    """Save the state before step ``step``, and remove older checkpoints unless ``keep_every`` keeps them.

    Returns
    -------
    Path
        The checkpoint's folder.

    Raises
    ------
    DivergenceError
        A weight is not finite: the last step diverged. Nothing is saved, so that the previous checkpoint remains.
    """
    if not all(bool(value.isfinite().all()) for value in learner.encoder.state_dict().values()):
        raise DivergenceError("a weight is not finite (NaN or infinity), and is not saved", step - 1)
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    optimizer_tensors, optimizer_rest = _split_optimizer(learner.optimizer.state_dict())
    model_tensors = {
        f"{name}.{key}": value.detach().contiguous()
        for name, module in learner.modules().items()
        for key, value in _kept_state(module).items()
    }
    random_state = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        random_state["random.cuda"] = torch.cuda.get_rng_state()
    state = {
        "format": _FORMAT,
        "step": step,
        "optimizer": optimizer_rest,
        "provenance": None if provenance is None else dataclasses.asdict(provenance),
        "frozen": _frozen(learner.encoder),
    }
    save_file(model_tensors, aside / "model.safetensors")
    save_file({**optimizer_tensors, **random_state}, aside / "optimizer.safetensors")
    (aside / "state.json").write_text(json.dumps(state))
    fsync_tree(aside)
    if folder.exists():  # the same step is saved twice if the run is stopped right after a regular save
        shutil.rmtree(folder)
    os.replace(aside, folder)
    fsync_path(folder.parent)  # the name too, before older checkpoints are deleted
    for older in checkpoint_folders(run_dir)[:-1]:
        kept = keep_every > 0 and _step_of(older) % keep_every == 0
        if not kept:
            shutil.rmtree(older)
    return folder


def load_checkpoint(learner: Learner, folder: Path, provenance: Provenance | None = None) -> int:
    """Restore a learner in place.

    Parameters
    ----------
    learner
        A learner with the same settings.
    folder
        The checkpoint.
    provenance
        Provenance of the resumed run; checkpoints of other runs are refused.

    Returns
    -------
    int
        The step to continue with.

    Raises
    ------
    CheckpointError
        The folder is not a checkpoint of such a learner, or is of another run.
    """
    state = _read_state(folder)
    saved_by = (state.get("provenance") or {}).get("run_id")
    if provenance is not None and saved_by and saved_by != provenance.run_id:
        raise CheckpointError(f"checkpoint {folder}: must be of run {provenance.run_id}, got one of run {saved_by}")
    _check_frozen(learner.encoder, state, folder)
    tensors = _read_tensors(folder / "model.safetensors")
    for name, module in learner.modules().items():
        _load_module(module, name, tensors, folder)
    saved = _read_tensors(folder / "optimizer.safetensors")
    torch.set_rng_state(saved.pop("random.cpu"))
    cuda_state = saved.pop("random.cuda", None)
    if cuda_state is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(cuda_state)
    learner.optimizer.load_state_dict(_join_optimizer(saved, state["optimizer"]))
    return int(state["step"])


def load_encoder(encoder: nn.Module, folder: Path) -> int:
    """Restore only the query encoders, and return the step of the checkpoint.

    Raises
    ------
    CheckpointError
        The folder is not a checkpoint of such encoders.
    """
    state = _read_state(folder)
    _check_frozen(encoder, state, folder)
    _load_module(encoder, "encoder", _read_tensors(folder / "model.safetensors"), folder)
    return int(state["step"])


def trained_encoder(run_dir: Path, config: PretrainConfig) -> tuple[AudioVisualEncoder, int]:
    """The query encoders of a run's last checkpoint, as after `release`, and the number of steps they were trained for.

    Raises
    ------
    CheckpointError
        There is no checkpoint, or it is not one of such encoders.
    TowerError
        A tower cannot be opened.
    """
    # The weights of other towers are in the checkpoint, and their files may be gone.
    pair = untrained_encoder(config, weights_of=[m for m in MODALITIES if getattr(config.train, m) == "head"])
    step = load_encoder(pair, last_checkpoint(run_dir))
    release(pair)
    return pair, step


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """All complete checkpoints of a run, sorted by step."""
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


def _load_module(module: nn.Module, name: str, tensors: dict[str, Tensor], folder: Path) -> None:
    own = _kept_state(module)
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
    module.load_state_dict(saved, strict=False)  # all but frozen backbones; compared above


def _kept_state(module: nn.Module) -> dict[str, Tensor]:
    """The state without frozen backbones."""
    frozen = tuple(
        f"{path}.{name}." if path else f"{name}."
        for path, part in module.named_modules()
        if isinstance(part, Encoder) and part.frozen_digest
        for name, inner in part.named_modules()
        if inner is part.network
    )
    return {key: value for key, value in module.state_dict().items() if not key.startswith(frozen)}


def _frozen(module: nn.Module) -> dict[str, str]:
    """Hashes of the frozen backbones, by the names of their encoders."""
    return {
        path: part.frozen_digest
        for path, part in module.named_modules()
        if isinstance(part, Encoder) and part.frozen_digest
    }


def _check_frozen(module: nn.Module, state: dict[str, Any], folder: Path) -> None:
    for name, digest in _frozen(module).items():
        saved = state.get("frozen", {}).get(name)
        if saved != digest:
            raise CheckpointError(
                f"checkpoint {folder}: the frozen {name} encoder must have weights with hash {saved}, with which the "
                f"run was trained, got {digest}; restore its files"
            )


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"checkpoint {folder}: state.json cannot be read ({error})") from error
    if state.get("format") not in (2, _FORMAT):
        raise CheckpointError(f"checkpoint {folder}: format must be {_FORMAT}, got {state.get('format')}")
    return state


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error})") from error
    return {_present_name(name): value for name, value in tensors.items()}


def _present_name(name: str) -> str:
    for former, present in _FORMER_NAMES:
        name = name.replace(former, present)
    return name


def _split_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, named ``state.<parameter>.<name>``, and the parameter groups, which fit into JSON."""
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
