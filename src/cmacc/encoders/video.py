"""Video backbones: from normalised pixels ``(M, 3, T, H, W)`` to a feature map, and to ``(M, feature_size)``."""

from collections.abc import Callable
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from cmacc.encoders.backbone import LAYERS_A_CONVOLUTION, Backbone
from cmacc.encoders.pooling import MeanPool, TransformerPool, VideoPoolingName

VideoBackboneName = Literal["tiny", "r3d_18", "mc3_18", "r2plus1d_18"]

VideoInputName = Literal["frames", "differences"]
VideoMapStride = Literal[8, 16]

_TIME_BINS = 8
_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue
# Neighbouring frames are alike: their differences are smaller than the normalised frames.
_DIFFERENCE_GAIN = 2.0


class VideoBackbone(Backbone):
    """A video backbone with modules in place of its own pooling and, in `prepare`, before its layers.

    Attributes
    ----------
    feature_size
        f, of its own pooling.
    pooling
        The module that pools instead; None: its own pooling does.
    differences
        The module that turns frames into what the layers see; None: they see the frames.
    """

    feature_size: int
    pooling: nn.Module | None
    differences: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        # Not plain attributes: hashes of weights in cards cover those, and most backbones have neither module.
        self.register_module("pooling", None)
        self.register_module("differences", None)

    def prepare(
        self, inputs: Float[Tensor, "batch 3 time height width"]
    ) -> Float[Tensor, "batch 3 prepared_time height width"]:
        """Normalised frames, or their differences: one time fewer.

        Raises
        ------
        ValueError
            Clips of a single frame have no differences.
        """
        if self.differences is None:
            return inputs
        prepared: Tensor = self.differences(inputs)
        return prepared

    def pool(
        self, feature_map: Float[Tensor, "batch channels map_time map_height map_width"]
    ) -> Float[Tensor, "batch features"]:
        """The feature of a map of any size."""
        if self.pooling is None:
            return self.own_pool(feature_map)
        pooled: Tensor = self.pooling(feature_map)
        return pooled

    def own_pool(self, feature_map: Tensor) -> Tensor:
        """``(M, f)``: the feature without another pooling."""
        raise NotImplementedError

    @property
    def last_stage(self) -> nn.Module:
        """The layers of the last stride over space, after which the map has a place for 16 x 16 pixels."""
        raise NotImplementedError


class FrameDifferences(nn.Module):
    """What changes from each frame to the next: ``2 * (luma[t + 1] - luma[t])``, in all three channels.

    Neither a still background nor colour is in it, by which clips of one file are otherwise too easily told from those
    of others. The three channels are equal, so that layers for colour fit.

    Examples
    --------
    >>> import torch
    >>> FrameDifferences()(torch.zeros(2, 3, 16, 32, 32)).shape
    torch.Size([2, 3, 15, 32, 32])
    """

    def forward(
        self, video: Float[Tensor, "batch 3 time height width"]
    ) -> Float[Tensor, "batch 3 time-1 height width"]:
        """From normalised frames.

        Raises
        ------
        ValueError
            There is only one frame.
        """
        if video.shape[2] < 2:
            raise ValueError(
                f"FrameDifferences: clips must have at least 2 frames to see what changes, got {video.shape[2]}"
            )
        red, green, blue = video.split(1, dim=1)
        luma = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
        changes: Tensor = _DIFFERENCE_GAIN * (luma[:, :, 1:] - luma[:, :, :-1])
        return changes.expand(-1, 3, -1, -1, -1)  # a view: only what is encoded at a time is copied


class TinyVideo(VideoBackbone):
    """Four 3-D convolutions, about 1M parameters, for CPUs and small frames (48 to 112 px).

    Pooling adds the maximum over space to the mean: the source of a sound is often small, and the mean alone could lose
    it in the background. Eight time bins are kept, so that the feature still says *when* something happens. Otherwise
    audio and video could only be matched by content, not by timing.
    """

    map_channels = 192
    feature_size = map_channels * _TIME_BINS

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_convolution(3, 32, kernel=(1, 5, 5), stride=(1, 2, 2)),
            *_convolution(32, 64, kernel=(3, 3, 3), stride=(1, 2, 2)),
            *_convolution(64, 128, kernel=(3, 3, 3), stride=(2, 2, 2)),
            *_convolution(128, 192, kernel=(3, 3, 3), stride=(1, 2, 2)),
        )

    def body(
        self, prepared: Float[Tensor, "batch 3 time height width"]
    ) -> Float[Tensor, "batch channels map_time map_height map_width"]:
        """Output of the last convolution, by time and space."""
        x = prepared
        for first in range(0, len(self.layers), LAYERS_A_CONVOLUTION):
            x = self.through(self.layers[first : first + LAYERS_A_CONVOLUTION], x)
        return x

    @property
    def last_stage(self) -> nn.Module:
        """The last convolution."""
        return self.layers[-LAYERS_A_CONVOLUTION:]

    def own_pool(
        self, feature_map: Float[Tensor, "batch channels map_time map_height map_width"]
    ) -> Float[Tensor, "batch features"]:
        """Maximum plus mean over space, in eight time bins."""
        over_space = feature_map.amax(dim=(3, 4)) + feature_map.mean(dim=(3, 4))
        return functional.adaptive_avg_pool1d(over_space, _TIME_BINS).flatten(1)


class VideoResNet(VideoBackbone):
    """One of torchvision's video ResNets without its classifier. The parameters keep torchvision's names."""

    map_channels = feature_size = 512

    def __init__(self, network: Any) -> None:
        super().__init__()
        # Not `self.network = network`: that would put a prefix before the parameter names of older checkpoints.
        self.stem: nn.Module = network.stem
        self.layer1: nn.Module = network.layer1
        self.layer2: nn.Module = network.layer2
        self.layer3: nn.Module = network.layer3
        self.layer4: nn.Module = network.layer4

    def body(
        self, prepared: Float[Tensor, "batch 3 time height width"]
    ) -> Float[Tensor, "batch channels map_time map_height map_width"]:
        """Output of the last block, by time and space."""
        x = self.through(self.stem, prepared)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer.children():
                x = self.through(block, x)
        return x

    @property
    def last_stage(self) -> nn.Module:
        """The last two blocks."""
        return self.layer4

    def own_pool(
        self, feature_map: Float[Tensor, "batch channels map_time map_height map_width"]
    ) -> Float[Tensor, "batch features"]:
        """The mean over time and space."""
        return functional.adaptive_avg_pool3d(feature_map, 1).flatten(1)


def _convolution(inputs: int, outputs: int, kernel: tuple[int, ...], stride: tuple[int, ...]) -> list[nn.Module]:
    padding = tuple(size // 2 for size in kernel)
    convolution = nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False)  # type: ignore[arg-type]
    return [convolution, nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)]


def build_video_backbone(
    name: str, pooling: VideoPoolingName = "own", sees: VideoInputName = "frames", map_stride: VideoMapStride = 16
) -> tuple[VideoBackbone, int]:
    """The untrained backbone of that name with that pooling, input and map, and the size of its feature.

    Raises
    ------
    ValueError
        ``name`` is not one of `VideoBackboneName`.
    """
    backbone = TinyVideo() if name == "tiny" else _resnet(name)
    if map_stride == 8:
        for layer in backbone.last_stage.modules():
            if isinstance(layer, nn.Conv3d) and layer.stride[1:] == (2, 2):
                layer.stride = (layer.stride[0], 1, 1)
    if sees == "differences":
        backbone.differences = FrameDifferences()
    if pooling == "own":
        return backbone, backbone.feature_size
    del backbone.pooling  # to become the last part again: ``train.video=last:N`` counts in this order
    backbone.pooling = MeanPool() if pooling == "mean" else TransformerPool(backbone.map_channels)
    return backbone, backbone.map_channels


def _resnet(name: str) -> VideoResNet:
    if name not in get_args(VideoBackboneName):
        raise ValueError(
            f"build_video_backbone: name must be one of {', '.join(get_args(VideoBackboneName))}, got {name!r}"
        )
    import torchvision.models.video as torchvision_video  # importing takes seconds, so only these backbones do it

    build: Callable[..., nn.Module] = getattr(torchvision_video, name)
    return VideoResNet(build(weights=None))
