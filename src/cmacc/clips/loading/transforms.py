"""Augmentation of a batch on its device. `draw_view` draws parameters per sample; applying them is deterministic.

All frames of a clip share one crop, flip and colour change, so that motion is preserved.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor
from torch.nn import functional

# Rounded mean and deviation of Kinetics pixels, close to what the torchvision video models expect.
_PIXEL_MEAN, _PIXEL_DEVIATION = 0.43, 0.22
_GREY_WEIGHTS = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class AugmentConfig:
    """Strength of the augmentation of training views.

    No change are zeros, and 1 for ``min_crop_area``, ``max_aspect_change``, ``window`` and ``stretch``.

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
    window
        Share of the clip's time that a view covers, in (0, 1]. Picture and sound are cut at the same relative place.
        Every view draws its own, so two views of a clip are two parts of it. Targets and evaluations see whole clips.
    stretch
        Largest factor by which a spectrogram is stretched or squeezed along each of its axes, >= 1. Without effect on
        audio towers, which take waveforms.
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
    window: float = 1.0
    stretch: float = 1.0

    def __post_init__(self) -> None:
        for name in ("min_crop_area", "window"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"AugmentConfig: {name} must be in (0, 1], got {getattr(self, name)}")
        for name in ("max_aspect_change", "stretch"):
            if not 1 <= getattr(self, name) < math.inf:
                raise ValueError(f"AugmentConfig: {name} must be at least 1 and finite, got {getattr(self, name)}")
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
    """Parameters of one augmentation. Crops and masks are relative to the frame or spectrogram size, in [0, 1].

    ``window`` is the share of the clip's time, and ``window_place`` where it starts: 0 at the first place where it
    fits, below 1. ``stretch_time`` and ``stretch_frequency`` are the size and the centre of what is resized to the
    spectrogram, along the axis in [-1, 1]: (1, 0) is the spectrogram itself, and of a larger size, the rest is padding.
    """

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
    window: float
    window_place: float
    stretch_time: tuple[float, float]
    stretch_frequency: tuple[float, float]


def draw_view(config: AugmentConfig, rng: np.random.Generator) -> View:
    """Draw one view. The number of draws is constant, so that switching off one part does not change the others."""
    area, aspect, top, left, flip, grey, brightness, contrast, saturation, gain = rng.random(10).tolist()
    time_length, time_start, band_width, band_start = rng.random(4).tolist()
    window_place, time_size, time_centre, band_size, band_centre = rng.random(5).tolist()
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
        window=config.window,
        window_place=window_place,
        stretch_time=_stretch(config.stretch, time_size, time_centre),
        stretch_frequency=_stretch(config.stretch, band_size, band_centre),
    )


def _factor(spread: float, draw: float) -> float:
    return 1 + spread * (2 * draw - 1)


def _mask(longest: float, length_draw: float, start_draw: float) -> tuple[float, float]:
    length = longest * length_draw
    start = (1 - length) * start_draw
    return start, start + length


def _stretch(largest: float, size_draw: float, centre_draw: float) -> tuple[float, float]:
    size = largest ** (2 * size_draw - 1)
    return size, abs(1 - size) * (2 * centre_draw - 1)


def window_length(size: int, window: float) -> int:
    """Frames, or samples, of a view of a clip with ``size`` of them; at least one."""
    return max(1, round(window * size))


def _windows(values: Shaped[Tensor, "batch time *rest"], views: Sequence[View]) -> Shaped[Tensor, "batch window *rest"]:
    """The part of each clip that its view covers. All possible starts are equally likely."""
    size = values.shape[1]
    (length,) = {window_length(size, view.window) for view in views}  # else they would not form a batch
    if length == size:
        return values
    starts = [min(int(view.window_place * (size - length + 1)), size - length) for view in views]
    places = torch.tensor(starts, device=values.device)[:, None] + torch.arange(length, device=values.device)
    return values[torch.arange(len(values), device=values.device)[:, None], places]


def to_video(frames: UInt8[Tensor, "batch time height width 3"]) -> Float[Tensor, "batch 3 time height width"]:
    """Conversion without augmentation, for evaluation: channels first, normalised."""
    return frames.permute(0, 4, 1, 2, 3).float().div_(255).sub_(_PIXEL_MEAN).div_(_PIXEL_DEVIATION)


def grey_video(video: Float[Tensor, "batch 3 time height width"]) -> Float[Tensor, "batch 3 time height width"]:
    """Luma in all three channels, as in training with ``grey_probability=1``."""
    weights = torch.tensor(_GREY_WEIGHTS, device=video.device).view(1, 3, 1, 1, 1)
    return (video * weights).sum(1, keepdim=True).expand_as(video)


def augment_video(
    frames: UInt8[Tensor, "batch time height width 3"], views: Sequence[View]
) -> Float[Tensor, "batch 3 window height width"]:
    """Cut, crop, resize, flip and change the colours of each clip according to its view; then normalise."""
    frames = _windows(frames, views)
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
) -> Float[Tensor, "batch window"]:
    """Cut each waveform to the window of its view, and scale it by the gain."""
    waveforms = _windows(waveforms, views)
    gains = waveforms.new_tensor([10 ** (view.gain_db / 20) for view in views])
    return waveforms * gains[:, None]


def stretch_spectrograms(
    spectrograms: Float[Tensor, "batch mels time"], views: Sequence[View]
) -> Float[Tensor, "batch mels time"]:
    """Stretch or squeeze each spectrogram along both axes: the random resized crop of BYOL-A (Niizumi et al. 2021).

    What is squeezed is padded with the values at its edge, not with BYOL-A's zeros: zero is no silence in our scale.
    """
    sizes, centres = zip(*[zip(view.stretch_time, view.stretch_frequency, strict=True) for view in views], strict=True)
    if all(size == (1.0, 1.0) for size in sizes):
        return spectrograms
    # In grid_sample's coordinates, where the axes run from -1 to 1: time first.
    affine = torch.cat([torch.tensor(sizes).diag_embed(), torch.tensor(centres)[:, :, None]], dim=2).to(spectrograms)
    grid = functional.affine_grid(affine, [len(views), 1, *spectrograms.shape[1:]], align_corners=False)
    return functional.grid_sample(spectrograms[:, None], grid, padding_mode="border", align_corners=False)[:, 0]


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
