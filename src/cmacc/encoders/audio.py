"""Audio backbones: from log-mel spectrograms ``(M, mels, time)`` to a feature map, and to ``(M, feature_size)``."""

from itertools import pairwise
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from cmacc.encoders.backbone import LAYERS_A_CONVOLUTION, Backbone
from cmacc.encoders.norm import InputNorm

AudioBackboneName = Literal["tiny", "small", "resnet18", "resnet18_1d"]

_TIME_BINS = 8
_FREQUENCY_BINS = 5
_STATISTICS_BANDS = 10
_LEAST_VARIANCE = 1e-5
_MAP_LAYERS = 4 * LAYERS_A_CONVOLUTION  # of `TinyAudio.layers`


class TinyAudio(Backbone):
    """Four 2-D convolutions over the spectrogram, then one over its full height.

    Like `TinyVideo`, it keeps eight time bins. Frequency is not pooled but weighted by a convolution, because pitch is
    the *position* on that axis.
    """

    map_channels = 192
    feature_size = map_channels * _TIME_BINS

    def __init__(self, mel_bins: int) -> None:
        super().__init__()
        self.normalise = InputNorm(mel_bins)
        self.layers = nn.Sequential(
            *_convolution(1, 32, kernel=5, stride=2, padding=2),
            *_convolution(32, 64, kernel=3, stride=2, padding=1),
            *_convolution(64, 128, kernel=3, stride=2, padding=1),
            *_convolution(128, 192, kernel=3, stride=1, padding=1),
            nn.AdaptiveAvgPool2d((_FREQUENCY_BINS, 2 * _TIME_BINS)),
            *_convolution(192, 192, kernel=(_FREQUENCY_BINS, 1), stride=1, padding=0),
            nn.AdaptiveAvgPool2d((1, _TIME_BINS)),
            nn.Flatten(),
        )

    def prepare(self, inputs: Float[Tensor, "batch mels time"]) -> Float[Tensor, "batch mels time"]:
        """Every mel band standardised."""
        standardised: Tensor = self.normalise(inputs)
        return standardised

    def body(self, prepared: Float[Tensor, "batch mels time"]) -> Float[Tensor, "batch channels map_mels map_time"]:
        """Output of the convolutions before the one over the full height."""
        x = prepared[:, None]
        for first in range(0, _MAP_LAYERS, LAYERS_A_CONVOLUTION):
            x = self.through(self.layers[first : first + LAYERS_A_CONVOLUTION], x)
        return x

    def pool(self, feature_map: Float[Tensor, "batch channels map_mels map_time"]) -> Float[Tensor, "batch features"]:
        """Weighted over frequency, in eight time bins."""
        features: Tensor = self.layers[_MAP_LAYERS:](feature_map)
        return features


def _convolution(
    inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int | tuple[int, int], padding: int
) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


class SmallAudio(Backbone):
    """The convolutions of `TinyAudio`, and statistics over time of the last three in ten frequency bands.

    The feature is the mean and the deviation over time of every channel in every band: what sounds, how strongly and
    how unsteadily, but not when. Unlike eight time bins, that is the same for a part of a sound as for all of it, so
    windows of any length can be compared: for kinds of sounds, not for what happens at which time.

    The map holds the three convolutions' channels one after the other, on one grid of ten bands and the times of the
    first of the three, so that the feature is a function of the map alone. The times of the other two, half as many,
    are repeated. That keeps their means and deviations; where the grid has an odd number of times, the last one counts
    half. The first convolution has a stride of four frames instead of two, which halves the cost of all of them.
    """

    map_channels = 64 + 128 + 192
    feature_size = map_channels * _STATISTICS_BANDS * 2

    def __init__(self, mel_bins: int) -> None:
        super().__init__()
        self.normalise = InputNorm(mel_bins)
        self.layers = nn.Sequential(
            nn.Sequential(*_convolution(1, 32, kernel=5, stride=(2, 4), padding=2)),
            nn.Sequential(*_convolution(32, 64, kernel=3, stride=2, padding=1)),
            nn.Sequential(*_convolution(64, 128, kernel=3, stride=2, padding=1)),
            nn.Sequential(*_convolution(128, 192, kernel=3, stride=1, padding=1)),
        )

    def prepare(self, inputs: Float[Tensor, "batch mels time"]) -> Float[Tensor, "batch mels time"]:
        """Every mel band standardised."""
        standardised: Tensor = self.normalise(inputs)
        return standardised

    def body(self, prepared: Float[Tensor, "batch mels time"]) -> Float[Tensor, "batch channels map_mels map_time"]:
        """Outputs of the last three convolutions, in ten bands each."""
        outputs = [prepared[:, None]]
        for layer in self.layers:
            outputs.append(self.through(layer, outputs[-1]))
        kept = outputs[-3:]
        grid = (_STATISTICS_BANDS, kept[0].shape[3])
        in_bands = [functional.adaptive_avg_pool2d(x, (_STATISTICS_BANDS, x.shape[3])) for x in kept]
        return torch.cat([functional.interpolate(x, grid) for x in in_bands], dim=1)

    def pool(self, feature_map: Float[Tensor, "batch channels map_mels map_time"]) -> Float[Tensor, "batch features"]:
        """Mean and deviation over time of each channel and band."""
        mean = feature_map.mean(dim=-1, keepdim=True)
        variance = (feature_map - mean).square().mean(dim=-1)
        deviation = (variance + _LEAST_VARIANCE).sqrt()  # the root of 0 has no finite gradient
        return torch.cat([mean.flatten(1), deviation.flatten(1)], dim=1)


class ResNet18Audio(Backbone):
    """torchvision's ResNet-18, with the spectrogram as an image of one channel."""

    map_channels = feature_size = 512

    def __init__(self, mel_bins: int) -> None:
        super().__init__()
        from torchvision.models import resnet18  # importing takes seconds, so only this class does it

        self.normalise = InputNorm(mel_bins)
        self.network = resnet18(weights=None)
        self.network.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.network.fc = nn.Identity()

    def prepare(self, inputs: Float[Tensor, "batch mels time"]) -> Float[Tensor, "batch mels time"]:
        """Every mel band standardised."""
        standardised: Tensor = self.normalise(inputs)
        return standardised

    def body(self, prepared: Float[Tensor, "batch mels time"]) -> Float[Tensor, "batch channels map_mels map_time"]:
        """Output of the last block, by frequency and time."""
        network = self.network
        stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
        x = self.through(stem, prepared[:, None])
        for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
            for block in layer:
                x = self.through(block, x)
        return x

    def pool(self, feature_map: Float[Tensor, "batch channels map_mels map_time"]) -> Float[Tensor, "batch features"]:
        """The mean over frequency and time."""
        return functional.adaptive_avg_pool2d(feature_map, 1).flatten(1)


class ResNet18Audio1d(Backbone):
    """A 1-D ResNet-18 over time, with the mel bands as input channels, as in the first code of the paper."""

    map_channels = feature_size = 512

    def __init__(self, mel_bins: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            InputNorm(mel_bins),
            nn.Conv1d(mel_bins, 64, kernel_size=7, stride=2, padding=3, bias=False),
            nn.BatchNorm1d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool1d(kernel_size=3, stride=2, padding=1),
        )
        widths = (64, 64, 128, 256, 512)
        self.blocks = nn.Sequential(
            *(
                block
                for inputs, outputs in pairwise(widths)
                for block in (_Block1d(inputs, outputs, 1 if inputs == outputs else 2), _Block1d(outputs, outputs, 1))
            )
        )

    def prepare(self, inputs: Float[Tensor, "batch mels time"]) -> Float[Tensor, "batch mels time"]:
        """Every mel band standardised."""
        standardised: Tensor = self.stem[0](inputs)
        return standardised

    def body(self, prepared: Float[Tensor, "batch mels time"]) -> Float[Tensor, "batch channels map_time"]:
        """Output of the last block, by time."""
        x = self.through(self.stem[1:], prepared)
        for block in self.blocks:
            x = self.through(block, x)
        return x

    def pool(self, feature_map: Float[Tensor, "batch channels map_time"]) -> Float[Tensor, "batch features"]:
        """The mean over time."""
        return feature_map.mean(dim=-1)


class _Block1d(nn.Module):
    """The basic block of He et al. (2016) in one dimension."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm1d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv1d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm1d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv1d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm1d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(torch.add(self.body(x), self.shortcut(x)))


def build_audio_backbone(name: str, mel_bins: int) -> tuple[Backbone, int]:
    """The untrained backbone of that name, and the size of its feature.

    Raises
    ------
    ValueError
        ``name`` is not one of `AudioBackboneName`.
    """
    if name == "tiny":
        return TinyAudio(mel_bins), TinyAudio.feature_size
    if name == "small":
        return SmallAudio(mel_bins), SmallAudio.feature_size
    if name == "resnet18":
        return ResNet18Audio(mel_bins), ResNet18Audio.feature_size
    if name == "resnet18_1d":
        return ResNet18Audio1d(mel_bins), ResNet18Audio1d.feature_size
    raise ValueError(
        f"build_audio_backbone: name must be one of {', '.join(get_args(AudioBackboneName))}, got {name!r}"
    )
