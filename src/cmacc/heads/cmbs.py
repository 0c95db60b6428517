"""CMBS, cross-modal background suppression (Xia and Zhao, CVPR 2022): supervised and weak event localisation.

Supervised (`Cmbs`), with y_t = 1 in event seconds and c the video's event class:

1. Places X -> ReLU(linear) -> `SpatialChannelAttention` -> `GatedStreams` with LSTMs: sequences V, A and gates gV, gA.
2. Each modality's gate strengthens the *other* one: V <- V (1 + alpha gA), A <- A (1 + alpha gV).
3. Class scores of the streams: av = (topmean_t(L V) + topmean_t(L' A)) / 2, of the 4 best seconds of each class.
4. H = `Fusion` (V, A); event logit e_t = L1 H_t; class logits k = L28 max_t H_t + gamma av.
5. Loss = BCE(sigma(e), y) + BCE(gA gV, y) + CE(k, c) + CE(av, c). The class of second t is argmax k if
   sigma(e_t) > 0.5, else background (M2 of `cmacc.heads.segment_accuracy`).

Weak (`WeakCmbs`), from the video's class alone, background among the classes:

1. As above, without LSTMs. V <- (1 - alpha) V + alpha gA V, A the same with gV; mean gate g_t = (gA + gV) / 2.
2. z = topmean_t((gamma sigma(L V) + gamma sigma(L' A)) * L29 H); video scores o = z max_t g_t.
3. Loss = the multi-label soft margin of o + BCE(max_t g_t, whether the video has an event). The class of second t is
   argmax z if g_t > 0.5, else background (M3).

The last term is ours. Without it nothing ever pushes a gate down: on a planted problem all gates were above 0.9 in the
end, and every second was an event. It needs training videos without any event; without such, gates cannot localise.
With them, the gates tell well which videos have an event, and the seconds of it only for some seeds: the encoders mix
the seconds, and no label says which one a gate is for.

``released=True`` has what the released code does instead, for its published numbers:

* supervised, BCE(gA gV, y) takes the product for a logit. It lies in (0, 1) already, so that the loss can never fall
  below 0.313 in an event second and 0.693 in others, and pushes gates together rather than to 0 and 1;
* weak, the gates stay in their own modality; o = max_t(g_t z), which for z < 0 takes the *smallest* gate; the loss is
  the soft margin alone, of softmax(o), and so lies in 0.680 to 0.715 (28 classes) whatever is learnt; and the gate
  passes a second sigmoid in the end, so that every second is an event (M4).

Not from the code: videos without any event second count in the event losses, and not in the class losses. In the
released code they have class 0 by accident (one row of the published training split).
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import logsigmoid

from cmacc.heads.event_attention import (
    SpatialChannelAttention,
    StreamConfig,
    check_sizes,
    check_strength,
    labels_of,
    require,
    video_and_audio,
)
from cmacc.heads.event_streams import Fusion, GatedStreams, top_mean
from cmacc.heads.head import Head, Rows
from cmacc.heads.segment_accuracy import gated_classes, released_weak_classes, video_classes


@dataclass(frozen=True)
class CmbsConfig:
    """Settings of `Cmbs`, with the published defaults.

    Parameters
    ----------
    alpha
        Strength of the gates, at least 0; 0: none.
    beta
        Strength of the picture's gate on itself, in `SpatialChannelAttention`, at least 0.
    gamma
        Weight of the streams' class scores, at least 0.
    best_seconds
        Number of seconds that `top_mean` averages.
    released
        Whether the gates' loss is that of the released code; see the module.
    streams
        Sizes and dropout.
    """

    alpha: float = 0.1
    beta: float = 0.4
    gamma: float = 0.3
    best_seconds: int = 4
    released: bool = False
    streams: StreamConfig = field(default_factory=StreamConfig)

    def __post_init__(self) -> None:
        check_strength("CMBS", alpha=self.alpha, beta=self.beta, gamma=self.gamma)
        require(self.best_seconds >= 1, "CMBS: best_seconds", "at least 1", self.best_seconds)


@dataclass(frozen=True)
class WeakCmbsConfig:
    """Settings of `WeakCmbs`, with the published defaults; as in `CmbsConfig`, except as follows.

    Parameters
    ----------
    alpha
        In [0, 1]. 0: no gates on the streams. With the gates at 0, the streams are scaled by 1 - alpha.
    gamma
        Weight of each modality's class gate.
    released
        Whether gates, scores, loss and prediction are those of the released code; see the module.
    """

    alpha: float = 0.2
    beta: float = 0.5
    gamma: float = 0.5
    best_seconds: int = 4
    released: bool = False
    streams: StreamConfig = field(
        default_factory=lambda: StreamConfig(encoder_feedforward=2048, fusion_heads=2, input_dropout=0.1)
    )

    def __post_init__(self) -> None:
        check_strength("weak CMBS", beta=self.beta, gamma=self.gamma)
        require(0 <= self.alpha <= 1, "weak CMBS: alpha", "in [0, 1]", self.alpha)
        require(self.best_seconds >= 1, "weak CMBS: best_seconds", "at least 1", self.best_seconds)


class EventScores(NamedTuple):
    """What the supervised heads' losses and predictions come from.

    Attributes
    ----------
    event
        Shape (batch, time): logits e.
    classes
        Shape (batch, event classes): logits k.
    streams
        Shape (batch, event classes): av, the streams' class scores.
    video_gate, audio_gate
        Shape (batch, time): logits of the gates.
    """

    event: Tensor
    classes: Tensor
    streams: Tensor
    video_gate: Tensor
    audio_gate: Tensor


class CmbsCore(nn.Module):
    """Supervised CMBS after the attention over places: steps 1 (streams) to 4. CACE-Net is built on it too.

    Parameters
    ----------
    audio_width
        Width of the sound's features.
    classes
        Number of event classes.
    config
        Settings.
    """

    def __init__(self, audio_width: int, classes: int, config: CmbsConfig) -> None:
        super().__init__()
        self.config = config
        width = config.streams.model_width
        self.streams = GatedStreams(config.streams.attention_width, audio_width, config.streams, recurrent=True)
        self.video_classes = nn.Linear(width, classes)
        self.audio_classes = nn.Linear(width, classes)
        self.fusion = Fusion(config.streams)
        self.event = nn.Linear(width, 1)
        self.classes = nn.Linear(width, classes)

    def forward(
        self, video: Float[Tensor, "batch time video_width"], audio: Float[Tensor, "batch time audio_width"]
    ) -> tuple[Float[Tensor, "batch time width"], EventScores]:
        """H, and the scores from it."""
        alpha, best = self.config.alpha, self.config.best_seconds
        streams = self.streams(video, audio)
        # Crossed: what is heard tells where to trust what is seen, and the other way round.
        video = streams.video * (1 + alpha * streams.audio_gate.sigmoid()[..., None])
        audio = streams.audio * (1 + alpha * streams.video_gate.sigmoid()[..., None])
        of_streams = (top_mean(self.video_classes(video), best) + top_mean(self.audio_classes(audio), best)) / 2
        fused = self.fusion(video, audio)
        classes = self.classes(fused.amax(1)) + self.config.gamma * of_streams
        return fused, EventScores(
            self.event(fused).squeeze(-1), classes, of_streams, streams.video_gate, streams.audio_gate
        )


class Cmbs(Head):
    """Supervised CMBS.

    Parameters
    ----------
    video_width, audio_width
        Widths of the features.
    classes
        Number of event classes, without background, which is the label after them.
    config
        Settings.
    """

    def __init__(self, video_width: int, audio_width: int, classes: int, config: CmbsConfig | None = None) -> None:
        super().__init__()
        check_sizes("CMBS", video_width, audio_width, classes)
        self.config = config or CmbsConfig()
        self.widths = (video_width, audio_width)
        self.background = classes
        self.places = place_layer(video_width, self.config.streams)
        self.attention = SpatialChannelAttention(audio_width, self.config.beta, self.config.streams)
        self.core = CmbsCore(audio_width, classes, self.config)

    def forward(self, rows: Rows) -> EventScores:
        """The scores of the batch."""
        video, audio = video_and_audio(rows, *self.widths)
        scores: EventScores = self.core(self.attention(self.places(video), audio), audio)[1]
        return scores

    def loss(self, rows: Rows, progress: float) -> Tensor:
        """The sum of the four terms."""
        return supervised_loss(self(rows), labels_of(rows), self.background, released=self.config.released)

    @torch.no_grad()
    def predict(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        """``classes``, ``event``, sigma(e), and ``gates``, gA gV; all (batch, time)."""
        return supervised_prediction(self(rows), self.background)


class WeakCmbs(Head):
    """Weakly supervised CMBS: of ``labels``, training only uses the class of each video (`video_classes`).

    Published training adds 178 videos without any event (`read_background_features`). Parameters as of `Cmbs`.
    """

    def __init__(self, video_width: int, audio_width: int, classes: int, config: WeakCmbsConfig | None = None) -> None:
        super().__init__()
        check_sizes("weak CMBS", video_width, audio_width, classes)
        self.config = config or WeakCmbsConfig()
        self.widths = (video_width, audio_width)
        self.background = classes
        streams = self.config.streams
        self.places = place_layer(video_width, streams)
        self.attention = SpatialChannelAttention(audio_width, self.config.beta, streams)
        self.streams = GatedStreams(streams.attention_width, audio_width, streams, recurrent=False)
        self.fusion = Fusion(streams)
        self.video_classes = nn.Linear(streams.model_width, classes + 1)
        self.audio_classes = nn.Linear(streams.model_width, classes + 1)
        self.classes = nn.Linear(streams.model_width, classes + 1, bias=False)

    def forward(self, rows: Rows) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch time"]]:
        """z, with background last, and the mean gates."""
        video, audio = video_and_audio(rows, *self.widths)
        streams = self.streams(self.attention(self.places(video), audio), audio)
        gates = streams.video_gate.sigmoid(), streams.audio_gate.sigmoid()
        of_video, of_audio = gates if self.config.released else gates[::-1]
        alpha, gamma = self.config.alpha, self.config.gamma
        video = streams.video * (1 - alpha + alpha * of_video[..., None])
        audio = streams.audio * (1 - alpha + alpha * of_audio[..., None])
        # The class gates are of the streams before they are fused.
        class_gates = gamma * self.video_classes(video).sigmoid() + gamma * self.audio_classes(audio).sigmoid()
        scores = class_gates * self.classes(self.fusion(video, audio))
        return top_mean(scores, self.config.best_seconds), (gates[0] + gates[1]) / 2

    def loss(self, rows: Rows, progress: float) -> Tensor:
        """The loss of the module's step 3."""
        scores, gates = self(rows)
        classes = video_classes(labels_of(rows), self.background)
        target = functional.one_hot(classes, self.background + 1).to(scores.dtype)
        if self.config.released:
            of_video = (gates[..., None] * scores[:, None]).amax(1).softmax(1)
            return functional.multilabel_soft_margin_loss(of_video, target)
        highest = gates.amax(1)
        of_classes = functional.multilabel_soft_margin_loss(scores * highest[:, None], target)
        return of_classes + functional.binary_cross_entropy(highest, (classes != self.background).to(scores.dtype))

    @torch.no_grad()
    def predict(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        """``classes``, ``event`` and ``gates``, g; all (batch, time)."""
        scores, gates = self(rows)
        if self.config.released:
            return {
                "classes": released_weak_classes(scores, gates, self.background),
                "event": gates.sigmoid(),
                "gates": gates,
            }
        return {"classes": gated_classes(scores, gates, self.background), "event": gates, "gates": gates}


def place_layer(video_width: int, config: StreamConfig) -> nn.Sequential:
    """What adapts the picture's features of any encoder to the attention."""
    return nn.Sequential(nn.Linear(video_width, config.attention_width), nn.ReLU(), nn.Dropout(config.input_dropout))


def supervised_loss(
    scores: EventScores, labels: Int[Tensor, "batch time"], background: int, *, released: bool
) -> Float[Tensor, ""]:
    """The loss of `Cmbs` (the module's step 5)."""
    event = (labels != background).to(scores.event.dtype)
    classes = video_classes(labels, background)
    video, audio = scores.video_gate, scores.audio_gate
    if released:
        gates = functional.binary_cross_entropy_with_logits(video.sigmoid() * audio.sigmoid(), event)
    else:
        # log(1 - gV gA) = log((1 - gV) + gV (1 - gA)): from logits, gates that have reached 0 or 1 keep a gradient.
        is_event = logsigmoid(video) + logsigmoid(audio)
        is_none = torch.logaddexp(logsigmoid(-video), logsigmoid(video) + logsigmoid(-audio))
        gates = -(event * is_event + (1 - event) * is_none).mean()
    return (
        functional.binary_cross_entropy_with_logits(scores.event, event)
        + gates
        + _class_loss(scores.classes, classes, background)
        + _class_loss(scores.streams, classes, background)
    )


def _class_loss(
    logits: Float[Tensor, "batch classes"], classes: Int[Tensor, " batch"], background: int
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the videos with an event; 0 if there is none, where PyTorch's own mean would be NaN."""
    total = functional.cross_entropy(logits, classes, ignore_index=background, reduction="sum")
    return total / (classes != background).sum().clamp_min(1)


def supervised_prediction(scores: EventScores, background: int) -> dict[str, Tensor]:
    """What `Cmbs` and `CaceNet` predict."""
    event = scores.event.sigmoid()
    return {
        "classes": gated_classes(scores.classes, event, background),
        "event": event,
        "gates": scores.video_gate.sigmoid() * scores.audio_gate.sigmoid(),
    }
