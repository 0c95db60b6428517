"""``timm:NAME[=FILE]``: image models of timm over frames, without their classifiers."""

import difflib
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cmacc.encoders.towers.tower import FramePoolingName, TowerError, TowerInput, VideoTower
from cmacc.encoders.towers.weights import from_extra, load_weights, read_weights


def timm_tower(name: str, *, frame_pooling: FramePoolingName = "mean", with_weights: bool = True) -> VideoTower:
    """A model of timm; untrained without a file of weights.

    Parameters
    ----------
    name
        ``timm:NAME`` or ``timm:NAME=FILE``; NAME may have a tag, as in ``resnet18.a1_in1k``, on which the size and the
        normalisation of the images may depend.
    frame_pooling
        How the frames are pooled.
    with_weights
        Whether to read the file.

    Raises
    ------
    TowerError
        timm is not installed, the name is unknown, or the file's weights are not those of that model.
    """
    timm = from_extra(name, "timm")
    model, has_file, file = name.removeprefix("timm:").partition("=")
    if ":" in model:
        raise TowerError(
            f"tower {name}: must be a model of timm's own, got {model}; a folder or model of the hub is "
            "hf:FOLDER_OR_ID, and weights are a file: timm:NAME=FILE"
        )
    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=5)
        raise TowerError(f"tower {name}: must be a model of timm's, such as {', '.join(close or ['resnet18'])}")
    if tag and model not in timm.list_pretrained(f"{architecture}.*"):
        tags = ", ".join(timm.list_pretrained(f"{architecture}.*"))
        raise TowerError(f"tower {name}: must be one of {tags or f'{architecture} alone'}, got {model}")
    network: Any = timm.create_model(model, pretrained=False, num_classes=0)
    config = timm.data.resolve_model_data_config(network)
    if config["input_size"][0] != 3:
        raise TowerError(f"tower {name}: must take images of 3 channels, got {config['input_size'][0]}")
    if has_file and with_weights:
        classifiers = network.pretrained_cfg["classifier"]
        classifiers = [classifiers] if isinstance(classifiers, str) else list(classifiers)
        load_weights(name, network, read_weights(name, Path(file)), classifiers)
    _, height, width = config["input_size"]
    return VideoTower(
        name,
        network,
        _pooled,
        TowerInput(frame_height=height, frame_width=width),
        network.head_hidden_size,
        mean=config["mean"],
        deviation=config["std"],
        frame_pooling=frame_pooling,
    )


def _pooled(network: nn.Module, images: Tensor) -> Tensor:
    features: Tensor = network(images)
    return features
