"""Predict the clean spectrogram from one with masked blocks, from the sound alone.

An audio-only pretext to stand beside others, as in Shukla et al. (2020), of which only abstracts are public: masking
and decoder are our own design.

The clean spectrogram x is standardised by the mean and deviation of the sample's *visible* places, t = (x - m) / s, so
the loss depends neither on the level nor on the loudness range of a recording, and the target holds nothing but what
was hidden. The decoder's last layer starts at zero, so training starts from the guess m for every masked place.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from cmacc.objectives.objective import BatchViews, Drawn, ExtraInput, ObjectiveInputs, ObjectiveResult

_PATCH = 8  # bands and frames that one place of the decoder's grid predicts; `TinyAudio` has the same stride
# Nats. A nearly silent recording has a smaller deviation; without a floor, its rounding noise would become the target.
_SMALLEST_DEVIATION = 0.1


@dataclass(frozen=True)
class MaskedAudioConfig:
    """The masked spectrogram: what is hidden, and the decoder.

    Parameters
    ----------
    masked_share
        Share of the blocks that are hidden, in (0, 1); at least one is, and at least one is not.
    block_bands, block_frames
        Size of a block, in mel bands and spectrogram frames (of 10 ms). As many bands as there are, or more, hides time
        spans; as many frames, bands of frequency.
    noise
        Deviation of Gaussian noise on the whole input, in units of the sample's own deviation; 0: none. The target
        stays clean.
    visible_weight
        Weight of the error on the visible places, against 1 on the masked ones. Above 0, it is of use with ``noise``.
    width
        Channels of the decoder.
    """

    masked_share: float = 0.5
    block_bands: int = 16
    block_frames: int = 16
    noise: float = 0.0
    visible_weight: float = 0.0
    width: int = 64

    def __post_init__(self) -> None:
        settings = dataclasses.asdict(self)
        if not 0 < self.masked_share < 1:
            raise ValueError(f"objective.masked_audio.masked_share must be in (0, 1), got {self.masked_share}")
        for name in ("block_bands", "block_frames", "width"):
            if settings[name] < 1:
                raise ValueError(f"objective.masked_audio.{name} must be at least 1, got {settings[name]}")
        for name in ("noise", "visible_weight"):
            if not 0 <= settings[name] < math.inf:
                raise ValueError(f"objective.masked_audio.{name} must be at least 0 and finite, got {settings[name]}")


class MaskedAudio(nn.Module):
    """The clean spectrogram from a masked one; needs no video.

    Parameters
    ----------
    config
        Settings.
    map_channels
        C, channels of the audio encoder's feature map ``(M, C, F', T')`` or ``(M, C, T')``.
    mel_bins
        Mel bands of the spectrograms.

    Notes
    -----
    The loss is the mean over the masked places of ``|d - t|``, with the decoder's output d and the target t, plus
    ``visible_weight`` times the mean over the visible ones.

    Metrics: ``loss``; ``l1``, the error on the masked places; ``baseline``, that of predicting the mean of the sample's
    visible places; ``explained``, ``1 - l1 / baseline``, at most 1, and 0 before training. All are in units of the
    sample's deviation.
    """

    needs_keys = False
    needs_feature_maps = False  # of the queries, which are not masked

    def __init__(self, config: MaskedAudioConfig, map_channels: int, mel_bins: int) -> None:
        super().__init__()
        self.config = config
        self.mel_bins = mel_bins
        width, rows = config.width, math.ceil(mel_bins / _PATCH)
        self.reduce = nn.Conv2d(map_channels, width, kernel_size=1)
        # Where a map has fewer rows than the grid, or none, only this tells the bands apart.
        self.row_code = nn.Parameter(0.5 * torch.randn(width, rows, 1))
        self.mix = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.last = nn.Conv2d(width, _PATCH**2, kernel_size=1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def draw(self, batch: BatchViews) -> Drawn:
        """The masked spectrograms to encode; given: the standardised ``target`` and the ``mask`` (true is hidden).

        Raises
        ------
        ValueError
            The inputs are not spectrograms of ``mel_bins`` bands, or a single block covers them.
        """
        clean = batch.plain("audio")
        if clean.ndim != 3 or clean.shape[1] != self.mel_bins:
            raise ValueError(
                f"MaskedAudio: the audio must be spectrograms (M, {self.mel_bins}, time), got {tuple(clean.shape)}"
            )
        rngs = batch.generators("masked_audio")
        mask = torch.stack([draw_mask(rng, clean.shape[1], clean.shape[2], self.config) for rng in rngs])
        mask = mask.to(clean.device)
        mean, deviation = _of_visible(clean, mask)
        distorted = torch.where(mask, mean, clean)
        if self.config.noise > 0:
            noise = np.stack([rng.standard_normal(tuple(clean.shape[1:]), dtype=np.float32) for rng in rngs])
            distorted = distorted + self.config.noise * deviation * torch.from_numpy(noise).to(clean)
        # Subtracted first: of a constant spectrogram, exactly 0 is left.
        target = (clean - mean) / deviation
        return Drawn({"audio": ExtraInput("audio", distorted, with_feature_map=True)}, {"target": target, "mask": mask})

    def decode(
        self, feature_map: Float[Tensor, "batch channels *places"], frames: int
    ) -> Float[Tensor, "batch bands frames"]:
        """``(M, mel_bins, frames)``, standardised, from a feature map by frequency and time, or by time alone."""
        x = self.reduce(feature_map if feature_map.ndim == 4 else feature_map[:, :, None])
        grid = (self.row_code.shape[1], math.ceil(frames / _PATCH))
        if x.shape[2:] != grid:
            x = functional.interpolate(x, grid, mode="bilinear", align_corners=False)
        x = functional.relu(self.mix(functional.relu(x + self.row_code)))
        return functional.pixel_shuffle(self.last(x), _PATCH)[:, 0, : self.mel_bins, :frames]

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveResult:
        """The loss of a batch."""
        feature_map = inputs.more["audio"].feature_map
        if feature_map is None:
            raise ValueError("MaskedAudio: the masked inputs must come with their feature map, got none")
        mask = inputs.given["mask"].bool()
        dtype = self.last.weight.dtype
        # In the precision of the weights, also under autocast.
        with torch.autocast(feature_map.device.type, enabled=False):
            target = inputs.given["target"].to(dtype)
            error = (self.decode(feature_map.to(dtype), target.shape[2]) - target).abs()
            l1 = _mean_where(mask, error)
            loss = l1
            if self.config.visible_weight > 0:
                loss = l1 + self.config.visible_weight * _mean_where(~mask, error)
        with torch.no_grad():
            baseline = _mean_where(mask, target.abs())
            explained = torch.where(baseline > 0, 1 - l1 / baseline, torch.nan)
        metrics = {"loss": loss.detach(), "l1": l1.detach(), "baseline": baseline, "explained": explained}
        return ObjectiveResult(loss, metrics)


def draw_mask(
    rng: np.random.Generator, bands: int, frames: int, config: MaskedAudioConfig
) -> Bool[Tensor, "bands frames"]:
    """Hidden blocks of one spectrogram, each set of that many blocks as likely as any other.

    The blocks lie on a grid that starts at the first band and frame; those at the far ends may be smaller.

    Raises
    ------
    ValueError
        One block covers the spectrogram.
    """
    rows, columns = math.ceil(bands / config.block_bands), math.ceil(frames / config.block_frames)
    blocks = rows * columns
    if blocks < 2:
        raise ValueError(
            "objective.masked_audio: block_bands or block_frames must be smaller than the spectrogram of "
            f"{bands} bands and {frames} frames, got {config.block_bands} and {config.block_frames}"
        )
    hidden = np.zeros(blocks, dtype=bool)
    hidden[rng.permutation(blocks)[: min(max(round(config.masked_share * blocks), 1), blocks - 1)]] = True
    full = hidden.reshape(rows, columns).repeat(config.block_bands, axis=0).repeat(config.block_frames, axis=1)
    return torch.from_numpy(np.ascontiguousarray(full[:bands, :frames]))


def _mean_where(mask: Bool[Tensor, "batch bands frames"], values: Float[Tensor, "batch bands frames"]) -> Tensor:
    # Not values[mask], whose size is only known on the device: that would wait for a GPU.
    return (values * mask).sum() / mask.sum()


def _of_visible(
    clean: Float[Tensor, "batch bands frames"], mask: Bool[Tensor, "batch bands frames"]
) -> tuple[Float[Tensor, "batch 1 1"], Float[Tensor, "batch 1 1"]]:
    """Mean and deviation of each sample's visible places."""
    # From the minimum, because a mean of equal numbers is rounded: a constant would not be its own mean.
    lowest = clean.amin(dim=(1, 2), keepdim=True)
    above = clean - lowest
    visible = (~mask).to(clean.dtype)
    count = visible.sum(dim=(1, 2), keepdim=True)
    mean = (above * visible).sum(dim=(1, 2), keepdim=True) / count
    variance = ((above - mean).square() * visible).sum(dim=(1, 2), keepdim=True) / count
    return lowest + mean, variance.sqrt().clamp_min(_SMALLEST_DEVIATION)
