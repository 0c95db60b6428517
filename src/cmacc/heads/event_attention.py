"""The attention over places that CMBS (Xia and Zhao, CVPR 2022) and CACE-Net (He et al., ACM MM 2024) share.

Of a video's segments t = 1..T, with places n of the picture (one or many) and sound a_t, `SpatialChannelAttention`
makes one vector of a segment's places: the sound says which channels and places matter, and the picture, by attention
among its own places, which channels to strengthen. Here are also the settings, and the checks of what goes in, of all
heads of event localisation. The parts that see time are in `cmacc.heads.event_streams`.

The equations are those of the released code of CMBS, which says itself that its attention differs from the paper's.
With its weights and inputs, the heads of `cmacc.heads.cmbs` (the weak one with ``released=True``) and
`cmacc.heads.cace_net` gave the scores of the released models to 1e-14, in float64 and evaluation mode.
Tensors are (batch, time, ...).
"""

import dataclasses
import math
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from cmacc.heads.head import Rows
from cmacc.heads.segment_accuracy import EventError


@dataclass(frozen=True)
class StreamConfig:
    """Sizes of the hidden layers, and dropout. The defaults are those of supervised CMBS.

    Parameters
    ----------
    attention_width
        Width of the picture's features in the attention over places.
    attention_hidden
        Width of the two spatial attentions' hidden layers and of the channel attention's bottleneck.
    key_width
        Width of queries and keys of the attention among places.
    model_width
        d, width of both streams; a multiple of ``heads`` and ``fusion_heads``, and even.
    encoder_layers
        Layers of each encoder.
    encoder_feedforward, decoder_feedforward
        Width of their feed-forward layers.
    heads, fusion_heads
        Attention heads of encoders and decoders, and of the fusion.
    input_dropout
        Of the picture's features before the attention.
    attention_dropout
        Of what attention among places adds, and of the fusion's attention weights.
    dropout
        Of encoders, decoders and fusion.
    """

    attention_width: int = 512
    attention_hidden: int = 256
    key_width: int = 128
    model_width: int = 256
    encoder_layers: int = 2
    encoder_feedforward: int = 1024
    decoder_feedforward: int = 1024
    heads: int = 4
    fusion_heads: int = 4
    input_dropout: float = 0.2
    attention_dropout: float = 0.2
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if "dropout" in name:
                require(0 <= value < 1, f"event streams: {name}", "in [0, 1)", value)
            else:
                require(value >= 1, f"event streams: {name}", "at least 1", value)
        for divisor in (self.heads, self.fusion_heads, 2):
            require(
                self.model_width % divisor == 0,
                "event streams: model_width",
                f"a multiple of {divisor}",
                self.model_width,
            )


def require(holds: bool, name: str, wanted: str, got: object) -> None:
    """Raise `EventError` unless ``holds``."""
    if not holds:
        raise EventError(f"{name} must be {wanted}, got {got}")


def video_and_audio(
    rows: Rows, video_width: int, audio_width: int
) -> tuple[Float[Tensor, "batch time places width"], Float[Tensor, "batch time audio_width"]]:
    """``video`` with an axis of places, which may have one place, and ``audio``.

    ``video`` may have shape (batch, time, width), (batch, time, places, width) or (batch, time, height, width of the
    picture, width). Training needs ``labels`` (batch, time) beside them (`labels_of`).

    Raises
    ------
    EventError
        A tensor is missing, or its shape does not fit.
    """
    for name in ("video", "audio"):
        if name not in rows:
            raise EventError(f"event localisation: rows must hold {name}, got {', '.join(rows) or 'nothing'}")
    video, audio = rows["video"], rows["audio"]
    fits = 3 <= video.ndim <= 5 and audio.ndim == 3 and video.shape[:2] == audio.shape[:2] and 0 not in video.shape
    if not fits or video.shape[-1] != video_width or audio.shape[-1] != audio_width:
        raise EventError(
            f"event localisation: video must be (batch, time, [places,] {video_width}) and audio (batch, time, "
            f"{audio_width}), none of them empty, got {tuple(video.shape)} and {tuple(audio.shape)}"
        )
    return video.reshape(*video.shape[:2], -1, video_width), audio


def labels_of(rows: Rows) -> Int[Tensor, "batch time"]:
    """The labels of the seconds.

    Raises
    ------
    EventError
        They are missing, or their shape does not fit.
    """
    labels = rows.get("labels")
    if labels is None or labels.shape != rows["video"].shape[:2]:
        got = "none" if labels is None else str(tuple(labels.shape))
        raise EventError(f"event localisation: labels must be {tuple(rows['video'].shape[:2])}, got {got}")
    return labels


class UnscaledAttention(nn.Module):
    """softmax(Q K^T) V of one sequence's items among themselves, or of queries to it, without 1 / sqrt(width).

    Parameters
    ----------
    width
        Of the sequence, and of the result.
    key_width
        Of queries and keys.
    query_width
        Of what asks. Default: ``width``.
    """

    def __init__(self, width: int, key_width: int, query_width: int | None = None) -> None:
        super().__init__()
        self.query = nn.Linear(query_width or width, key_width)
        self.key = nn.Linear(width, key_width)
        self.value = nn.Linear(width, width)

    def forward(
        self, queries: Float[Tensor, "*batch asked query_width"], items: Float[Tensor, "*batch items width"]
    ) -> Float[Tensor, "*batch asked width"]:
        weights = (self.query(queries) @ self.key(items).mT).softmax(-1)
        attended: Tensor = weights @ self.value(items)
        return attended


class SelfAttention(nn.Module):
    """LayerNorm(x + dropout(`UnscaledAttention`(x)))."""

    def __init__(self, width: int, key_width: int, dropout: float) -> None:
        super().__init__()
        self.attention = UnscaledAttention(width, key_width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, items: Float[Tensor, "*batch items width"]) -> Float[Tensor, "*batch items width"]:
        attended: Tensor = self.norm(items + self.dropout(self.attention(items, items)))
        return attended


class PlaceWeights(nn.Module):
    """softmax over places of tanh(w . (ReLU(U y_n) * ReLU(W g))): how well each place fits a guide g."""

    def __init__(self, width: int, guide_width: int, hidden: int) -> None:
        super().__init__()
        self.place = nn.Linear(width, hidden)
        self.guide = nn.Linear(guide_width, hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(
        self, places: Float[Tensor, "batch time places width"], guide: Float[Tensor, "batch time guide_width"]
    ) -> Float[Tensor, "batch time places"]:
        agreement = self.place(places).relu() * self.guide(guide).relu()[:, :, None]
        weights: Tensor = self.score(agreement).tanh().squeeze(-1).softmax(-1)
        return weights


class SpatialChannelAttention(nn.Module):
    """One vector of each segment's places.

    With Y0 the places' features and Y = `SelfAttention` (Y0):

    * p = sum_n w_n Y_n, where w = `PlaceWeights` (Y, mean_n Y);
    * channel gate c = sigma(L ReLU(L mean_n(ReLU(L a) * ReLU(L Y_n)))), and Z = Y0 (1 + c): it gates Y0, not Y;
    * f = sum_n w'_n Z_n, where w' = `PlaceWeights` (Z, a);
    * result f + beta sigma(p) f.

    With one place, both spatial weights are 1. What remains is the channel gate and the picture's gate on itself.
    """

    def __init__(self, audio_width: int, beta: float, config: StreamConfig) -> None:
        super().__init__()
        width, hidden = config.attention_width, config.attention_hidden
        self.beta = beta
        self.among_places = SelfAttention(width, config.key_width, config.attention_dropout)
        self.own_weights = PlaceWeights(width, width, hidden)
        self.channel_place = nn.Linear(width, width)
        self.channel_audio = nn.Linear(audio_width, width)
        self.channel_gate = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.Sigmoid())
        self.audio_weights = PlaceWeights(width, audio_width, hidden)

    def forward(
        self, places: Float[Tensor, "batch time places width"], audio: Float[Tensor, "batch time audio_width"]
    ) -> Float[Tensor, "batch time width"]:
        attended = self.among_places(places)
        own = _weighted(self.own_weights(attended, attended.mean(2)), attended)
        agreement = self.channel_audio(audio).relu()[:, :, None] * self.channel_place(attended).relu()
        gated = places * (1 + self.channel_gate(agreement.mean(2))[:, :, None])
        pooled = _weighted(self.audio_weights(gated, audio), gated)
        return pooled + self.beta * own.sigmoid() * pooled


def _weighted(
    weights: Float[Tensor, "batch time places"], places: Float[Tensor, "batch time places width"]
) -> Float[Tensor, "batch time width"]:
    return (weights[:, :, None] @ places).squeeze(2)


def check_sizes(owner: str, video_width: int, audio_width: int, classes: int) -> None:
    """Raise `EventError` unless a head's sizes are at least 1."""
    for name, value in (("video_width", video_width), ("audio_width", audio_width), ("classes", classes)):
        require(value >= 1, f"{owner}: {name}", "at least 1", value)


def check_strength(owner: str, **strengths: float) -> None:
    """Raise `EventError` unless every named strength is at least 0 and finite."""
    for name, value in strengths.items():
        require(0 <= value < math.inf, f"{owner}: {name}", "at least 0 and finite", value)
