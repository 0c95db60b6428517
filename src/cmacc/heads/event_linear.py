"""The plain head of event localisation: one linear layer on each second's features, and nothing that sees time.

1. The features of both modalities, the picture's averaged over places, are standardised with the training rows'
   statistics and concatenated.
2. A linear layer scores all classes, and background, in each second.
3. Supervised: cross-entropy of each second. Weak: the scores are pooled over time, by maximum (as Tian et al., 2018) or
   mean (as PSP), and the cross-entropy is that of the video's class. Their released losses apply a sigmoid to a softmax
   and vary between 0.680 and 0.715 in all; this is the plain form.
4. The class of a second is that of its highest score (M1 of `cmacc.heads.segment_accuracy`), in both settings.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from cmacc.heads.event_attention import check_sizes, labels_of, require, video_and_audio
from cmacc.heads.head import Head, Rows, feature_statistics
from cmacc.heads.segment_accuracy import EventError, classes_per_second, video_classes

Pooling = Literal["max", "mean"]
"""How weak training pools a video's scores over time."""
_CHUNK = 256  # rows averaged over places at a time: the features of a whole training split in float64 would be 7 GB


@dataclass(frozen=True)
class EventLinearConfig:
    """Settings of `EventLinear`.

    Parameters
    ----------
    weak
        Whether training only sees the class of each video. Background is then only learnt from videos without any
        event.
    pooling
        Of the weak setting.
    """

    weak: bool = False
    pooling: Pooling = "max"

    def __post_init__(self) -> None:
        require(
            self.pooling in get_args(Pooling),
            "linear event head: pooling",
            f"one of {', '.join(get_args(Pooling))}",
            repr(self.pooling),
        )


class EventLinear(Head):
    """A linear layer per second.

    Parameters
    ----------
    video_width, audio_width
        Widths of the features.
    classes
        Number of event classes, without background, which is the label after them.
    config
        Settings.
    """

    mean: Tensor
    scale: Tensor
    is_standardised: Tensor

    def __init__(
        self, video_width: int, audio_width: int, classes: int, config: EventLinearConfig | None = None
    ) -> None:
        super().__init__()
        check_sizes("linear event head", video_width, audio_width, classes)
        self.config = config or EventLinearConfig()
        self.widths = (video_width, audio_width)
        self.background = classes
        self.layer = nn.Linear(video_width + audio_width, classes + 1)
        # Buffers, so that they are saved with the weights: with other statistics these would mean something else.
        self.register_buffer("mean", torch.zeros(video_width + audio_width))
        self.register_buffer("scale", torch.ones(video_width + audio_width))
        self.register_buffer("is_standardised", torch.tensor(False))

    @torch.no_grad()
    def standardise(self, rows: Rows) -> None:
        """Take mean and standard deviation of each feature over all seconds of the *training* rows, before training.

        A constant feature is only centred.
        """
        count = len(rows["audio"])
        parts = [
            self._features({name: rows[name][start : start + _CHUNK] for name in ("video", "audio")}).flatten(0, 1)
            for start in range(0, count, _CHUNK)
        ]
        if not parts:
            raise EventError("linear event head: training rows must not be empty, got 0 rows")
        mean, scale = feature_statistics(torch.cat(parts))
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        self.is_standardised.fill_(True)

    def loss(self, rows: Rows, progress: float) -> Tensor:
        """Cross-entropy of the seconds, or of the videos if weak."""
        scores, labels = self._scores(rows), labels_of(rows)
        if not self.config.weak:
            return functional.cross_entropy(scores.flatten(0, 1), labels.flatten())
        pooled = scores.amax(1) if self.config.pooling == "max" else scores.mean(1)
        return functional.cross_entropy(pooled, video_classes(labels, self.background))

    @torch.no_grad()
    def predict(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        """``classes`` (batch, time), and ``event`` (batch, time), the probability of any class but background."""
        scores = self._scores(rows)
        return {"classes": classes_per_second(scores), "event": 1 - scores.softmax(-1)[..., self.background]}

    def _features(self, rows: Rows) -> Float[Tensor, "batch time features"]:
        video, audio = video_and_audio(rows, *self.widths)
        return torch.cat([video.mean(2), audio], dim=-1)

    def _scores(self, rows: Rows) -> Float[Tensor, "batch time classes"]:
        if not self.is_standardised:
            raise EventError("linear event head: standardise must be called with the training rows first")
        scores: Tensor = self.layer((self._features(rows) - self.mean) / self.scale)
        return scores
