"""What a tower is: someone else's network, what it takes, and how its input and output are made to fit cmacc's.

All towers are one of two classes. What differs from network to network is a function ``encode``, which calls it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# How frames reach the encoders: normalised by these, as in cmacc/clips/loading/transforms.py. A test compares the two.
PIXEL_MEAN, PIXEL_DEVIATION = 0.43, 0.22

FramePoolingName = Literal["mean", "attention"]
_IMAGES_AT_ONCE = 8
Encode = Callable[[nn.Module, Tensor], Tensor]


class TowerError(ValueError):
    """A tower that is unknown, cannot be opened, or gives another shape than it states; the message says which."""


@dataclass(frozen=True)
class TowerInput:
    """The clips that a tower was made for; None: any.

    Attributes
    ----------
    frame_count, frame_rate_hz
        Number and rate of the frames.
    frame_height, frame_width
        Size of the frames in pixels.
    audio_seconds
        Length of the audio.
    sample_rate_hz
        Sample rate of the audio.
    """

    frame_count: int | None = None
    frame_rate_hz: float | None = None
    frame_height: int | None = None
    frame_width: int | None = None
    audio_seconds: float | None = None
    sample_rate_hz: int | None = None


def image_by_image(encode: Callable[[Tensor], Tensor], images: Tensor, network: nn.Module) -> Tensor:
    """Features of images, on a CPU a few at a time: the maps of hundreds do not fit into its caches.

    A network in training mode gets all at once, because batch norm takes its statistics from them; and so does an
    export, whose number of images is open.
    """
    if images.device.type != "cpu" or network.training or torch.compiler.is_exporting():
        return encode(images)
    return torch.cat([encode(some) for some in images.split(_IMAGES_AT_ONCE)])


class FramePooling(nn.Module):
    """One feature for a clip from those of its frames: their mean, or a mean that one learnt query weights.

    Parameters
    ----------
    feature_size
        Size of the features.
    kind
        ``mean``, without parameters; or ``attention``, softmax over time of the products with the query. The query
        starts as zero, so that attention starts as the mean.
    """

    def __init__(self, feature_size: int, kind: FramePoolingName) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(feature_size)) if kind == "attention" else None

    def forward(self, features: Float[Tensor, "batch time features"]) -> Float[Tensor, "batch features"]:
        """Pool over time."""
        if self.query is None:
            return features.mean(dim=1)
        scores = features @ self.query.to(features.dtype) / features.shape[-1] ** 0.5
        pooled: Tensor = (scores.softmax(dim=1)[..., None] * features).sum(dim=1)
        return pooled


class Tower(nn.Module):
    """A network as a backbone; of audio, unless it is a `VideoTower`.

    Parameters
    ----------
    name
        Name of the tower, for messages.
    network
        The network.
    encode
        Function of the network and its input, ``(B, ...)``, that returns ``(B, feature_size)``, or what ``project``
        takes. It stands outside the network so that LoRA or `torch.compile` may wrap or replace that.
    takes
        The clips that it was made for.
    feature_size
        Size of the features.
    project
        Function of the network and the output of ``encode``, ``(B, width)``, that returns the features: for a network
        that projects into a space shared with text. Default: ``encode`` returns the features.
    can_train
        Whether it is differentiable in its input and weights.
    settings
        What else its features depend on, as text, such as the settings of a feature extractor. Part of all hashes.

    Attributes
    ----------
    network
        The network: what is frozen, trained or gets LoRA.
    takes, feature_size, can_train, settings
        As given.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        encode: Encode,
        takes: TowerInput,
        feature_size: int,
        *,
        project: Encode | None = None,
        can_train: bool = True,
        settings: str = "",
    ) -> None:
        super().__init__()
        self._name = name
        self._encode = encode
        self._project = project
        self.network = network
        self.takes = takes
        self.feature_size = feature_size
        self.can_train = can_train
        self.settings = settings

    def forward(self, inputs: Float[Tensor, "batch *axes"]) -> Float[Tensor, "batch features"]:
        """Features of waveforms: mono, float32, in [-1, 1], at ``takes.sample_rate_hz``.

        Raises
        ------
        TowerError
            The network cannot take the inputs, or gives another shape than one feature of ``feature_size`` for each.
        """
        return self._features(inputs)

    @property
    def has_projection(self) -> bool:
        """Whether `unprojected` and `project` can be called."""
        return self._project is not None

    def unprojected(self, inputs: Float[Tensor, "batch *axes"]) -> Float[Tensor, "batch width"]:
        """What the network gives before it projects into the space shared with text, of the same inputs as `forward`.

        Raises
        ------
        TowerError
            The network cannot take the inputs, or has no such projection.
        """
        self._projection()
        return self._encoded(inputs)

    def project(self, unprojected: Float[Tensor, "batch width"]) -> Float[Tensor, "batch features"]:
        """The rest of `forward`: from the output of `unprojected` to the features.

        Raises
        ------
        TowerError
            The network has no such projection.
        """
        return self._projection()(self.network, unprojected)

    def checkpoint_activations(self) -> None:
        """Have the backward pass compute the activations inside each block again, where the library can.

        Raises
        ------
        TowerError
            The network is not timm's or transformers', does not support it, or has batch norm in training.
        """
        network: Any = self.network
        wanted = f"tower {self._name}: train.checkpoint_activations must be false"
        kind = self._name.partition(":")[0]
        is_supported = kind == "timm" or (kind == "hf" and getattr(network, "supports_gradient_checkpointing", False))
        if not is_supported:
            raise TowerError(
                f"{wanted}; cmacc's own backbones, timm: and most of hf: can compute activations again, this cannot"
            )
        if any(isinstance(module, _BatchNorm) and module.training for module in network.modules()):
            raise TowerError(f"{wanted}, because its batch norms would count the same batch twice")
        if kind == "hf":
            # The second is the older name, which newer versions of transformers warn about.
            enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            return
        try:
            network.set_grad_checkpointing(True)
        except (AssertionError, AttributeError, NotImplementedError) as error:  # timm's ways to say that a model cannot
            raise TowerError(f"{wanted}, because timm's model does not support it") from error

    def _projection(self) -> Encode:
        if self._project is None:
            raise TowerError(f"tower {self._name}: must project into a space shared with text, got none")
        return self._project

    def _encoded(self, inputs: Tensor) -> Tensor:
        try:
            return self._encode(self.network, inputs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, AssertionError) as error:  # of layers deep inside, about shapes
            raise TowerError(
                f"tower {self._name}: must take inputs of shape {tuple(inputs.shape)}, as data.clip makes them, got "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from error

    def _features(self, inputs: Tensor) -> Tensor:
        features = self._encoded(inputs)
        if self._project is not None:
            features = self._project(self.network, features)
        # shape[0], not len: an ONNX graph would only take the batch size that it was traced with.
        if features.shape != (inputs.shape[0], self.feature_size):
            raise TowerError(
                f"tower {self._name}: must give shape {(len(inputs), self.feature_size)} for inputs of shape "
                f"{tuple(inputs.shape)}, got {tuple(features.shape)}"
            )
        return features


class VideoTower(Tower):
    """A tower of video: of whole clips, or of images, whose features are pooled over time.

    Parameters
    ----------
    name, network, encode, takes, feature_size, can_train, settings
        As in `Tower`. ``encode`` gets clips ``(B, 3, T, H, W)``, or with ``frame_pooling`` images ``(B, 3, H, W)``.
    mean, deviation
        Of pixels in [0, 1], by channel: what the network's own preprocessing subtracts, and divides by. Default: the
        network takes pixels in [0, 1].
    frame_pooling
        How the features of images are pooled; None for a network of whole clips.
    map_and_rest
        ``encode`` in two parts, for a network that pools a feature map: from the same inputs to the map,
        ``(B, C, t, h, w)`` or of images ``(B, C, h, w)``, and from the map to the features.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        name: str,
        network: nn.Module,
        encode: Encode,
        takes: TowerInput,
        feature_size: int,
        *,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        deviation: Sequence[float] = (1.0, 1.0, 1.0),
        frame_pooling: FramePoolingName | None = None,
        map_and_rest: tuple[Encode, Encode] | None = None,
        can_train: bool = True,
        settings: str = "",
    ) -> None:
        super().__init__(name, network, encode, takes, feature_size, can_train=can_train, settings=settings)
        self._map_and_rest = map_and_rest
        self.pooling = FramePooling(feature_size, frame_pooling) if frame_pooling is not None else None
        if frame_pooling is not None:
            # Faster on a CPU, most of all for depthwise convolutions.
            network.to(memory_format=torch.channels_last)
        # (x * PIXEL_DEVIATION + PIXEL_MEAN - mean) / deviation, as one scale and one shift, computed in float64.
        means, deviations = (
            torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1) for values in (mean, deviation)
        )
        self.register_buffer("scale", (PIXEL_DEVIATION / deviations).float(), persistent=False)
        self.register_buffer("shift", ((PIXEL_MEAN - means) / deviations).float(), persistent=False)

    def normalise(
        self, inputs: Float[Tensor, "batch 3 time height width"]
    ) -> Float[Tensor, "batch 3 time height width"]:
        """From cmacc's normalisation of pixels to the network's."""
        return inputs * self.scale + self.shift

    def forward(self, inputs: Float[Tensor, "batch 3 time height width"]) -> Float[Tensor, "batch features"]:
        """Features of frames, normalised by `PIXEL_MEAN` and `PIXEL_DEVIATION`.

        Raises
        ------
        TowerError
            As in `Tower.forward`.
        """
        video = self.normalise(inputs)
        if self.pooling is None:
            return self._features(video)
        images = video.transpose(1, 2).flatten(0, 1)
        features = image_by_image(self._features, images, self.network)
        pooled: Tensor = self.pooling(features.unflatten(0, (video.shape[0], -1)))
        return pooled

    @property
    def has_feature_map(self) -> bool:
        """Whether `feature_map` and `pool` can be called."""
        return self._map_and_rest is not None

    def feature_map(
        self, inputs: Float[Tensor, "batch 3 time height width"]
    ) -> Float[Tensor, "batch channels map_time map_height map_width"]:
        """The network's last feature map before it is pooled, of the same inputs as `forward`; of images, by frame.

        Raises
        ------
        TowerError
            The tower has none.
        """
        encode, _ = self._parts()
        video = self.normalise(inputs)
        if self.pooling is None:
            return encode(self.network, video)
        images = video.transpose(1, 2).flatten(0, 1)
        maps = image_by_image(lambda some: encode(self.network, some), images, self.network)
        by_clip: Tensor = maps.unflatten(0, (video.shape[0], -1))
        return by_clip.transpose(1, 2)

    def pool(
        self, feature_map: Float[Tensor, "batch channels map_time map_height map_width"]
    ) -> Float[Tensor, "batch features"]:
        """The rest of `forward`: from the feature map to the features.

        Raises
        ------
        TowerError
            As in `feature_map`.
        """
        _, encode = self._parts()
        if self.pooling is None:
            return encode(self.network, feature_map)
        features = encode(self.network, feature_map.transpose(1, 2).flatten(0, 1))
        pooled: Tensor = self.pooling(features.unflatten(0, (feature_map.shape[0], -1)))
        return pooled

    def _parts(self) -> tuple[Encode, Encode]:
        if self._map_and_rest is None:
            raise TowerError(f"tower {self._name}: must have a feature map that it pools, got none")
        return self._map_and_rest
