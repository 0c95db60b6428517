"""The pair of encoders f_v and f_a: backbone, projection head, L2 norm.

The last linear layer has no bias, so that the gradient of a loss with respect to that layer is exactly the outer
product of the gradient at its output and the penultimate feature (see `cmacc.negatives.gradients`).
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmacc.encoders.audio import AudioBackboneName, build_audio_backbone
from cmacc.encoders.backbone import Backbone
from cmacc.encoders.norm import NormName, replace_batch_norm
from cmacc.encoders.video import VideoBackboneName, build_video_backbone

HeadName = Literal["linear", "mlp"]
Modality = Literal["video", "audio"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)


@dataclass(frozen=True)
class EncoderConfig:
    """Which encoders.

    Parameters
    ----------
    video, audio
        Backbones.
    mel_bins
        Bands of the log-mel spectrogram that the audio encoder takes.
    head
        ``linear`` (the penultimate feature is the backbone's) or ``mlp`` (one hidden layer of ``hidden_size``); either
        way batch norm standardises it. Training therefore needs two inputs a batch at least.
    hidden_size
        Width of the MLP head's hidden layer, which is then the penultimate feature.
    embedding_size
        d; 512 in the paper.
    norm
        What follows the backbones' convolutions: ``batch`` norm, or ``group`` norm, for which a sample's feature does
        not depend on the others of its batch. The norms of the audio input and of the head are batch norm either way.

    Raises
    ------
    ValueError
        A size is not positive, or ``head`` or ``norm`` is unknown.
    """

    video: VideoBackboneName = "tiny"
    audio: AudioBackboneName = "tiny"
    mel_bins: int = 80
    head: HeadName = "mlp"
    hidden_size: int = 512
    embedding_size: int = 128
    norm: NormName = "group"

    def __post_init__(self) -> None:
        for name in ("mel_bins", "hidden_size", "embedding_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"EncoderConfig: {name} must be at least 1, got {getattr(self, name)}")
        if self.head not in get_args(HeadName):
            raise ValueError(f"EncoderConfig: head must be one of {', '.join(get_args(HeadName))}, got {self.head!r}")
        if self.norm not in get_args(NormName):
            raise ValueError(f"EncoderConfig: norm must be one of {', '.join(get_args(NormName))}, got {self.norm!r}")


@dataclass(frozen=True)
class Encoding:
    """What an encoder says of M inputs.

    Attributes
    ----------
    embedding
        ``(M, d)``, of length one: the query or key.
    length
        ``(M,)``: the embedding's length before it was normalised.
    penultimate
        ``(M, p)``: what enters the last linear layer.
    feature
        ``(M, f)``: the backbone's output, which transfer tasks use.
    feature_map
        ``(M, C, ...)``: what the backbone pools, by time and place; None unless it was asked for.
    """

    embedding: Float[Tensor, "batch dim"]
    length: Float[Tensor, " batch"]
    penultimate: Float[Tensor, "batch penultimate"]
    feature: Float[Tensor, "batch features"]
    feature_map: Float[Tensor, "batch channels *places"] | None = None


class Encoder(nn.Module):
    """Backbone, projection head and L2 norm for one modality.

    ``backbone`` gives ``(M, feature_size)``; only a `Backbone` can be asked for its feature map.
    """

    def __init__(self, backbone: nn.Module, feature_size: int, head: HeadName, hidden_size: int, size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.feature_size = feature_size
        layers: list[nn.Module] = []
        self.penultimate_size = feature_size
        if head == "mlp":
            layers = [nn.Linear(feature_size, hidden_size), nn.ReLU(inplace=True)]
            self.penultimate_size = hidden_size
        # Features after a ReLU share a large mean, so untrained embeddings would all lie in one narrow cone, where a
        # contrastive loss finds next to no gradient; centred penultimate features begin spread over the sphere.
        self.hidden = nn.Sequential(*layers, nn.BatchNorm1d(self.penultimate_size))
        self.last = nn.Linear(self.penultimate_size, size, bias=False)

    def forward(self, inputs: Tensor, with_feature_map: bool = False) -> Encoding:
        """Encode a batch; ``with_feature_map`` also keeps what the backbone pools.

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
        feature_map = self.backbone.feature_map(inputs)
        return replace(self.project(self.backbone.pool(feature_map)), feature_map=feature_map)

    def project(self, feature: Tensor) -> Encoding:
        """The head alone. It works in its weights' precision also under autocast: the norm wants the digits."""
        feature = feature.to(self.last.weight.dtype)
        with torch.autocast(feature.device.type, enabled=False):
            penultimate = self.hidden(feature)
            projected = self.last(penultimate)
            length = projected.norm(dim=1).clamp_min(1e-12)
            return Encoding(projected / length[:, None], length, penultimate, feature)


class EncoderPair(nn.Module):
    """Both encoders; one ``forward`` for both, so that wrappers such as DistributedDataParallel see every parameter."""

    def __init__(self, video: Encoder, audio: Encoder) -> None:
        super().__init__()
        self.video = video
        self.audio = audio

    def forward(
        self,
        video: Float[Tensor, "batch *video_axes"] | None = None,
        audio: Float[Tensor, "batch *audio_axes"] | None = None,
        *,
        with_feature_maps: bool = False,
    ) -> dict[Modality, Encoding]:
        """Encode what is given, by the modality's name."""
        encodings: dict[Modality, Encoding] = {}
        if video is not None:
            encodings["video"] = self.video(video, with_feature_maps)
        if audio is not None:
            encodings["audio"] = self.audio(audio, with_feature_maps)
        return encodings


class AudioVisualEncoder(EncoderPair):
    """The pair for clips: pictures ``(M, 3, T, H, W)`` and log-mel spectrograms ``(M, mels, time)``.

    Examples
    --------
    >>> import torch
    >>> pair = AudioVisualEncoder(EncoderConfig(embedding_size=32))
    >>> encodings = pair(video=torch.zeros(2, 3, 8, 32, 32), audio=torch.zeros(2, 80, 101))
    >>> encodings["video"].embedding.shape, encodings["audio"].embedding.shape
    (torch.Size([2, 32]), torch.Size([2, 32]))
    """

    def __init__(self, config: EncoderConfig | None = None) -> None:
        config = config or EncoderConfig()
        video, video_size = build_video_backbone(config.video)
        audio, audio_size = build_audio_backbone(config.audio, config.mel_bins)
        if config.norm == "group":
            replace_batch_norm(video)
            replace_batch_norm(audio)
        super().__init__(
            Encoder(video, video_size, config.head, config.hidden_size, config.embedding_size),
            Encoder(audio, audio_size, config.head, config.hidden_size, config.embedding_size),
        )
        self.config = config
