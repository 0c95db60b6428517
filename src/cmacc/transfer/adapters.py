"""Adapters to the encoder interface: torchvision's video models, and log-mel statistics."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from cmacc.clips import ClipSpec, LogMel, to_video
from cmacc.encoders.towers import TowerError, open_tower
from cmacc.pretraining.clip_encoder import EncoderError, Modality

# librosa's floor. The encoders' floor of 1e-6 hides how quiet a silence is; with it, ESC-10 is 1.3 points lower.
_STATISTICS_FLOOR = 1e-10


class TorchvisionVideo(nn.Module):
    """A video model of torchvision, without its classifier.

    Parameters
    ----------
    name
        ``torchvision:NAME``, untrained, or ``torchvision:NAME=WEIGHTS``.

    Raises
    ------
    EncoderError
        The name is unknown or an image model's, or the weights are not those of that model.
    """

    modalities: tuple[Modality, ...] = ("video",)

    def __init__(self, name: str) -> None:
        super().__init__()
        try:
            self.tower = open_tower(name, "video")
        except TowerError as error:
            raise EncoderError(str(error)) from error
        takes = self.tower.takes
        if takes.frame_count is None or takes.frame_rate_hz is None:
            raise EncoderError(f"encoder {name}: must be a video model, got an image model")
        assert takes.frame_height is not None
        assert takes.frame_width is not None
        self.spec = ClipSpec(takes.frame_count, takes.frame_rate_hz, takes.frame_height, takes.frame_width)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def embed_video(self, frames: UInt8[Tensor, "batch time height width 3"]) -> Float[Tensor, "batch features"]:
        """Input of the classifier's linear layer."""
        features: Tensor = self.tower(to_video(frames))
        return features

    def embed_audio(self, waveforms: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch features"]:
        """Not supported."""
        raise EncoderError("encoder torchvision: it does not encode audio")


class LogMelStatistics(nn.Module):
    """The baseline for audio: statistics of an 80-band log-mel spectrogram, 320 numbers.

    Mean, standard deviation and maximum of every band over time, and the standard deviation of its change from step to
    step (16 kHz, hop of 10 ms, 5 s as in ESC-50). Shorter files are looped, because padding with silence would change
    the statistics.
    """

    modalities: tuple[Modality, ...] = ("audio",)

    def __init__(self) -> None:
        super().__init__()
        self.spec = ClipSpec(audio_seconds=5.0, sample_rate_hz=16_000, short_files="loop")
        self.log_mel = LogMel(self.spec.sample_rate_hz, mel_bins=80)

    @property
    def device(self) -> torch.device:
        """Device of the filters."""
        return self.log_mel.window.device

    def embed_video(self, frames: UInt8[Tensor, "batch time height width 3"]) -> Float[Tensor, "batch features"]:
        """Not supported."""
        raise EncoderError("encoder statistics: it does not encode video")

    def embed_audio(self, waveforms: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch 320"]:
        """The statistics."""
        bands = (self.log_mel.power(waveforms) + _STATISTICS_FLOOR).log()
        changes = bands.diff(dim=2)
        return torch.cat([bands.mean(2), bands.std(2), bands.amax(2), changes.std(2)], dim=1)
