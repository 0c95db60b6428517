"""Augmentation of a batch on its device. `draw_view` draws parameters per sample; applying them is deterministic.

All frames of a clip share one crop, flip and colour change, so that motion is preserved.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional

# Rounded mean and deviation of Kinetics pixels, close to what the torchvision video models expect.
_PIXEL_MEAN, _PIXEL_DEVIATION = 0.43, 0.22
_GREY_WEIGHTS = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class AugmentConfig:
    """Strength of the augmentation of training views; zeros (and ``min_crop_area=1``) mean no change.

    Parameters
    ----------
    min_crop_area
        Smallest share of the frame area that a random resized crop keeps, in (0, 1].
    max_aspect_change
        Largest factor of change in the aspect ratio of the crop, >= 1.
    flip_probability, grey_probability
        Probability of a horizontal flip, and of conversion to grey. With 1 for ``grey_probability``, training and
        evaluation both use grey frames.
    brightness, contrast, saturation
        Factors are drawn from ``[1 - x, 1 + x]``, x in [0, 1).
    gain_db
        Largest change of the audio level, up or down.
    time_mask, frequency_mask
        Largest masked share of the spectrogram's axes, in [0, 1).
    """

    min_crop_area: float = 0.4
    max_aspect_change: float = 1.2
    flip_probability: float = 0.5
    grey_probability: float = 0.1
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    gain_db: float = 6.0
    time_mask: float = 0.15
    frequency_mask: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.min_crop_area <= 1:
            raise ValueError(f"AugmentConfig: min_crop_area must be in (0, 1], got {self.min_crop_area}")
        if not self.max_aspect_change >= 1:
            raise ValueError(f"AugmentConfig: max_aspect_change must be at least 1, got {self.max_aspect_change}")
        for name in ("flip_probability", "grey_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"AugmentConfig: {name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation", "time_mask", "frequency_mask"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"AugmentConfig: {name} must be in [0, 1), got {getattr(self, name)}")
        if not self.gain_db >= 0:
            raise ValueError(f"AugmentConfig: gain_db must be at least 0, got {self.gain_db}")


@dataclass(frozen=True)
class View:
    """Parameters of one augmentation. Crops and masks are relative to the frame or spectrogram size, in [0, 1]."""

    crop_top: float
    crop_left: float
    crop_height: float
    crop_width: float
    flip: bool
    grey: bool
    brightness: float
    contrast: float
    saturation: float
    gain_db: float
    time_mask: tuple[float, float]
    frequency_mask: tuple[float, float]


def draw_view(config: AugmentConfig, rng: np.random.Generator) -> View:
    """Draw one view. The number of draws is constant, so that switching off one part does not change the others."""
    area, aspect, top, left, flip, grey, brightness, contrast, saturation, gain = rng.random(10).tolist()
    time_length, time_start, band_width, band_start = rng.random(4).tolist()
    scale = math.sqrt(config.min_crop_area + (1 - config.min_crop_area) * area)
    stretch = config.max_aspect_change ** (aspect - 0.5)  # height / width changes by stretch squared
    height, width = min(1.0, scale * stretch), min(1.0, scale / stretch)
    return View(
        crop_top=(1 - height) * top,
        crop_left=(1 - width) * left,
        crop_height=height,
        crop_width=width,
        flip=bool(flip < config.flip_probability),
        grey=bool(grey < config.grey_probability),
        brightness=_factor(config.brightness, brightness),
        contrast=_factor(config.contrast, contrast),
        saturation=_factor(config.saturation, saturation),
        gain_db=config.gain_db * (2 * gain - 1),
        time_mask=_mask(config.time_mask, time_length, time_start),
        frequency_mask=_mask(config.frequency_mask, band_width, band_start),
    )


def _factor(spread: float, draw: float) -> float:
    return 1 + spread * (2 * draw - 1)


def _mask(longest: float, length_draw: float, start_draw: float) -> tuple[float, float]:
    length = longest * length_draw
    start = (1 - length) * start_draw
    return start, start + length


def to_video(frames: UInt8[Tensor, "batch time height width 3"]) -> Float[Tensor, "batch 3 time height width"]:
    """Conversion without augmentation, for evaluation: channels first, normalised."""
    return frames.permute(0, 4, 1, 2, 3).float().div_(255).sub_(_PIXEL_MEAN).div_(_PIXEL_DEVIATION)


def grey_video(video: Float[Tensor, "batch 3 time height width"]) -> Float[Tensor, "batch 3 time height width"]:
    """Luma in all three channels, as in training with ``grey_probability=1``."""
    weights = torch.tensor(_GREY_WEIGHTS, device=video.device).view(1, 3, 1, 1, 1)
    return (video * weights).sum(1, keepdim=True).expand_as(video)


def augment_video(
    frames: UInt8[Tensor, "batch time height width 3"], views: Sequence[View]
) -> Float[Tensor, "batch 3 time height width"]:
    """Crop, resize, flip and change the colours of each clip according to its view; then normalise."""
    batch, time, height, width, _ = frames.shape
    rows = _sampled_places([(view.crop_top, view.crop_height) for view in views], height, frames.device)
    columns = _sampled_places([(view.crop_left, view.crop_width) for view in views], width, frames.device)
    flips = torch.tensor([view.flip for view in views], device=frames.device)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=-1)
    # All frames of a clip share one crop, so frames and colours together form the channels of one image.
    stacked = frames.permute(0, 4, 1, 2, 3).reshape(batch, 3 * time, height, width).float()
    video = functional.grid_sample(stacked, grid, padding_mode="border", align_corners=False)
    pixels = video.view(batch, 3, -1)
    matrices, offsets = _colour_changes(pixels.mean(dim=2) / 255, views)
    pixels = torch.baddbmm(offsets[:, :, None], matrices / 255, pixels)
    pixels = pixels.clamp_(-_PIXEL_MEAN / _PIXEL_DEVIATION, (1 - _PIXEL_MEAN) / _PIXEL_DEVIATION)
    return pixels.view(batch, 3, time, height, width)


def _sampled_places(
    crops: Sequence[tuple[float, float]], size: int, device: torch.device
) -> Float[Tensor, "batch size"]:
    """Sampling positions of the resized crop along one axis, in `grid_sample` coordinates (-1 to 1, edge to edge).

    Crops (start, length) are rounded to whole pixels. No pixel outside of the crop is sampled, as if the crop were cut
    out first and then resized.
    """
    lengths = [max(1, round(length * size)) for _, length in crops]
    starts = [min(round(start * size), size - length) for (start, _), length in zip(crops, lengths, strict=True)]
    length, start = (torch.tensor(values, device=device)[:, None] for values in (lengths, starts))
    pixel = ((torch.arange(size, device=device) + 0.5) * length / size - 0.5).clamp(min=0).minimum(length - 1)
    return (2 * (start + pixel) + 1) / size - 1


def _colour_changes(
    mean_colours: Float[Tensor, "batch 3"], views: Sequence[View]
) -> tuple[Float[Tensor, "batch 3 3"], Float[Tensor, "batch 3"]]:
    """One affine map ``matrix @ rgb + offset`` per clip, for colours in [0, 1].

    It combines brightness, contrast about the mean luma of the clip, saturation or grey, and normalisation.
    """
    device = mean_colours.device
    luma = _column(_GREY_WEIGHTS, device)
    brightness = _column((view.brightness for view in views), device)
    contrast = _column((view.contrast for view in views), device)
    saturation = _column((0.0 if view.grey else view.saturation for view in views), device)
    to_grey = luma[None].expand(3, 3)
    saturate = saturation[:, None, None] * torch.eye(3, device=device) + (1 - saturation)[:, None, None] * to_grey
    matrices = (brightness * contrast)[:, None, None] * saturate
    offsets = ((1 - contrast) * brightness * (mean_colours @ luma))[:, None].expand(-1, 3)
    return matrices / _PIXEL_DEVIATION, (offsets - _PIXEL_MEAN) / _PIXEL_DEVIATION


def _column(values: Iterable[float], device: torch.device) -> Float[Tensor, " rows"]:
    return torch.tensor(list(values), dtype=torch.float32, device=device)  # NumPy floats would make it float64


def augment_waveforms(
    waveforms: Float[Tensor, "batch samples"], views: Sequence[View]
) -> Float[Tensor, "batch samples"]:
    """Scale each waveform by the gain of its view."""
    gains = waveforms.new_tensor([10 ** (view.gain_db / 20) for view in views])
    return waveforms * gains[:, None]


def mask_spectrograms(
    spectrograms: Float[Tensor, "batch mels time"], views: Sequence[View]
) -> Float[Tensor, "batch mels time"]:
    """Replace frequency band and time span of each view by the spectrogram mean (SpecAugment, Park et al. 2019)."""
    _, mels, time = spectrograms.shape
    device = spectrograms.device
    masked = _inside([view.frequency_mask for view in views], mels, device)[:, :, None]
    masked = masked | _inside([view.time_mask for view in views], time, device)[:, None, :]
    return torch.where(masked, spectrograms.mean(dim=(1, 2), keepdim=True), spectrograms)


def _inside(spans: list[tuple[float, float]], size: int, device: torch.device) -> Bool[Tensor, "batch size"]:
    """Which of ``size`` places lie within each relative span."""
    place = torch.arange(size, device=device)[None]
    edges = torch.tensor(spans, device=device).mul_(size).round_()
    return (place >= edges[:, :1]) & (place < edges[:, 1:])
