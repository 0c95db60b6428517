"""The pair of encoders f_v and f_a: backbone, projection head, L2 norm.

The last linear layer has no bias. The gradient of a loss with respect to that layer is then exactly the outer product
of the gradient at its output and the penultimate feature (see `cmacc.negatives.gradients`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmacc.encoders.audio import AudioBackboneName, build_audio_backbone
from cmacc.encoders.backbone import Backbone
from cmacc.encoders.modality import MODALITIES, Modality
from cmacc.encoders.norm import NormName, WholeBatchNorm, set_norms, statistics_held
from cmacc.encoders.pooling import VideoPoolingName
from cmacc.encoders.towers import FramePoolingName, Tower, is_tower, open_tower
from cmacc.encoders.video import VideoBackboneName, VideoInputName, VideoMapStride, build_video_backbone

HeadName = Literal["linear", "mlp"]


@dataclass(frozen=True)
class EncoderConfig:
    """The encoders.

    Parameters
    ----------
    video, audio
        Names of the backbones: cmacc's own (``tiny``, ``r3d_18``, ...), which start untrained, or towers, which start
        from their own weights: ``torchvision:NAME[=FILE]``, ``timm:NAME[=FILE]``, ``hf:FOLDER_OR_ID``, ``onnx:FILE`` or
        ``python:PACKAGE.MODULE:FUNCTION`` (docs/towers.md).
    mel_bins
        Mel bands of the spectrogram. Towers make their own.
    head
        ``linear`` (the penultimate feature is the backbone's) or ``mlp`` (one hidden layer of ``hidden_size``). In both
        cases batch norm standardises it, so training needs at least two inputs per batch. A tower's features are
        standardised before the hidden layer, too.
    hidden_size
        Width of the MLP head's hidden layer, which is then the penultimate feature.
    embedding_size
        d, size of the embeddings; 512 in the paper.
    norm
        Norm after the convolutions of cmacc's own backbones: ``batch``, batch norm over the part of the batch on each
        process; ``sync``, batch norm over the whole batch; or ``group``, with which the feature of a sample does not
        depend on the rest of its batch. The norms of the audio input and of the head are always batch norm over the
        whole batch.
    frame_pooling
        How image towers pool the features of the frames: ``mean``, or ``attention``, with a learned query.
    video_pooling
        How cmacc's own video backbones pool their feature map: ``own``, as the backbone says (``tiny`` keeps eight time
        bins, the others take the mean); ``mean``, the mean over time and space; or ``transformer``, two transformer
        layers over time (`TransformerPool`). The feature of the latter two has as many numbers as the map has channels,
        and does not depend on the order of the map's times.
    video_input
        What cmacc's own video backbones see: ``frames``, or ``differences``, the change of brightness from each frame
        to the next (`cmacc.encoders.video.FrameDifferences`), for which clips need at least two frames. Good for
        actions, blind to what is still and to colour.
    video_map_stride
        Pixels from one place of the feature map to the next, for cmacc's own video backbones: 16, or 8, which costs
        time. Terms that say where something is need it (``ctp``; the paper's is 8). The weights are of the same shapes.

    Raises
    ------
    ValueError
        A size is not positive, a name is unknown, or a video tower, which pools its map itself and takes frames, has
        another pooling or input.
    """

    video: str = "tiny"
    audio: str = "tiny"
    mel_bins: int = 80
    head: HeadName = "mlp"
    hidden_size: int = 512
    embedding_size: int = 128
    norm: NormName = "group"
    frame_pooling: FramePoolingName = "mean"
    # Not in the text, which is part of the hashes of weights in cards: they cover the modules of these anyway.
    video_pooling: VideoPoolingName = field(default="own", repr=False)
    video_input: VideoInputName = field(default="frames", repr=False)
    video_map_stride: VideoMapStride = field(default=16, repr=False)

    def __post_init__(self) -> None:
        for modality, own in (("video", VideoBackboneName), ("audio", AudioBackboneName)):
            name = getattr(self, modality)
            if name not in get_args(own) and not is_tower(name):
                raise ValueError(
                    f"EncoderConfig: {modality} must be one of {', '.join(get_args(own))}, or a tower (torchvision:, "
                    f"timm:, hf:, onnx: or python:), got {name!r}"
                )
        for name in ("mel_bins", "hidden_size", "embedding_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"EncoderConfig: {name} must be at least 1, got {getattr(self, name)}")
        for name, possible in (
            ("head", HeadName),
            ("norm", NormName),
            ("video_pooling", VideoPoolingName),
            ("video_input", VideoInputName),
            ("video_map_stride", VideoMapStride),
        ):
            names = ", ".join(map(str, get_args(possible)))
            if getattr(self, name) not in get_args(possible):
                raise ValueError(f"EncoderConfig: {name} must be one of {names}, got {getattr(self, name)!r}")
        for name, of_towers, why in (
            ("video_pooling", "own", "which pools its map itself"),
            ("video_input", "frames", "which was made for them"),
            ("video_map_stride", 16, "whose map is its own"),
        ):
            if getattr(self, name) != of_towers and is_tower(self.video):
                raise ValueError(
                    f"EncoderConfig: {name} must be {of_towers} with a tower ({self.video}), {why}, "
                    f"got {getattr(self, name)!r}"
                )


@dataclass(frozen=True)
class Encoding:
    """The outputs of an encoder for M inputs.

    Attributes
    ----------
    embedding
        ``(M, d)``, L2-normalised: the query or key.
    length
        ``(M,)``: norm of the embedding before normalisation.
    penultimate
        ``(M, p)``: input of the last linear layer.
    feature
        ``(M, f)``: output of the backbone, used by transfer tasks.
    feature_map
        ``(M, C, ...)``: the feature map before pooling; None unless requested.
    """

    embedding: Float[Tensor, "batch dim"]
    length: Float[Tensor, " batch"]
    penultimate: Float[Tensor, "batch penultimate"]
    feature: Float[Tensor, "batch features"]
    feature_map: Float[Tensor, "batch channels *places"] | None = None

    @classmethod
    def cat(cls, parts: "Sequence[Encoding]") -> "Encoding":
        """The encodings of several parts of a batch as one, without feature maps."""
        if len(parts) == 1:
            return parts[0]
        names = ("embedding", "length", "penultimate", "feature")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


class Encoder(nn.Module):
    """Backbone, projection head and L2 norm for one modality.

    ``backbone`` is any module that returns ``(M, feature_size)``; only a `Backbone` can return its feature map.
    """

    def __init__(self, backbone: nn.Module, feature_size: int, head: HeadName, hidden_size: int, size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.feature_size = feature_size
        # Private: hashes of weights in cards cover all public settings, and training is none of an encoder's.
        self._frozen_digest: str | None = None
        self._in_evaluation_mode: tuple[nn.Module, ...] = ()
        layers: list[nn.Module] = []
        self.penultimate_size = feature_size
        if head == "mlp":
            # Features of others come in any scale, one number a hundred times as large as the next, and the first
            # layer would see little but the large ones.
            layers = [WholeBatchNorm(feature_size, affine=False)] if isinstance(backbone, Tower) else []
            layers += [nn.Linear(feature_size, hidden_size), nn.ReLU(inplace=True)]
            self.penultimate_size = hidden_size
        # Features after a ReLU share a large mean. Without the norm, all untrained embeddings would be in one narrow
        # cone, where a contrastive loss has almost no gradient. Centred features start spread over the sphere.
        self.hidden = nn.Sequential(*layers, WholeBatchNorm(self.penultimate_size))
        self.last = nn.Linear(self.penultimate_size, size, bias=False)

    @property
    def network(self) -> nn.Module:
        """The part of the backbone that can be frozen: all of it, or what a tower wraps."""
        return self.backbone.network if isinstance(self.backbone, Tower) else self.backbone

    @property
    def frozen_digest(self) -> str | None:
        """Hash of the weights of `network` if all of it is frozen; checkpoints hold it instead of the weights."""
        return self._frozen_digest

    def mark_frozen(self, modules: Sequence[nn.Module], digest: str | None = None) -> None:
        """Keep parts of the backbone in evaluation mode while the encoder trains; with the hash if it is all of it."""
        self._in_evaluation_mode, self._frozen_digest = tuple(modules), digest
        self.train(self.training)

    def train(self, mode: bool = True) -> "Encoder":
        """Set the mode of all parts, except those that stay in evaluation mode."""
        super().train(mode)
        for module in self._in_evaluation_mode:
            module.training = False  # not eval(), which would also reach the trained parts inside
        return self

    def forward(self, inputs: Tensor, with_feature_map: bool = False) -> Encoding:
        """Encode a batch, with the feature map if ``with_feature_map`` is set.

        Raises
        ------
        ValueError
            The backbone has no feature map.
        """
        if not with_feature_map:
            return self.project(self.backbone(inputs))
        if not isinstance(self.backbone, Backbone):
            raise ValueError(
                f"Encoder: backbone must be a Backbone to give a feature map, got {type(self.backbone).__name__}"
            )
        feature, feature_map = self.backbone(inputs, with_map=True)
        return replace(self.project(feature), feature_map=feature_map)

    def project(self, feature: Tensor) -> Encoding:
        """The head alone. Also under autocast it runs in the precision of its weights, because the norm needs it."""
        feature = feature.to(self.last.weight.dtype)
        with torch.autocast(feature.device.type, enabled=False):
            penultimate = self.hidden(feature)
            projected = self.last(penultimate)
            length = projected.norm(dim=1).clamp_min(1e-12)
            return Encoding(projected / length[:, None], length, penultimate, feature)


class EncoderPair(nn.Module):
    """Both encoders, with one ``forward``, so that wrappers such as DistributedDataParallel see every parameter."""

    def __init__(self, video: Encoder, audio: Encoder) -> None:
        super().__init__()
        self.video = video
        self.audio = audio

    def forward(
        self,
        video: Float[Tensor, "batch *video_axes"] | None = None,
        audio: Float[Tensor, "batch *audio_axes"] | None = None,
        *,
        feature_maps_of: Collection[str] = (),
        more: Mapping[str, tuple[Modality, Tensor, bool]] | None = None,
    ) -> dict[Any, Encoding]:
        """Encode the given modalities, some with their feature maps; returns encodings by the name of the modality.

        ``more`` are further inputs by other names: their modality, the input, and whether to give its feature map.
        They do not change the running statistics of norms, for they may be masked or pasted together.
        """
        encodings: dict[Any, Encoding] = {}
        if video is not None:
            encodings["video"] = self.video(video, "video" in feature_maps_of)
        if audio is not None:
            encodings["audio"] = self.audio(audio, "audio" in feature_maps_of)
        for name, (modality, inputs, with_feature_map) in (more or {}).items():
            encoder: Encoder = getattr(self, modality)
            with statistics_held(encoder):
                encodings[name] = encoder(inputs, with_feature_map)
        return encodings


class AudioVisualEncoder(EncoderPair):
    """The encoder pair for clips: video ``(M, 3, T, H, W)``, and log-mel spectrograms ``(M, mels, time)``.

    An audio tower takes waveforms ``(M, S)`` instead.

    Parameters
    ----------
    config
        Settings of the encoders.
    weights_of
        The modalities whose towers start from their own weights. Others have random ones, for those of a checkpoint.

    Raises
    ------
    TowerError
        A tower cannot be opened.

    Examples
    --------
    >>> import torch
    >>> pair = AudioVisualEncoder(EncoderConfig(embedding_size=32))
    >>> encodings = pair(video=torch.zeros(2, 3, 8, 32, 32), audio=torch.zeros(2, 80, 101))
    >>> encodings["video"].embedding.shape, encodings["audio"].embedding.shape
    (torch.Size([2, 32]), torch.Size([2, 32]))
    """

    def __init__(self, config: EncoderConfig | None = None, *, weights_of: Collection[Modality] = MODALITIES) -> None:
        config = config or EncoderConfig()
        video, video_size = _backbone("video", config, "video" in weights_of)
        audio, audio_size = _backbone("audio", config, "audio" in weights_of)
        super().__init__(
            Encoder(video, video_size, config.head, config.hidden_size, config.embedding_size),
            Encoder(audio, audio_size, config.head, config.hidden_size, config.embedding_size),
        )
        self.config = config


def _backbone(modality: Modality, config: EncoderConfig, with_weights: bool) -> tuple[nn.Module, int]:
    name: str = getattr(config, modality)
    if is_tower(name):
        tower = open_tower(name, modality, frame_pooling=config.frame_pooling, with_weights=with_weights)
        return tower, tower.feature_size
    backbone: Backbone
    if modality == "video":
        backbone, size = build_video_backbone(name, config.video_pooling, config.video_input, config.video_map_stride)
    else:
        backbone, size = build_audio_backbone(name, config.mel_bins)
    set_norms(backbone, config.norm)
    return backbone, size
