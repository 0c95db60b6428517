"""The parts of CMBS and CACE-Net that see time: gated streams of both modalities, and what joins them.

1. `GatedStreams` encodes each modality in time, lets it look at the other one, and says for each segment whether the
   encoded sound, and the encoded picture, hold an event: the gates.
2. `Fusion` joins the two modalities' sequences; `top_mean` averages the best segments of each class.

Source and checks as in `cmacc.heads.event_attention`. There are no position codes: only the LSTMs know the order.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmacc.heads.event_attention import StreamConfig


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
