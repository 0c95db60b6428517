"""Adapters to the encoder interface: torchvision's video models, and log-mel statistics."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from cmacc.clips import ClipSpec, LogMel
from cmacc.pretraining.clip_encoder import EncoderError, Modality

# Frames per clip and frame rate with which the Kinetics weights were evaluated (`weights.meta["_docs"]`).
TORCHVISION_MODELS = {
    "r3d_18": (16, 15.0),
    "mc3_18": (16, 15.0),
    "r2plus1d_18": (16, 15.0),
    "s3d": (128, 15.0),
    "mvit_v1_b": (16, 7.5),
    "mvit_v2_s": (16, 7.5),
    "swin3d_t": (32, 15.0),
}
# librosa's floor. The encoders' floor of 1e-6 hides how quiet a silence is; with it, ESC-10 is 1.3 points lower.
_STATISTICS_FLOOR = 1e-10
_CLASSIFIERS = ("fc", "classifier", "head")


class TorchvisionVideo(nn.Module):
    """A video model of torchvision, without its classifier.

    Parameters
    ----------
    name
        One of `TORCHVISION_MODELS`.
    weights
        State dict, with or without the classifier's weights; None for an untrained model.

    Raises
    ------
    EncoderError
        The name is unknown, or the weights are not those of that model.
    """

    modalities: tuple[Modality, ...] = ("video",)
    mean: Tensor
    deviation: Tensor

    def __init__(self, name: str, weights: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        import torchvision.models  # importing takes seconds, so only this class does it

        if name not in TORCHVISION_MODELS:
            raise EncoderError(f"encoder torchvision:{name}: must be one of {', '.join(TORCHVISION_MODELS)}")
        presets = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        self.network = torchvision.models.get_model(name, weights=None)
        if weights is not None:
            _load(self.network, weights, name)
        _drop_last_layer(self.network)
        (size,) = presets.crop_size[:1]
        self.spec = ClipSpec(*TORCHVISION_MODELS[name], size, size)
        self.register_buffer("mean", torch.tensor(presets.mean).view(3, 1, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(presets.std).view(3, 1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def embed_video(self, frames: UInt8[Tensor, "batch time height width 3"]) -> Float[Tensor, "batch features"]:
        """Input of the classifier's linear layer."""
        video = frames.permute(0, 4, 1, 2, 3).float() / 255
        features: Tensor = self.network((video - self.mean) / self.deviation)
        return features.flatten(1)

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


def _drop_last_layer(network: nn.Module) -> None:
    """Remove the last linear layer (in S3D, a 1x1x1 convolution), so that its input is the output."""
    name = next(name for name in _CLASSIFIERS if hasattr(network, name))
    classifier = getattr(network, name)
    if isinstance(classifier, nn.Sequential):
        classifier[-1] = nn.Identity()
    else:
        setattr(network, name, nn.Identity())


def _load(network: nn.Module, weights: dict[str, Tensor], name: str) -> None:
    own = network.state_dict()
    for key in sorted(own.keys() | weights.keys()):
        is_classifier = key.split(".")[0] in _CLASSIFIERS
        if is_classifier and (key not in weights or key not in own or weights[key].shape != own[key].shape):
            weights.pop(key, None)  # missing, or for another number of classes; the classifier is not used
            continue
        if key not in weights:
            raise EncoderError(f"encoder torchvision:{name}: the weights lack {key}")
        if key not in own:
            raise EncoderError(f"encoder torchvision:{name}: the weights' {key} has no place in that model")
        if weights[key].shape != own[key].shape:
            raise EncoderError(
                f"encoder torchvision:{name}: {key} must have shape {tuple(own[key].shape)}, "
                f"got {tuple(weights[key].shape)}"
            )
    network.load_state_dict(weights, strict=False)
