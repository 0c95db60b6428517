"""The parts that CMBS (Xia and Zhao, CVPR 2022) and CACE-Net (He et al., ACM MM 2024) share.

Of a video's segments t = 1..T, with places n of the picture (one or many) and sound a_t:

1. `SpatialChannelAttention` makes one vector of a segment's places: the sound says which channels and places matter,
   and the picture, by attention among its own places, which channels to strengthen.
2. `GatedStreams` encodes each modality in time, lets it look at the other one, and says for each segment whether the
   encoded sound, and the encoded picture, hold an event: the gates.
3. `Fusion` joins the two modalities' sequences; `top_mean` averages the best segments of each class.

The equations were read from the released code of CMBS, which says itself that its attention differs from the paper's.
Tensors are (batch, time, ...). There are no position codes anywhere: only the LSTMs know the order.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cmacc.heads.segment_accuracy import EventError

Rows = Mapping[str, Tensor]
"""Named tensors with one row per video: ``video``, ``audio`` and, for training, ``labels``."""


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
    picture, width).

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


class Streams(NamedTuple):
    """Both modalities in time, each having looked at the other, and the logits of the gates.

    Attributes
    ----------
    video, audio
        Shape (batch, time, d).
    video_gate, audio_gate
        Shape (batch, time): whether the encoded picture, and the encoded sound, hold an event.
    """

    video: Tensor
    audio: Tensor
    video_gate: Tensor
    audio_gate: Tensor


class GatedStreams(nn.Module):
    """Encoders, decoders and gates.

    1. If ``recurrent``, a bidirectional LSTM for each modality, to width d of the sound and 2 d of the picture.
    2. Encoder: linear to d, then transformer layers with the norm last.
    3. Decoder: linear to d, then one layer whose queries are the modality's own steps, and whose keys are those of the
       *encoded* other modality and its own ones, 2 T together.
    4. Gate: linear to one number, of the encoded sequence.
    """

    def __init__(self, video_width: int, audio_width: int, config: StreamConfig, *, recurrent: bool) -> None:
        super().__init__()
        width = config.model_width
        self.recurrent = recurrent
        if recurrent:
            self.video_lstm = nn.LSTM(video_width, width, batch_first=True, bidirectional=True)
            self.audio_lstm = nn.LSTM(audio_width, width // 2, batch_first=True, bidirectional=True)
            video_width, audio_width = 2 * width, width
        self.video_encoder = _encoder(video_width, config)
        self.audio_encoder = _encoder(audio_width, config)
        self.video_decoder = CrossDecoder(video_width, config)
        self.audio_decoder = CrossDecoder(audio_width, config)
        self.video_gate = nn.Linear(width, 1)
        self.audio_gate = nn.Linear(width, 1)

    def forward(
        self, video: Float[Tensor, "batch time video_width"], audio: Float[Tensor, "batch time audio_width"]
    ) -> Streams:
        if self.recurrent:
            video, audio = self.video_lstm(video)[0], self.audio_lstm(audio)[0]
        encoded_video, encoded_audio = self.video_encoder(video), self.audio_encoder(audio)
        return Streams(
            self.video_decoder(video, encoded_audio),
            self.audio_decoder(audio, encoded_video),
            self.video_gate(encoded_video).squeeze(-1),
            self.audio_gate(encoded_audio).squeeze(-1),
        )


def _encoder(input_width: int, config: StreamConfig) -> nn.Sequential:
    layer = nn.TransformerEncoderLayer(
        config.model_width, config.heads, config.encoder_feedforward, config.dropout, batch_first=True
    )
    return nn.Sequential(
        nn.Linear(input_width, config.model_width),
        nn.TransformerEncoder(layer, config.encoder_layers, enable_nested_tensor=False),
    )


class CrossDecoder(nn.Module):
    """One layer of attention from a sequence to another one and to itself, with the norm last."""

    def __init__(self, input_width: int, config: StreamConfig) -> None:
        super().__init__()
        width, dropout = config.model_width, config.dropout
        self.project = nn.Linear(input_width, width)
        self.attention = nn.MultiheadAttention(width, config.heads, dropout, batch_first=True)
        self.feedforward = nn.Sequential(
            nn.Linear(width, config.decoder_feedforward),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(config.decoder_feedforward, width),
        )
        self.dropout = nn.Dropout(dropout)
        self.attention_norm = nn.LayerNorm(width)
        self.feedforward_norm = nn.LayerNorm(width)

    def forward(
        self, own: Float[Tensor, "batch time input_width"], other: Float[Tensor, "batch time width"]
    ) -> Float[Tensor, "batch time width"]:
        own = self.project(own)
        memory = torch.cat([other, own], dim=1)
        own = self.attention_norm(own + self.dropout(self.attention(own, memory, memory, need_weights=False)[0]))
        decoded: Tensor = self.feedforward_norm(own + self.dropout(self.feedforward(own)))
        return decoded


class Fusion(nn.Module):
    """H = (V' + A') / 2, where V' = J(V, A) and then A' = J'(A, V'): the second call sees the first one's result.

    J(p, q) = LayerNorm(g + dropout(attention of g to the steps of q and p)), where g = p * q.
    """

    def __init__(self, config: StreamConfig) -> None:
        super().__init__()
        width, heads = config.model_width, config.fusion_heads
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(width, heads, config.attention_dropout, batch_first=True) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, video: Float[Tensor, "batch time width"], audio: Float[Tensor, "batch time width"]
    ) -> Float[Tensor, "batch time width"]:
        video = self._joined(0, video, audio)
        return (video + self._joined(1, audio, video)) / 2

    def _joined(self, number: int, own: Tensor, other: Tensor) -> Tensor:
        product, memory = own * other, torch.cat([other, own], dim=1)
        attended = self.attentions[number](product, memory, memory, need_weights=False)[0]
        joined: Tensor = self.norms[number](product + self.dropout(attended))
        return joined


def top_mean(scores: Float[Tensor, "batch time classes"], count: int) -> Float[Tensor, "batch classes"]:
    """Per class, the mean of its ``count`` highest segments, or of all if there are fewer."""
    return scores.topk(min(count, scores.shape[1]), dim=1).values.mean(1)


def check_sizes(owner: str, video_width: int, audio_width: int, classes: int) -> None:
    """Raise `EventError` unless a head's sizes are at least 1."""
    for name, value in (("video_width", video_width), ("audio_width", audio_width), ("classes", classes)):
        require(value >= 1, f"{owner}: {name}", "at least 1", value)


def check_strength(owner: str, **strengths: float) -> None:
    """Raise `EventError` unless every named strength is at least 0 and finite."""
    for name, value in strengths.items():
        require(0 <= value < math.inf, f"{owner}: {name}", "at least 0 and finite", value)
