"""Checkpoints: everything that the next step depends on, in safetensors and JSON.

``model.safetensors`` holds query encoders, key encoders, dictionaries and pools; ``optimizer.safetensors`` the state of
the optimizer and the random states of every process. Of a frozen backbone there is a hash only. The order of the files,
windows, augmentation and selection need no state: they are functions of the seed and the step. How the files are
written, checked and kept is in `cmacc.pretraining.checkpoint_files`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmacc.encoders import MODALITIES, AudioVisualEncoder, Encoder, release
from cmacc.pretraining.checkpoint_files import (
    TENSOR_FILES,
    CheckpointError,
    checked_state,
    checkpoint_at,
    read_tensors,
    write_folder,
)
from cmacc.pretraining.config import PretrainConfig
from cmacc.pretraining.learner import Learner, untrained_encoder
from cmacc.pretraining.provenance import Provenance
from cmacc.pretraining.step import DivergenceError

_MODEL, _OPTIMIZER = TENSOR_FILES


@dataclass(frozen=True)
class Loaded:
    """What a loaded checkpoint says: the ``step`` to continue with, and the number of ``processes`` that saved it."""

    step: int
    processes: int


def random_states(rank: int = 0) -> dict[str, Tensor]:
    """This process's random states, by their names in checkpoints: ``random.cpu.<rank>``, ``random.cuda.<rank>``."""
    states = {f"random.cpu.{rank}": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states[f"random.cuda.{rank}"] = torch.cuda.get_rng_state()
    return states


def save_checkpoint(
    learner: Learner,
    run_dir: Path,
    step: int,
    keep_every: int,
    provenance: Provenance | None = None,
    *,
    processes: int = 1,
    random: Mapping[str, Tensor] | None = None,
    gathered: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save the state before step ``step``, and then delete older checkpoints.

    Of several processes only the first one calls this.

    Parameters
    ----------
    learner
        What is saved.
    run_dir
        Run folder.
    step
        The next step.
    keep_every
        The newest two checkpoints, the best (`mark_best`) and those at multiples of ``keep_every`` are kept; with 0,
        the newest two and the best.
    provenance
        Provenance of the run.
    processes
        Number of processes of the run.
    random
        `random_states` of all processes. Default: those of this one, as rank 0.
    gathered
        Whole tensors that stand in for those of which the learner only holds a part, by their names in the checkpoint,
        such as ``audio_dictionary.pool.embedding``.

    Returns
    -------
    Path
        The checkpoint's folder.

    Raises
    ------
    DivergenceError
        A weight is not finite: the last step diverged. Nothing is saved, so that the previous checkpoint remains.
    CheckpointError
        It cannot be written, for example because the disk is full. The previous checkpoint remains.
    """
    if not all(bool(value.isfinite().all()) for value in learner.encoder.state_dict().values()):
        raise DivergenceError("a weight is not finite (NaN or infinity), and is not saved", step - 1)
    model_tensors = {
        f"{name}.{key}": value.detach().contiguous()
        for name, module in learner.modules().items()
        for key, value in _kept_state(module).items()
    }
    assert (gathered or {}).keys() <= model_tensors.keys(), "a resumed run would have no place for them"
    optimizer_tensors, optimizer_rest = _split_optimizer(learner.optimizer.state_dict())
    state = {
        "processes": processes,
        "optimizer": optimizer_rest,
        "scaler": learner.scaler.state_dict(),
        "skipped_in_a_row": learner.skipped_in_a_row,
        "provenance": None if provenance is None else dataclasses.asdict(provenance),
        "frozen": _frozen(learner.encoder),
    }
    files = {
        _MODEL: model_tensors | dict(gathered or {}),
        _OPTIMIZER: optimizer_tensors | dict(random_states() if random is None else random),
    }
    return write_folder(run_dir, step, files, state, keep_every)


def load_checkpoint(
    learner: Learner,
    folder: Path,
    provenance: Provenance | None = None,
    *,
    rank: int = 0,
    own_part: Callable[[str, Tensor], Tensor] = lambda name, whole: whole,
) -> Loaded:
    """Restore a learner in place, and this process's random states.

    Parameters
    ----------
    learner
        A learner with the same settings. If the checkpoint does not fit, it stays as it was.
    folder
        The checkpoint.
    provenance
        Provenance of the resumed run; checkpoints of other runs are refused.
    rank
        Rank of this process. If the checkpoint has no random states of that rank, the process keeps its own.
    own_part
        What this process holds of a tensor that was saved whole, see ``gathered`` of `save_checkpoint`: called with the
        name and the tensor. Default: all of it.

    Raises
    ------
    CheckpointError
        The folder is damaged, not a checkpoint of such a learner, or of another run.
    """
    state = checked_state(folder, TENSOR_FILES)
    saved_by = (state.get("provenance") or {}).get("run_id")
    if provenance is not None and saved_by and saved_by != provenance.run_id:
        raise CheckpointError(f"checkpoint {folder}: must be of run {provenance.run_id}, got one of run {saved_by}")
    _check_frozen(learner.encoder, state, folder)
    tensors = {name: own_part(name, whole) for name, whole in read_tensors(folder / _MODEL).items()}
    # Copies: the optimizer would keep these tensors, which lie in the file, and its space would stay in use when it is
    # deleted.
    saved = {name: value.clone() for name, value in read_tensors(folder / _OPTIMIZER).items()}
    random = {name: saved.pop(name) for name in list(saved) if name.startswith("random.")}
    optimizer_state = _join_optimizer(saved, state.get("optimizer"), folder)
    # Nothing is changed until everything fits.
    modules = learner.modules()
    for name, module in modules.items():
        _check_fit(_kept_state(module), name, tensors, folder)
    _check_optimizer(learner, optimizer_state, folder)
    own_random = _of_rank(random, rank, folder)
    for name, module in modules.items():
        _load(module, name, tensors)
    learner.optimizer.load_state_dict(optimizer_state)
    if learner.scaler.is_enabled() and state.get("scaler"):
        learner.scaler.load_state_dict(state["scaler"])
    learner.skipped_in_a_row = state.get("skipped_in_a_row", 0)
    if "cpu" in own_random:
        torch.set_rng_state(own_random["cpu"])
    if "cuda" in own_random:
        torch.cuda.set_rng_state(own_random["cuda"])
    return Loaded(state["step"], state.get("processes", 1))


def load_encoder(encoder: nn.Module, folder: Path) -> int:
    """Restore only the query encoders, and return the step of the checkpoint.

    Raises
    ------
    CheckpointError
        The folder is not a checkpoint of such encoders.
    """
    state = checked_state(folder, [_MODEL])
    _check_frozen(encoder, state, folder)
    tensors = read_tensors(folder / _MODEL)
    _check_fit(_kept_state(encoder), "encoder", tensors, folder)
    _load(encoder, "encoder", tensors)
    return int(state["step"])


def trained_encoder(run: Path, config: PretrainConfig) -> tuple[AudioVisualEncoder, int]:
    """The query encoders of a checkpoint, as after `release`, and the number of steps they were trained for.

    ``run`` is a run folder, for its last checkpoint, or another path of `checkpoint_at`; ``config`` is the run's.

    Raises
    ------
    CheckpointError
        There is no checkpoint, or it is not one of such encoders.
    TowerError
        A tower cannot be opened.
    """
    checkpoint = checkpoint_at(run)  # before towers are opened, which takes long
    # The weights of other towers are in the checkpoint, and their files may be gone.
    pair = untrained_encoder(config, weights_of=[m for m in MODALITIES if getattr(config.train, m) == "head"])
    step = load_encoder(pair, checkpoint)
    release(pair)
    return pair, step


def _check_fit(own: Mapping[str, Tensor], name: str, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse the first tensor, by name, that a module lacks, or has in another shape or type."""
    saved = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    for key in sorted(own.keys() | saved.keys()):
        if key not in saved:
            raise CheckpointError(f"checkpoint {folder}: {name}.{key} is missing, of shape {tuple(own[key].shape)}")
        if key not in own:
            raise CheckpointError(
                f"checkpoint {folder}: {name}.{key}, of shape {tuple(saved[key].shape)}, has no place in this "
                "configuration"
            )
        _check_leaf(f"{name}.{key}", own[key], saved[key], folder)


def _check_leaf(name: str, own: Tensor, saved: Tensor, folder: Path) -> None:
    for what, wanted, got in (("shape", tuple(own.shape), tuple(saved.shape)), ("type", own.dtype, saved.dtype)):
        if wanted != got:
            raise CheckpointError(f"checkpoint {folder}: {name} must have {what} {wanted}, got {got}")


def _load(module: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Load what `_check_fit` checked."""
    saved = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    module.load_state_dict(saved, strict=False)  # all but frozen backbones


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


def _split_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, named ``state.<parameter>.<name>``, and the parameter groups, which fit into JSON."""
    tensors = {
        f"state.{index}.{name}": value.detach().contiguous()
        for index, entries in state["state"].items()
        for name, value in entries.items()
    }
    return tensors, {"param_groups": state["param_groups"]}


def _join_optimizer(tensors: Mapping[str, Tensor], rest: Any, folder: Path) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    try:
        for key, value in tensors.items():
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
        return {"state": state, "param_groups": [dict(group) for group in rest["param_groups"]]}
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"checkpoint {folder}: the optimizer's state cannot be read ({error!r})") from error


def _check_optimizer(learner: Learner, saved: dict[str, Any], folder: Path) -> None:
    """Refuse the state of an optimizer with other groups or parameters, for which torch's errors name no parameter."""
    own = learner.optimizer.state_dict()["param_groups"]
    groups = saved["param_groups"]
    if len(own) != len(groups):
        raise CheckpointError(
            f"checkpoint {folder}: the optimizer must have {len(own)} groups of parameters, got {len(groups)}"
        )
    for number, (group, other) in enumerate(zip(own, groups, strict=True)):
        if group["params"] != other.get("params"):
            raise CheckpointError(
                f"checkpoint {folder}: group {number} of the optimizer must have {len(group['params'])} parameters "
                f"({group['params']}), got {other.get('params')}"
            )
    names = {id(p): f"{name}.{key}" for name, m in learner.modules().items() for key, p in m.named_parameters()}
    parameters = [p for group in learner.optimizer.param_groups for p in group["params"]]
    kept = sorted({key for entries in saved["state"].values() for key in entries})  # AdamW: exp_avg, exp_avg_sq, step
    for index, entries in sorted(saved["state"].items()):
        if index >= len(parameters):
            raise CheckpointError(
                f"checkpoint {folder}: the optimizer must have {len(parameters)} parameters, got state of another, "
                f"number {index}"
            )
        parameter = parameters[index]
        for key in kept:
            name = f"{key} of {names[id(parameter)]}"
            if key not in entries:
                raise CheckpointError(f"checkpoint {folder}: {name} is missing from the optimizer's state")
            _check_leaf(name, torch.empty(()) if key == "step" else parameter, entries[key], folder)


def _of_rank(random: Mapping[str, Tensor], rank: int, folder: Path) -> dict[str, Tensor]:
    """The states ``cpu`` and ``cuda`` of a process, where the checkpoint has them and the process can take them."""
    own = {name.removesuffix(f".{rank}"): state for name, state in random_states(rank).items()}
    found = {}
    for name, state in own.items():
        # Before format 4 there was one process, and no rank in the names.
        saved = random.get(f"{name}.{rank}", random.get(name) if rank == 0 else None)
        if saved is not None:
            _check_leaf(name, state, saved, folder)
            found[name.removeprefix("random.")] = saved
    return found
