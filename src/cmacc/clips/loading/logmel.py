"""Log-mel spectrograms with ``torch.stft``, equal to librosa's up to rounding, without depending on it."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

_SMALLEST_FFT = 1024
_WINDOW_SECONDS = 0.025
_HOP_SECONDS = 0.010
_FLOOR = 1e-6  # about the power of 16-bit rounding noise, below which a mel band carries no information


class LogMel(nn.Module):
    """Log-mel spectrogram of waveforms: Hann window of 25 ms, hop of 10 ms, Slaney's mel bands over 0..rate/2.

    Parameters
    ----------
    sample_rate_hz
        Sample rate of the waveforms.
    mel_bins
        Number of mel bands.

    Examples
    --------
    >>> LogMel(sample_rate_hz=16_000, mel_bins=80)(torch.zeros(2, 32_000)).shape
    torch.Size([2, 80, 201])
    """

    window: Tensor
    bands: Tensor

    def __init__(self, sample_rate_hz: int, mel_bins: int = 80) -> None:
        super().__init__()
        if mel_bins < 1:
            raise ValueError(f"LogMel: mel_bins must be at least 1, got {mel_bins}")
        self.hop_samples = round(sample_rate_hz * _HOP_SECONDS)
        self._fft_size = _fft_size(sample_rate_hz)
        self.register_buffer("window", torch.hann_window(_window_samples(sample_rate_hz)), persistent=False)
        self.register_buffer("bands", mel_bands(sample_rate_hz, mel_bins), persistent=False)

    def power(self, waveforms: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch mels time"]:
        """Mel power spectrogram, before the logarithm."""
        spectrum = torch.stft(
            waveforms,
            n_fft=self._fft_size,
            hop_length=self.hop_samples,
            win_length=len(self.window),
            window=self.window,
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        return self.bands @ (spectrum.real.square() + spectrum.imag.square())

    def forward(self, waveforms: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch mels time"]:
        """``log(power + 1e-6)``; ``time`` is ``1 + samples // hop``."""
        return (self.power(waveforms) + _FLOOR).log()


def mel_bands(sample_rate_hz: int, mel_bins: int) -> Float[Tensor, "mels bins"]:
    """Triangular filters of equal area (Slaney's Auditory Toolbox, 1998): linear below 1 kHz, logarithmic above."""
    nyquist_hz = sample_rate_hz / 2
    edges_hz = _mel_to_hz(torch.linspace(0.0, _hz_to_mel(nyquist_hz), mel_bins + 2, dtype=torch.float64))
    bins_hz = torch.linspace(0.0, nyquist_hz, _fft_size(sample_rate_hz) // 2 + 1, dtype=torch.float64)
    low, centre, high = edges_hz[:-2, None], edges_hz[1:-1, None], edges_hz[2:, None]
    triangles = torch.minimum((bins_hz - low) / (centre - low), (high - bins_hz) / (high - centre)).clamp_min(0)
    return (triangles * 2.0 / (high - low)).float()


def _window_samples(sample_rate_hz: int) -> int:
    return round(sample_rate_hz * _WINDOW_SECONDS)


def _fft_size(sample_rate_hz: int) -> int:
    """The smallest power of two that holds the window, but at least 1024: 2048 above 40.96 kHz."""
    return max(_SMALLEST_FFT, 1 << (_window_samples(sample_rate_hz) - 1).bit_length())


_HZ_PER_MEL = 200.0 / 3
_BREAK_HZ = 1000.0
_LOG_STEP = math.log(6.4) / 27


def _hz_to_mel(hz: float) -> float:
    return hz / _HZ_PER_MEL if hz < _BREAK_HZ else _BREAK_HZ / _HZ_PER_MEL + math.log(hz / _BREAK_HZ) / _LOG_STEP


def _mel_to_hz(mel: Tensor) -> Tensor:
    break_mel = _BREAK_HZ / _HZ_PER_MEL
    return torch.where(mel < break_mel, mel * _HZ_PER_MEL, _BREAK_HZ * torch.exp(_LOG_STEP * (mel - break_mel)))
