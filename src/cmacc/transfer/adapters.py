"""Adapters to the encoder interface: a tower alone, and log-mel statistics."""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from cmacc.clips import ClipSpec, LogMel, to_video
from cmacc.encoders.towers import TextSides, TowerError, open_tower, tower_modality
from cmacc.pretraining.clip_encoder import EncoderError, Modality

# librosa's floor. The encoders' floor of 1e-6 hides how quiet a silence is; with it, ESC-10 is 1.3 points lower.
_STATISTICS_FLOOR = 1e-10
_AUDIO_SECONDS = 5.0


class TowerEncoder(nn.Module):
    """A tower alone, as an encoder of its modality: a model of torchvision, timm or transformers.

    What the tower does not fix about its clips is as in `ClipSpec`, except that audio has 5 s, as in ESC-50.

    Parameters
    ----------
    name
        Name of the tower, for `cmacc.encoders.open_tower`.

    Raises
    ------
    EncoderError
        The tower cannot be opened.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        try:
            modality = tower_modality(name)
            self.tower = open_tower(name, modality)
        except TowerError as error:
            raise EncoderError(str(error)) from error
        self.modalities: tuple[Modality, ...] = (modality,)
        fixed = {key: value for key, value in dataclasses.asdict(self.tower.takes).items() if value is not None}
        self.spec = ClipSpec(**({"audio_seconds": _AUDIO_SECONDS} if modality == "audio" else {}) | fixed)
        self._text = TextSides({modality: name})

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def embed_video(self, frames: UInt8[Tensor, "batch time height width 3"]) -> Float[Tensor, "batch features"]:
        """The tower's features: of a classifier, the input of its last linear layer."""
        features: Tensor = self.tower(to_video(frames))
        return features

    def embed_audio(self, waveforms: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch features"]:
        """The tower's features."""
        features: Tensor = self.tower(waveforms)
        return features

    @property
    def unprojected(self) -> "UnprojectedTower | None":
        """The tower before it projects into the space of its text side; None unless it is of audio and does."""
        return UnprojectedTower(self) if self.tower.has_projection else None

    def project_audio(self, unprojected: Float[Tensor, "batch width"]) -> Float[Tensor, "batch features"]:
        """The output of `unprojected`, projected to the features of `embed_audio`."""
        return self.tower.project(unprojected)

    @property
    def text_modalities(self) -> tuple[Modality, ...]:
        """The tower's modality if it has a text side."""
        return self._text.modalities

    def encode_text(self, texts: Sequence[str], modality: Modality) -> Float[Tensor, "texts features"]:
        """Embeddings by the tower's text side, L2-normalised."""
        return self._text.encode(texts, modality, self.device)


class UnprojectedTower(nn.Module):
    """An audio tower before it projects into the space of its text side."""

    modalities: tuple[Modality, ...] = ("audio",)

    def __init__(self, encoder: TowerEncoder) -> None:
        super().__init__()
        self.tower, self.spec = encoder.tower, encoder.spec

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def embed_video(self, frames: UInt8[Tensor, "batch time height width 3"]) -> Float[Tensor, "batch width"]:
        """Not supported."""
        raise EncoderError("encoder of an unprojected tower: it does not encode video")

    def embed_audio(self, waveforms: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch width"]:
        """What the tower gives before the projection."""
        return self.tower.unprojected(waveforms)


class LogMelStatistics(nn.Module):
    """The baseline for audio: statistics of an 80-band log-mel spectrogram, 320 numbers.

    Mean, standard deviation and maximum of every band over time, and the standard deviation of its change from step to
    step (16 kHz, hop of 10 ms, 5 s as in ESC-50). Shorter files are looped, because padding with silence would change
    the statistics.
    """

    modalities: tuple[Modality, ...] = ("audio",)

    def __init__(self) -> None:
        super().__init__()
        self.spec = ClipSpec(audio_seconds=_AUDIO_SECONDS, sample_rate_hz=16_000, short_files="loop")
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
