"""Log-mel against librosa."""

import librosa
import numpy as np
import pytest
import torch

from cmacc.clips.loading.logmel import LogMel


@pytest.mark.parametrize("rate_hz", [16_000, 22_050, 40_960, 44_100, 96_000])
@pytest.mark.parametrize("mel_bins", [40, 64, 80, 128])
# Narrow bands at the low end hold no bin of the transform; librosa says so, and we must agree with it there too.
@pytest.mark.filterwarnings("ignore:Empty filters")
def test_power_equals_librosa(rate_hz: int, mel_bins: int) -> None:
    rng = np.random.default_rng(0)
    seconds = np.arange(round(1.3 * rate_hz)) / rate_hz
    waves = np.stack([rng.standard_normal(len(seconds)) * 0.1, np.sin(2 * np.pi * (200 + 2000 * seconds) * seconds)])
    module = LogMel(rate_hz, mel_bins)
    got = module.power(torch.from_numpy(waves).float()).numpy()
    for ours, wave in zip(got, waves, strict=True):
        wanted = librosa.feature.melspectrogram(
            y=wave,
            sr=rate_hz,
            n_fft={44_100: 2048, 96_000: 4096}.get(rate_hz, 1024),  # the window has 1,102 and 2,400 samples
            win_length=round(0.025 * rate_hz),
            hop_length=round(0.010 * rate_hz),
            center=True,
            pad_mode="constant",
            power=2.0,
            n_mels=mel_bins,
            htk=False,
            norm="slaney",
        )
        assert ours.shape == wanted.shape
        assert np.abs(ours - wanted).max() < 1e-4 * wanted.max()


def test_forward_is_the_log_of_power_over_a_floor() -> None:
    module = LogMel(16_000, 40)
    waves = torch.randn(3, 8_000) * torch.tensor([[1.0], [1e-3], [0.0]])
    spectrograms = module(waves)
    assert spectrograms.shape == (3, 40, 51)
    np.testing.assert_allclose(spectrograms.exp(), module.power(waves) + 1e-6, rtol=1e-4)
    assert spectrograms[2].unique().numpy() == pytest.approx([np.log(1e-6)])


def test_nothing_is_stored_in_checkpoints() -> None:
    assert LogMel(16_000).state_dict() == {}


def test_bins_are_checked() -> None:
    with pytest.raises(ValueError, match="LogMel: mel_bins must be at least 1, got 0"):
        LogMel(16_000, 0)
