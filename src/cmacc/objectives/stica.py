"""Space-time crops of the feature map (STiCA; Patrick et al., 2021, arXiv:2103.10211).

Multi-crop learning encodes many crops of each clip. Here a clip's two views are encoded once, and crops are taken of
their feature maps: what crops cost is the pooling and the head, not the backbone (`benchmarks/stica.py`).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmacc.objectives.crossmodal import CrossModalContrast, DirectionLoss
from cmacc.objectives.objective import BatchViews, Drawn, ExtraInput, ObjectiveInputs, ObjectiveResult

_VIEW = "view"


@dataclass(frozen=True)
class STiCAConfig:
    """Settings of `STiCA`.

    Parameters
    ----------
    temperature
        tau > 0, of video against audio.
    crop_temperature
        tau > 0, of crops against crops.
    alpha
        Share of the crops' loss in the whole, in [0, 1]. With 0, or without crops, there is only video against audio.
    space_large, space_small
        Height and width of crops in space, as shares of the map's, in (0, 1]; small is at most large. They are rounded
        to whole places, and are at least one. The paper's are 6 and 4 of 7 places.
    time_large, time_small
        Length of crops in time, as shares of the map's.
    large_crops, small_crops
        Crops of each kind (space, time), size and view: at least 0. Small crops are compared with large ones, so
        without large crops there must not be small ones.
    decoupled
        Whether to exclude the positive from the denominators (`CrossModalContrast`); the paper does not.

    Raises
    ------
    ValueError
        A setting is out of its range.
    """

    temperature: float = 0.1
    crop_temperature: float = 0.5
    alpha: float = 0.5
    space_large: float = 6 / 7
    space_small: float = 4 / 7
    time_large: float = 3 / 4
    time_small: float = 1 / 2
    large_crops: int = 1
    small_crops: int = 1
    decoupled: bool = True

    def __post_init__(self) -> None:
        for name in ("temperature", "crop_temperature"):
            self._require(0 < getattr(self, name) < math.inf, name, "positive and finite")
        self._require(0 <= self.alpha <= 1, "alpha", "in [0, 1]")
        for axes in ("space", "time"):
            self._require(0 < getattr(self, f"{axes}_large") <= 1, f"{axes}_large", "in (0, 1]")
            large = getattr(self, f"{axes}_large")
            self._require(
                0 < getattr(self, f"{axes}_small") <= large,
                f"{axes}_small",
                f"above 0 and at most {axes}_large ({large})",
            )
        for name in ("large_crops", "small_crops"):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        self._require(
            self.large_crops > 0 or self.small_crops == 0,
            "small_crops",
            "0 without large crops, which small ones are compared with",
        )

    def _require(self, holds: bool, name: str, wanted: str) -> None:
        if not holds:
            raise ValueError(f"objective.stica.{name} must be {wanted}, got {getattr(self, name)}")


class STiCA(nn.Module):
    """Video against audio on whole clips, and crops of one video view's map against those of the other.

    With v1 and v2, two augmented views of a clip, its sound a, N(q, k), the contrast of queries with the keys of the
    batch, S(x, y) = (N(x, y) + N(y, x)) / 2, and sg, which stops the gradient:

        loss = (1 - alpha) (S(v1, a) + S(v2, a)) / 2 + alpha crops,

    where ``crops`` is the mean of these terms, of crops in space and in time:

    * S(large_i of v1, large_i of v2), for each large crop i;
    * N(small_j of v1, sg(large_i of v2)) and N(small_j of v2, sg(large_i of v1)), for each i and j. A small crop is to
      say what the large one says, which sees more, and not the other way round.

    In S both sides have a gradient, as in `BidirectionalContrast` with online keys. The released code stops it at every
    key.

    Notes
    -----
    Metrics: ``video_to_audio/loss``, ``audio_to_video/loss`` and ``top1`` of each, means of both views; ``crops/loss``;
    ``loss``. Losses are NaN without negatives, and the crops' without crops.

    Each crop is the same for all samples of a batch. It begins anywhere where it fits, with equal chances.
    """

    needs_keys = False

    def __init__(self, config: STiCAConfig | None = None) -> None:
        super().__init__()
        self.config = config or STiCAConfig()
        self.contrast = CrossModalContrast(self.config.temperature, decoupled=self.config.decoupled)
        self.crop_contrast = CrossModalContrast(self.config.crop_temperature, decoupled=self.config.decoupled)

    @property
    def needs_feature_maps(self) -> bool:
        """Whether there are crops."""
        return self.config.alpha > 0 and self.config.large_crops > 0

    def draw(self, batch: BatchViews) -> Drawn:
        """The other view of the video."""
        return Drawn({_VIEW: ExtraInput("video", batch.another("video"), self.needs_feature_maps)})

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveResult:
        """The loss of a batch.

        Raises
        ------
        ValueError
            There are crops, and a view of the video has no feature map over time and space.
        """
        first, second = inputs.queries["video"], inputs.more[_VIEW]
        audio, ids = inputs.queries["audio"].embedding, inputs.sample_ids
        to_audio = [self.contrast(view.embedding, audio, ids, ids) for view in (first, second)]
        to_video = [self.contrast(audio, view.embedding, ids, ids) for view in (first, second)]
        loss = _mean([term.loss for term in to_audio + to_video])
        crops = torch.full_like(loss, torch.nan)
        if self.needs_feature_maps:
            crops = self._crops_loss(inputs, (first.feature_map, second.feature_map))
            loss = (1 - self.config.alpha) * loss + self.config.alpha * crops
        losses = {
            "video_to_audio/loss": _mean([term.loss for term in to_audio]),
            "audio_to_video/loss": _mean([term.loss for term in to_video]),
            "crops/loss": crops,
            "loss": loss,
        }
        # Without negatives a loss of 0 would look like the best possible one.
        contrasted = to_audio[0].ceiling > 0
        metrics = {name: torch.where(contrasted, value.detach(), torch.nan) for name, value in losses.items()}
        metrics["video_to_audio/top1"] = _mean([term.top1 for term in to_audio])
        metrics["audio_to_video/top1"] = _mean([term.top1 for term in to_video])
        return ObjectiveResult(loss, metrics)

    def _crops_loss(self, inputs: ObjectiveInputs, maps: tuple[Tensor | None, Tensor | None]) -> Float[Tensor, ""]:
        """The mean of the terms of all crops, in space and in time."""
        config, terms = self.config, list[Tensor]()
        for large_shares, small_shares in (
            ((1.0, config.space_large), (1.0, config.space_small)),
            ((config.time_large, 1.0), (config.time_small, 1.0)),
        ):
            large = [_embedded_crops(inputs, one, *large_shares, config.large_crops) for one in maps]
            small = [_embedded_crops(inputs, one, *small_shares, config.small_crops) for one in maps]
            terms += [
                _mean([self._among(x, y, inputs), self._among(y, x, inputs)]) for x, y in zip(*large, strict=True)
            ]
            for queries, keys in ((small[0], large[1]), (small[1], large[0])):
                terms += [self._among(q, k.detach(), inputs) for k, q in itertools.product(keys, queries)]
        return _mean(terms)

    def _among(
        self, queries: Float[Tensor, "batch dim"], keys: Float[Tensor, "batch dim"], inputs: ObjectiveInputs
    ) -> Float[Tensor, ""]:
        """N(queries, keys) of crops."""
        result: DirectionLoss = self.crop_contrast(queries, keys, inputs.sample_ids, inputs.sample_ids)
        return result.loss


def random_crop(
    feature_map: Float[Tensor, "batch channels map_time map_height map_width"],
    time_share: float,
    space_share: float,
    rng: np.random.Generator,
) -> Float[Tensor, "batch channels crop_time crop_height crop_width"]:
    """One crop, the same of all samples, that begins anywhere where it fits with equal chances.

    Parameters
    ----------
    feature_map
        ``(M, C, T, H, W)``.
    time_share, space_share
        Size of the crop as shares of T, and of H and W, in (0, 1]; rounded to whole places, at least one. With 1, the
        crop is the whole of that axis.
    rng
        Chooses where the crop begins.
    """
    time, rows, columns = (
        _window(size, share, rng)
        for size, share in zip(feature_map.shape[2:], (time_share, space_share, space_share), strict=True)
    )
    return feature_map[:, :, time, rows, columns]


def _window(size: int, share: float, rng: np.random.Generator) -> slice:
    length = max(1, round(share * size))
    first = int(rng.integers(0, size - length, endpoint=True))
    return slice(first, first + length)


def _embedded_crops(
    inputs: ObjectiveInputs, feature_map: Tensor | None, time_share: float, space_share: float, count: int
) -> list[Tensor]:
    """``count`` random crops of a video's map, ``(M, d)`` each."""
    if feature_map is None or feature_map.ndim != 5:
        got = "none" if feature_map is None else str(tuple(feature_map.shape))
        raise ValueError(f"STiCA: the video must have a feature map (M, C, T, H, W), got {got}")
    crops = [random_crop(feature_map, time_share, space_share, inputs.rng) for _ in range(count)]
    return [inputs.project("video", crop).embedding for crop in crops]


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()
