"""Towers in exports: from a config that names files of this machine to one that stands for itself, and back.

An export holds all weights in ``model.safetensors``, and beside them what is needed to build a tower without weights:
the configs of a model of transformers in ``video_tower/`` or ``audio_tower/``, a graph as ``video_tower.onnx`` or
``audio_tower.onnx``. The code of a ``python:`` tower is not part of an export.
"""

import dataclasses
import shutil
from pathlib import Path

from cmacc.encoders import MODALITIES, EncoderConfig
from cmacc.encoders.towers import tower_files

# Nothing else of a folder of transformers goes into an export: not weights, and no code.
_CONFIGS = ("config.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
TOWER_FILES = tuple(
    path for m in MODALITIES for path in (f"{m}_tower.onnx", *(f"{m}_tower/{name}" for name in _CONFIGS))
)


# The oldest versions that the towers were written for.
_REQUIRED = {
    "hf": {"transformers": ">=5"},
    "onnx": {"onnxruntime": ">=1.20"},
    "timm": {"timm": ">=1.0"},
    "torchvision": {"torchvision": ">=0.26"},
}


def required_packages(config: EncoderConfig) -> dict[str, str]:
    """The packages that the towers of a config need, and their oldest versions."""
    return {
        name: bound
        for modality in MODALITIES
        for name, bound in _REQUIRED.get(getattr(config, modality).partition(":")[0], {}).items()
    }


def write_towers(config: EncoderConfig, folder: Path) -> EncoderConfig:
    """Copy the files that build the towers into ``folder``, and name them relative to it."""
    video, audio = (_written(getattr(config, modality), f"{modality}_tower", folder) for modality in MODALITIES)
    return dataclasses.replace(config, video=video, audio=audio)


def with_own_towers(config: EncoderConfig, folder: Path) -> EncoderConfig:
    """The config of an export in ``folder``, with the paths of its towers.

    Raises
    ------
    ValueError
        The config names a file outside of the export.
    """
    video, audio = (_located(getattr(config, modality), f"{modality}_tower", folder) for modality in MODALITIES)
    return dataclasses.replace(config, video=video, audio=audio)


def _written(name: str, own: str, folder: Path) -> str:
    if name.startswith("hf:"):
        (folder / own).mkdir()
        for file in tower_files(name):
            if file.name in _CONFIGS:
                shutil.copyfile(file, folder / own / file.name)
        return f"hf:{own}"
    if name.startswith("onnx:"):
        shutil.copyfile(name.removeprefix("onnx:"), folder / f"{own}.onnx")
        return f"onnx:{own}.onnx"
    return name.partition("=")[0] if name.startswith(("torchvision:", "timm:")) else name


def _located(name: str, own: str, folder: Path) -> str:
    kind, _, path = name.partition(":")
    files = {"hf": own, "onnx": f"{own}.onnx"}
    if kind in files:
        if path != files[kind]:
            raise ValueError(f"tower {name}: must be {kind}:{files[kind]} in an export")
        return f"{kind}:{folder / path}"
    if kind in ("torchvision", "timm") and "=" in path:
        raise ValueError(f"tower {name}: must be {name.partition('=')[0]} in an export, without a file")
    return name
