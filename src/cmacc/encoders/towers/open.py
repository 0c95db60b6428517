"""Open a tower by its name; everything here chooses by the prefix."""

from pathlib import Path
from typing import Literal

from cmacc.encoders.modality import Modality
from cmacc.encoders.towers.hf import download, hf_files, hf_modality, hf_tower
from cmacc.encoders.towers.onnx import onnx_files, onnx_tower
from cmacc.encoders.towers.python import python_tower
from cmacc.encoders.towers.timm import timm_tower
from cmacc.encoders.towers.torchvision import torchvision_tower
from cmacc.encoders.towers.tower import Tower, TowerError, VideoTower

_PREFIXES = ("torchvision:", "timm:", "hf:", "onnx:", "python:")


def is_tower(name: str) -> bool:
    """Whether a backbone's name is a tower's, by its prefix."""
    return name.startswith(_PREFIXES)


def tower_modality(name: str) -> Modality:
    """What a tower of torchvision, timm or transformers encodes by itself; PE-AV, which encodes both: ``video``.

    Raises
    ------
    TowerError
        A model of transformers is neither a folder nor cached.
    """
    return hf_modality(name) if name.startswith("hf:") else "video"


def open_tower(
    name: str,
    modality: Modality,
    *,
    frame_pooling: Literal["mean", "attention"] = "mean",
    with_weights: bool = True,
) -> Tower:
    """Open a tower, in training mode, on the CPU, in float32.

    Parameters
    ----------
    name
        One of

        - ``torchvision:NAME[=FILE]``: a video model as it is, or an image model over frames;
        - ``timm:NAME[=FILE]``: an image model over frames;
        - ``hf:FOLDER_OR_ID``: a model of transformers, from a folder or the local cache of the hub;
        - ``onnx:FILE``: a graph, which cannot be trained;
        - ``python:PACKAGE.MODULE:FUNCTION``: your own module (see `cmacc.encoders.towers.python`).

        FILE is a state dict, .safetensors, .pth or .bin; without it the model is untrained.
    modality
        What it encodes.
    frame_pooling
        How an image model's features of the frames become one: their ``mean``, or by learnt ``attention``.
    with_weights
        Whether to read weights; else only the architecture is built, because the weights come from a checkpoint. An
        ONNX graph and a Python module come with theirs in either case.

    Raises
    ------
    TowerError
        The name is unknown, does not fit the modality, its library is not installed, its files are missing, damaged or
        of another model, or attention is asked of a tower that takes whole clips.
    """
    tower = _open(name, modality, frame_pooling, with_weights)
    if modality == "video" and not (isinstance(tower, VideoTower) and tower.pooling) and frame_pooling != "mean":
        raise TowerError(
            f"tower {name}: frame pooling must be mean, because it takes whole clips, got {frame_pooling!r}"
        )
    return tower


def _open(name: str, modality: Modality, frame_pooling: Literal["mean", "attention"], with_weights: bool) -> Tower:
    if name.startswith("hf:"):
        return hf_tower(name, modality, frame_pooling=frame_pooling, with_weights=with_weights)
    if name.startswith("onnx:"):
        return onnx_tower(name, modality, frame_pooling=frame_pooling)
    if name.startswith("python:"):
        return python_tower(name, modality)
    if not is_tower(name):
        raise TowerError(f"tower {name}: must start with one of {', '.join(_PREFIXES)}")
    if modality != "video":
        raise TowerError(f"tower {name}: must encode {modality}, but the models of that library encode images")
    if name.startswith("timm:"):
        return timm_tower(name, frame_pooling=frame_pooling, with_weights=with_weights)
    return torchvision_tower(name, frame_pooling=frame_pooling, with_weights=with_weights)


def tower_files(name: str) -> list[Path]:
    """The local files that define a tower, for a fingerprint: weights, configs, the graph; empty if there are none.

    Raises
    ------
    TowerError
        A model of the hub is not in the local cache.
    """
    if name.startswith("hf:"):
        return hf_files(name)
    if name.startswith("onnx:"):
        return onnx_files(name)
    _, _, file = name.partition("=")
    return [Path(file)] if file and name.startswith(("torchvision:", "timm:")) else []


def absolute_tower(name: str) -> str:
    """The name with the absolute path of its file or folder, so that it means the same from everywhere."""
    kind, _, rest = name.partition(":")
    if kind in ("hf", "onnx"):
        return f"{kind}:{Path(rest).absolute()}" if Path(rest).exists() else name
    model, has_file, file = rest.partition("=")
    return f"{kind}:{model}={Path(file).absolute()}" if kind in ("torchvision", "timm") and has_file else name


def download_tower(name: str) -> None:
    """Fetch a model of the hub into the local cache: configs and safetensors, no code. Other towers need no download.

    Raises
    ------
    TowerError
        huggingface_hub is not installed, or the hub has no such model or does not answer.
    """
    if name.startswith("hf:"):
        download(name)
