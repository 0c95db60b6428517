"""Convert batches of clips, or stored samples, to augmented inputs of the encoders."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmacc.clips import (
    ClipBatch,
    LogMel,
    View,
    augment_video,
    augment_waveforms,
    draw_view,
    grey_video,
    mask_spectrograms,
    seeds,
    stretch_spectrograms,
    to_video,
)
from cmacc.clips.seeds import seeded_rng
from cmacc.encoders import EncoderConfig, Modality, is_tower
from cmacc.pretraining.config import PretrainConfig


def audio_input(config: EncoderConfig, sample_rate_hz: int) -> nn.Module:
    """From waveforms ``(M, S)`` to what the audio encoder takes: log-mel spectrograms, or for a tower the waveforms."""
    return nn.Identity() if is_tower(config.audio) else LogMel(sample_rate_hz, config.mel_bins)


_ANOTHER = 1  # seeds the second view of a visit; not 0, which would seed the first


class ClipViews:
    """Augmented frames, and spectrograms or waveforms, of clips; a view depends only on (seed, visit, sample id)."""

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._modalities = config.objective.modalities
        self._audio_input = audio_input(config.encoder, config.data.clip.sample_rate_hz).to(device)

    def of(self, batch: ClipBatch, visit: int) -> dict[Modality, Tensor]:
        """Inputs of the modalities that the objective needs.

        ``video``: ``(M, 3, T, H, W)``; ``audio``: spectrograms ``(M, mels, time)`` or waveforms ``(M, S)``.
        """
        batch = self._paired(batch)
        views = self._drawn(batch.sample_ids.tolist(), [visit] * len(batch.sample_ids))
        return {modality: self._augmented(modality, batch, views) for modality in self._modalities}

    def another(self, modality: Modality, batch: ClipBatch, visit: int) -> Tensor:
        """Another view of one modality, of the same windows; as a control, of those of other files of the batch."""
        batch = self._paired(batch)
        if self._config.data.shuffle_pairs:
            # By two: by one, a second view of the pictures would be of the file whose audio is in its place.
            batch = dataclasses.replace(
                batch, frames=batch.frames.roll(2, dims=0), waveforms=batch.waveforms.roll(2, dims=0)
            )
        views = self._drawn(batch.sample_ids.tolist(), [visit] * len(batch.sample_ids), _ANOTHER)
        return self._augmented(modality, batch, views)

    def plain(self, modality: Modality, batch: ClipBatch, visit: int) -> Tensor:
        """The same windows without augmentation; grey if the run only sees grey video."""
        batch = self._paired(batch)
        if modality == "audio":
            inputs: Tensor = self._audio_input(batch.waveforms)
            return inputs
        video = to_video(batch.frames)
        return grey_video(video) if self._config.data.augment.grey_probability == 1 else video

    def kept(self, batch: ClipBatch, visit: int) -> dict[str, Tensor]:
        """The data to store of a batch: uint8 frames, half-precision waveforms, sample ids and visits."""
        batch = self._paired(batch)
        return {
            "frames": batch.frames,
            # float16 has a relative error of at most 2^-11: 66 dB below the signal.
            "waveforms": batch.waveforms.half(),
            "sample_ids": batch.sample_ids,
            "visits": torch.full_like(batch.sample_ids, visit),
        }

    def again(self, modality: Modality, kept: Callable[[str], Tensor]) -> Tensor:
        """Recompute the same inputs from stored data."""
        views = self._drawn(kept("sample_ids").tolist(), kept("visits").tolist())
        if modality == "video":
            return augment_video(kept("frames").to(self._device), views)
        return self._audio(kept("waveforms").to(self._device).float(), views)

    def _paired(self, batch: ClipBatch) -> ClipBatch:
        """The batch with its own audio or, as a control, with the audio of other files of the batch."""
        if not self._config.data.shuffle_pairs:
            return batch
        # A cyclic shift pairs every video with the audio of another file.
        return dataclasses.replace(batch, waveforms=batch.waveforms.roll(1, dims=0))

    def _drawn(self, sample_ids: Sequence[int], visits: Sequence[int], *number: int) -> list[View]:
        return [
            draw_view(
                self._config.data.augment, seeded_rng(seeds.AUGMENTATION, self._config.seed, visit, sample_id, *number)
            )
            for sample_id, visit in zip(sample_ids, visits, strict=True)
        ]

    def _augmented(self, modality: Modality, batch: ClipBatch, views: list[View]) -> Tensor:
        return augment_video(batch.frames, views) if modality == "video" else self._audio(batch.waveforms, views)

    def _audio(self, waveforms: Float[Tensor, "batch samples"], views: list[View]) -> Float[Tensor, "batch *axes"]:
        inputs: Tensor = self._audio_input(augment_waveforms(waveforms, views))
        if not isinstance(self._audio_input, LogMel):  # a tower makes its own spectrogram, if any
            return inputs
        return mask_spectrograms(stretch_spectrograms(inputs, views), views)
