"""How a batch becomes what the two encoders take, and how what was kept of a sample becomes it again."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from cmacc.clips import (
    ClipBatch,
    LogMel,
    View,
    augment_video,
    augment_waveforms,
    draw_view,
    mask_spectrograms,
    seeds,
)
from cmacc.clips.seeds import seeded_rng
from cmacc.pretraining.config import PretrainConfig


@runtime_checkable
class Views(Protocol):
    """The inputs of both encoders, from batches of some kind that have ``sample_ids``; all randomness is by sample."""

    def of(self, batch: Any, visit: int) -> tuple[Tensor, Tensor]:
        """The video and the audio encoder's inputs; ``visit``, how often the samples were due before, seeds them."""
        ...

    def kept(self, batch: Any, visit: int) -> dict[str, Tensor]:
        """What it takes to make the same views again, compact, a row a sample."""
        ...

    def video_again(self, kept: Callable[[str], Tensor]) -> Tensor:
        """The video encoder's inputs, from what was kept by name."""
        ...

    def audio_again(self, kept: Callable[[str], Tensor]) -> Tensor:
        """The audio encoder's inputs, from what was kept by name."""
        ...


class ClipViews:
    """Augmented pictures and log-mel spectrograms of clips; a view depends on (seed, visit, sample id) alone."""

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._log_mel = LogMel(config.data.clip.sample_rate_hz, config.encoder.mel_bins).to(device)

    def of(self, batch: ClipBatch, visit: int) -> tuple[Tensor, Tensor]:
        """Pictures ``(M, 3, T, H, W)`` and spectrograms ``(M, mels, time)``."""
        batch = self._paired(batch)
        views = self._drawn(batch.sample_ids.tolist(), [visit] * len(batch.sample_ids))
        return augment_video(batch.frames, views), self._spectrograms(batch.waveforms, views)

    def kept(self, batch: ClipBatch, visit: int) -> dict[str, Tensor]:
        """uint8 frames and half-precision sound."""
        batch = self._paired(batch)
        return {
            "frames": batch.frames,
            # float16 steps by 2^-11 of a sample's size: 66 dB below it.
            "waveforms": batch.waveforms.half(),
            "sample_ids": batch.sample_ids,
            "visits": torch.full_like(batch.sample_ids, visit),
        }

    def video_again(self, kept: Callable[[str], Tensor]) -> Tensor:
        """Pictures."""
        return augment_video(kept("frames").to(self._device), self._drawn_again(kept))

    def audio_again(self, kept: Callable[[str], Tensor]) -> Tensor:
        """Spectrograms."""
        return self._spectrograms(kept("waveforms").to(self._device).float(), self._drawn_again(kept))

    def _paired(self, batch: ClipBatch) -> ClipBatch:
        """The batch with its own sounds or, as a control, with those of other files of the batch."""
        if not self._config.data.shuffle_pairs:
            return batch
        # A cyclic shift gives every picture the sound of another file.
        return dataclasses.replace(batch, waveforms=batch.waveforms.roll(1, dims=0))

    def _drawn(self, sample_ids: Sequence[int], visits: Sequence[int]) -> list[View]:
        return [
            draw_view(self._config.data.augment, seeded_rng(seeds.AUGMENTATION, self._config.seed, visit, sample_id))
            for sample_id, visit in zip(sample_ids, visits, strict=True)
        ]

    def _drawn_again(self, kept: Callable[[str], Tensor]) -> list[View]:
        return self._drawn(kept("sample_ids").tolist(), kept("visits").tolist())

    def _spectrograms(
        self, waveforms: Float[Tensor, "batch samples"], views: list[View]
    ) -> Float[Tensor, "batch mels frames"]:
        return mask_spectrograms(self._log_mel(augment_waveforms(waveforms, views)), views)
