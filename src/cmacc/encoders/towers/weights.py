"""Files of weights, read without running code, and libraries of the extra ``towers``."""

import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cmacc.encoders.towers.tower import TowerError


def from_extra(tower: str, module: str) -> ModuleType:
    """Import a module of the extra ``towers``.

    Raises
    ------
    TowerError
        It is not installed.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of what the libraries themselves import
            return importlib.import_module(module)
    except ImportError as error:
        raise TowerError(f"tower {tower}: needs the extra `towers`: pip install 'cmacc[towers]' ({error})") from error


def read_weights(tower: str, file: Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors file, or from a .pth or .bin file (a pickle, read with ``weights_only``).

    Raises
    ------
    TowerError
        The file is missing, damaged, or holds something else.
    """
    if not file.is_file():
        # `Path("")` is ".": a name that ends in "=".
        shown = str(file) if file.name else "WEIGHTS"
        raise TowerError(f"tower {tower}: {shown} must be a file of weights, got nothing there")
    try:
        # weights_only: a .pth file is a pickle, and could otherwise execute arbitrary code.
        plain = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds of errors for a damaged file
        raise TowerError(f"tower {tower}: {file} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(plain, dict) or not all(isinstance(value, Tensor) for value in plain.values()):
        raise TowerError(f"tower {tower}: {file} must hold a state dict of tensors alone")
    return plain


def load_weights(tower: str, network: nn.Module, weights: dict[str, Tensor], classifiers: Sequence[str]) -> None:
    """Load a state dict into a network without its classifier.

    Parameters
    ----------
    tower
        Name of the tower, for messages.
    network
        The network.
    weights
        The state dict. What stands in it below a name of ``classifiers``, and not in the network, is ignored.
    classifiers
        Names of the removed classifier's modules.

    Raises
    ------
    TowerError
        A weight is missing, has no place in the network, or another shape.
    """
    own = network.state_dict()
    for key in sorted(own.keys() | weights.keys()):
        if key not in own:
            if any(key.startswith(f"{classifier}.") for classifier in classifiers):
                continue
            raise TowerError(f"tower {tower}: the weights' {key} has no place in that model")
        if key not in weights:
            # Counted by batch norms of torch >= 0.4.1; older files, torchvision's among them, lack it.
            if key.endswith(".num_batches_tracked"):
                continue
            raise TowerError(f"tower {tower}: the weights lack {key}")
        if weights[key].shape != own[key].shape:
            raise TowerError(
                f"tower {tower}: {key} must have shape {tuple(own[key].shape)}, got {tuple(weights[key].shape)}"
            )
    network.load_state_dict({key: weights[key] for key in own if key in weights}, strict=False)
