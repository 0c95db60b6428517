"""``torchvision:NAME[=FILE]``: video models as they are, image models over frames, without their classifiers."""

from pathlib import Path

import torch
from torch import Tensor, nn

from cmacc.encoders.towers.tower import FramePoolingName, TowerError, TowerInput, VideoTower
from cmacc.encoders.towers.weights import load_weights, read_weights

# Frames per clip and frame rate with which the Kinetics weights were evaluated (`weights.meta["_docs"]`).
VIDEO_MODELS = {
    "r3d_18": (16, 15.0),
    "mc3_18": (16, 15.0),
    "r2plus1d_18": (16, 15.0),
    "s3d": (128, 15.0),
    "mvit_v1_b": (16, 7.5),
    "mvit_v2_s": (16, 7.5),
    "swin3d_t": (32, 15.0),
    "swin3d_s": (32, 15.0),
    "swin3d_b": (32, 15.0),
}
_CLASSIFIERS = ("fc", "classifier", "head", "heads")
# Two have a second classifier in the middle, and two end in a convolution without a linear layer.
_IMAGE_MODELS_WITHOUT = ("googlenet", "inception_v3", "squeezenet1_0", "squeezenet1_1")


def torchvision_tower(name: str, *, frame_pooling: FramePoolingName = "mean", with_weights: bool = True) -> VideoTower:
    """A model of torchvision; untrained without a file of weights.

    These have a feature map: the video models r3d_18, mc3_18 and r2plus1d_18, and all sizes of resnet, resnext,
    wide_resnet, regnet, efficientnet, mobilenet_v3, swin and swin_v2.

    Parameters
    ----------
    name
        ``torchvision:NAME`` or ``torchvision:NAME=FILE``.
    frame_pooling
        How image models pool their frames; video models must have ``mean``.
    with_weights
        Whether to read the file.

    Raises
    ------
    TowerError
        The name is unknown, or the file's weights are not those of that model.
    """
    from torchvision import models  # importing takes seconds, so only these towers do it

    model, has_file, file = name.removeprefix("torchvision:").partition("=")
    images = sorted(set(models.list_models(module=models)) - set(_IMAGE_MODELS_WITHOUT))
    if model not in VIDEO_MODELS and model not in images:
        raise TowerError(f"tower {name}: must be one of {', '.join([*VIDEO_MODELS, *images])}")
    is_video = model in VIDEO_MODELS
    # Their parts before ``avgpool`` are called one after the other, and give a feature map.
    in_parts = (
        models.ResNet, models.RegNet, models.EfficientNet, models.MobileNetV3, models.SwinTransformer,
        models.video.VideoResNet,
    )  # fmt: skip
    presets = models.get_model_weights(model).DEFAULT.transforms()
    network: nn.Module = models.get_model(model, weights=None)
    classifier, feature_size = _drop_last_layer(network)
    if has_file and with_weights:
        load_weights(name, network, read_weights(name, Path(file)), [classifier])
    size = presets.crop_size[0]
    count, rate = VIDEO_MODELS[model] if is_video else (None, None)
    return VideoTower(
        name,
        network,
        _flat,
        TowerInput(count, rate, size, size),
        feature_size,
        mean=presets.mean,
        deviation=presets.std,
        frame_pooling=None if is_video else frame_pooling,
        map_and_rest=(_feature_map, _rest) if isinstance(network, in_parts) else None,
    )


def _flat(network: nn.Module, inputs: Tensor) -> Tensor:
    features: Tensor = network(inputs)
    return torch.flatten(features, 1)


def _feature_map(network: nn.Module, inputs: Tensor) -> Tensor:
    """Output of all parts before the pooling."""
    for name, part in network.named_children():
        if name == "avgpool":
            break
        inputs = part(inputs)
    return inputs


def _rest(network: nn.Module, feature_map: Tensor) -> Tensor:
    """The pooling, and what is left of the classifier."""
    names = [name for name, _ in network.named_children()]
    features = torch.flatten(network.get_submodule("avgpool")(feature_map), 1)
    for name in names[names.index("avgpool") + 1 :]:
        features = network.get_submodule(name)(features)
    return features


def _drop_last_layer(network: nn.Module) -> tuple[str, int]:
    """Remove the last linear layer (in S3D, a 1x1x1 convolution); returns the classifier's name, and its input size."""
    name = next(name for name in _CLASSIFIERS if hasattr(network, name))
    classifier = getattr(network, name)
    if isinstance(classifier, nn.Sequential):
        last = classifier[-1]
        classifier[-1] = nn.Identity()
    else:
        last = classifier
        setattr(network, name, nn.Identity())
    assert isinstance(last, nn.Linear | nn.Conv3d)
    return name, last.in_features if isinstance(last, nn.Linear) else last.in_channels
