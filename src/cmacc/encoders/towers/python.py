"""``python:PACKAGE.MODULE:FUNCTION``: a user's own module.

FUNCTION is called without arguments and returns a `torch.nn.Module` with the attributes:

- ``takes``, a `TowerInput`: the clips that it is made for;
- ``feature_size``, an int: f, the size of its features;
- ``can_train``, a bool, True if it is missing: whether it is differentiable.

Called with frames in [0, 1], ``(M, 3, T, H, W)``, or with mono waveforms in [-1, 1], ``(M, S)``, both float32, it
returns features ``(M, f)``. Whether it is a tower of video or of audio is for the config to say, by where it names it.
The module comes with its weights; where they are to come from a checkpoint, they are overwritten.
"""

import hashlib
import importlib
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from cmacc.encoders.modality import Modality
from cmacc.encoders.towers import packaged
from cmacc.encoders.towers.tower import Tower, TowerError, TowerInput, VideoTower
from cmacc.encoders.towers.trust import is_trusting_code


def python_tower(name: str, modality: Modality) -> Tower:
    """Import the user's function and call it.

    Parameters
    ----------
    name
        ``python:PACKAGE.MODULE:FUNCTION``.
    modality
        What it encodes.

    Raises
    ------
    TowerError
        Code is not trusted, there is no such function, or it does not return such a module.
    """
    module_name, _, function_name = name.removeprefix("python:").partition(":")
    if not module_name or not function_name:
        raise TowerError(f"tower {name}: must be python:PACKAGE.MODULE:FUNCTION")
    is_own = module_name == packaged.__name__ and function_name in packaged.__all__
    if not is_own and not is_trusting_code():
        raise TowerError(f"tower {name}: would run the code of {module_name}; if you trust it, pass --trust-code")
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
    except Exception as error:  # whatever the user's module does when it is imported
        raise TowerError(
            f"tower {name}: cannot be imported ({type(error).__name__}: {error}); is its folder on PYTHONPATH?"
        ) from error
    try:
        # Not on the meta device, on which exports are checked: the module comes with its weights.
        with torch.device("cpu"):
            network = function()
    except TowerError:
        raise
    except Exception as error:  # of the user's function
        raise TowerError(f"tower {name}: {function_name}() failed ({type(error).__name__}: {error})") from error
    if not isinstance(network, nn.Module):
        raise TowerError(f"tower {name}: must return a torch.nn.Module, got {type(network).__name__}")
    takes, feature_size = getattr(network, "takes", None), getattr(network, "feature_size", None)
    if not isinstance(takes, TowerInput):
        raise TowerError(f"tower {name}: its module's takes must be a TowerInput, got {takes!r}")
    if not isinstance(feature_size, int) or feature_size < 1:
        raise TowerError(f"tower {name}: its module's feature_size must be a positive int, got {feature_size!r}")
    kind = Tower if modality == "audio" else VideoTower
    return kind(
        name,
        network,
        _called,
        takes,
        feature_size,
        can_train=bool(getattr(network, "can_train", True)),
        settings=_source_hash(module),
    )


def _source_hash(module: ModuleType) -> str:
    """Hash of the module's source, because its features depend on it; of that file alone, not of what it imports."""
    file = getattr(module, "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file is not None else ""


def _called(network: nn.Module, inputs: Tensor) -> Tensor:
    features: Tensor = network(inputs)
    return features
