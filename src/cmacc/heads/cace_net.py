"""CACE-Net (He et al., ACM MM 2024, arXiv:2408.01952): CMBS with guidance both ways, and contrast among segments.

Fully supervised only. With `CmbsCore` as the base:

1. Co-guidance. The picture is pooled with the sound's help, as in CMBS. The sound a is refined with the picture's help:
   a' = `SelfAttention` of its segments; query q = L mean_n(`SelfAttention` of the places), a second one with weights of
   its own; guide = `UnscaledAttention` of q to a'; a <- a (1 + psi sigma(guide)). The LSTMs get the result.
2. Contrastive enhancement. With H of the base, r = ReLU(L H) and r~ = ReLU(L (H + noise)), the same layer; of one
   video, the 2 T rows r / |r| and r~ / |r~| are contrasted (`segment_contrast`): event segments attract each other,
   a background segment only attracts its own other row.
3. From one eighth of training on, the loss has the contrast added with weight 1, and the event logit is L1 (H + lambda
   r), with r not normalised. Class logits are always of plain H.
4. Loss and prediction are otherwise those of `Cmbs`.

The switch depends on ``progress``, which must therefore be that of the weights also for predictions: the published
code's checkpoints do not tell.

Differences from the released code: the two attentions among places have a LayerNorm each (its second one is declared
and never used); there is no noise in evaluation, where only the predictions are of interest; the contrast is a masked
logsumexp, because e^(1 / 0.01) overflows in float32.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from cmacc.heads.cmbs import CmbsConfig, CmbsCore, EventScores, place_layer, supervised_loss, supervised_prediction
from cmacc.heads.event_attention import (
    SelfAttention,
    SpatialChannelAttention,
    StreamConfig,
    UnscaledAttention,
    check_sizes,
    check_strength,
    labels_of,
    require,
    video_and_audio,
)
from cmacc.heads.head import Head, Rows


@dataclass(frozen=True)
class CaceNetConfig:
    """Settings of `CaceNet`, with the published defaults.

    Parameters
    ----------
    psi
        Strength of the picture's guidance of the sound, at least 0; 0: none.
    temperature
        tau > 0 of the contrast.
    noise
        Standard deviation of the noise on H in the contrast, at least 0.
    enhancement
        lambda, weight of r in the event logit, at least 0.
    contrast_weight
        Weight of the contrast in the loss, at least 0.
    switch_on
        Share of the epochs, in [0, 1], from which on contrast and enhancement count; 1: never.
    weak
        Must be False: there is no weak form. The released one cannot be built.
    base
        Settings of the base.
    """

    psi: float = 0.3
    temperature: float = 0.01
    noise: float = 0.1
    enhancement: float = 0.6
    contrast_weight: float = 1.0
    switch_on: float = 1 / 8
    weak: bool = False
    base: CmbsConfig = field(default_factory=lambda: CmbsConfig(streams=StreamConfig(decoder_feedforward=512)))

    def __post_init__(self) -> None:
        check_strength(
            "CACE-Net",
            psi=self.psi,
            noise=self.noise,
            enhancement=self.enhancement,
            contrast_weight=self.contrast_weight,
        )
        require(self.temperature > 0, "CACE-Net: temperature", "above 0", self.temperature)
        require(0 <= self.switch_on <= 1, "CACE-Net: switch_on", "in [0, 1]", self.switch_on)
        require(
            not self.weak,
            "CACE-Net: weak",
            "False, as it is a supervised method (for weak labels, use CMBS or the linear head)",
            self.weak,
        )


class CoGuidance(nn.Module):
    """The picture's help for the sound (the module's step 1).

    Parameters
    ----------
    audio_width
        Width of the sound.
    config
        Settings.
    """

    def __init__(self, audio_width: int, config: CaceNetConfig) -> None:
        super().__init__()
        streams = config.base.streams
        self.psi = config.psi
        self.audio_attention = SelfAttention(audio_width, audio_width, streams.attention_dropout)
        self.among_places = SelfAttention(streams.attention_width, streams.key_width, streams.attention_dropout)
        self.guide = UnscaledAttention(audio_width, audio_width, query_width=streams.attention_width)

    def forward(
        self, places: Float[Tensor, "batch time places width"], audio: Float[Tensor, "batch time audio_width"]
    ) -> Float[Tensor, "batch time audio_width"]:
        guide: Tensor = self.guide(self.among_places(places).mean(2), self.audio_attention(audio))
        return audio * (1 + self.psi * guide.sigmoid())


class CaceNet(Head):
    """CACE-Net.

    Parameters
    ----------
    video_width, audio_width
        Widths of the features.
    classes
        Number of event classes, without background, which is the label after them.
    config
        Settings.
    """

    def __init__(self, video_width: int, audio_width: int, classes: int, config: CaceNetConfig | None = None) -> None:
        super().__init__()
        check_sizes("CACE-Net", video_width, audio_width, classes)
        self.config = config or CaceNetConfig()
        base = self.config.base
        self.widths = (video_width, audio_width)
        self.background = classes
        self.places = place_layer(video_width, base.streams)
        self.attention = SpatialChannelAttention(audio_width, base.beta, base.streams)
        self.guidance = CoGuidance(audio_width, self.config)
        self.core = CmbsCore(audio_width, classes, base)
        self.contrasted = nn.Sequential(nn.Linear(base.streams.model_width, base.streams.model_width), nn.ReLU())

    def forward(self, rows: Rows, progress: float) -> tuple[Float[Tensor, "batch time width"], EventScores]:
        """H, and the scores, with the event logits enhanced if the switch is on."""
        video, audio = video_and_audio(rows, *self.widths)
        places = self.places(video)
        fused, scores = self.core(self.attention(places, audio), self.guidance(places, audio))
        if self._is_on(progress):
            enhanced = fused + self.config.enhancement * self.contrasted(fused)
            scores = scores._replace(event=self.core.event(enhanced).squeeze(-1))
        return fused, scores

    def loss(self, rows: Rows, progress: float) -> Tensor:
        """The loss of `Cmbs`, and the contrast if the switch is on."""
        fused, scores = self(rows, progress)
        labels = labels_of(rows)
        loss = supervised_loss(scores, labels, self.background, released=self.config.base.released)
        if not self._is_on(progress):
            return loss
        noise = self.config.noise * torch.randn_like(fused) if self.training else 0
        contrast = segment_contrast(
            self.contrasted(fused), self.contrasted(fused + noise), labels != self.background, self.config.temperature
        )
        return loss + self.config.contrast_weight * contrast

    @torch.no_grad()
    def predict(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        """``classes``, ``event``, sigma(e), and ``gates``, gA gV; all (batch, time)."""
        return supervised_prediction(self(rows, progress)[1], self.background)

    def _is_on(self, progress: float) -> bool:
        return progress >= self.config.switch_on


def segment_contrast(
    rows: Float[Tensor, "batch time width"],
    other_rows: Float[Tensor, "batch time width"],
    event: Bool[Tensor, "batch time"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Contrast of the segments of each video, in two versions.

    With the 2 T unit vectors z of a video, of which P segments are events, and the positives of i: for an event, the
    2 P - 1 other rows of events; for background, its own other version;

        l_i = -log(sum over positives j of e^(z_i.z_j / tau)) + log(sum over all j != i) + log(number of positives).

    The result is the mean over i and videos, at least 0 where all positives score alike. The log is of the *sum* over
    positives, as released: it is at most the usual mean of logs, and content if one positive is near.
    """
    units = normalize(torch.cat([rows, other_rows], dim=1), dim=2)
    count, device = units.shape[1], units.device
    similarity = units @ units.mT / temperature
    own = torch.eye(count, dtype=torch.bool, device=device)
    is_event = event.repeat(1, 2)
    both = is_event[:, :, None] & is_event[:, None]
    # Of an event, the own other version is among the others of both.
    positive = (both | own.roll(count // 2, dims=1)) & ~own
    of_all = similarity.masked_fill(own, -torch.inf).logsumexp(2)
    of_positives = similarity.masked_fill(~positive, -torch.inf).logsumexp(2)
    # Converted first: the log of whole numbers would be in float32.
    return (of_all - of_positives + positive.sum(2).to(similarity.dtype).log()).mean()
