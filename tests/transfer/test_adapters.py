import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from cmacc.clips import ClipSpec, LogMel
from cmacc.encoders import AudioVisualEncoder, EncoderConfig
from cmacc.transfer import (
    ClipEncoder,
    CmaccEncoder,
    EncoderError,
    LogMelStatistics,
    MatchingEncoder,
    TowerEncoder,
    open_encoder,
    weights_hash,
)


def small_encoder(seed: int = 0, is_grey: bool = False) -> CmaccEncoder:
    torch.manual_seed(seed)
    pair = AudioVisualEncoder(EncoderConfig(mel_bins=32, hidden_size=32, embedding_size=16))
    clip = ClipSpec(frame_count=4, frame_rate_hz=4.0, frame_height=32, frame_width=32, audio_seconds=1.0)
    return CmaccEncoder(pair, clip, is_grey).eval()


def test_cmacc_features_and_matches_are_the_pairs_own() -> None:
    encoder = small_encoder()
    assert isinstance(encoder, MatchingEncoder)
    frames = torch.randint(0, 256, (3, 4, 32, 32, 3), dtype=torch.uint8)
    waveforms = torch.rand(3, 16_000) * 2 - 1
    video = (frames.permute(0, 4, 1, 2, 3) / 255 - 0.43) / 0.22
    with torch.inference_mode():
        own_video, own_audio = encoder.pair(video, LogMel(16_000, 32)(waveforms)).values()
        features = encoder.embed_video(frames)
        assert torch.allclose(features, own_video.feature, atol=1e-4)
        assert torch.allclose(encoder.match_video(features), own_video.embedding, atol=1e-4)
        assert torch.equal(encoder.match_audio(encoder.embed_audio(waveforms)), own_audio.embedding)


def test_a_grey_run_sees_no_colour() -> None:
    frames = torch.randint(0, 256, (1, 4, 32, 32, 3), dtype=torch.uint8)
    luma = (frames.double() @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)).round().to(torch.uint8)
    grey = luma[..., None].expand_as(frames).contiguous()
    with torch.inference_mode():
        for is_grey in (True, False):
            encoder = small_encoder(is_grey=is_grey)
            alike = torch.allclose(encoder.embed_video(frames), encoder.embed_video(grey), atol=0.05)
            assert alike == is_grey


def test_statistics_are_those_of_the_spectrogram() -> None:
    encoder = LogMelStatistics()
    assert isinstance(encoder, ClipEncoder)
    assert not isinstance(encoder, MatchingEncoder)
    waveforms = torch.randn(2, 80_000) * 0.1
    bands = np.log(LogMel(16_000, 80).power(waveforms).double().numpy() + 1e-10)
    expected = np.concatenate(
        [bands.mean(2), bands.std(2, ddof=1), bands.max(2), np.diff(bands, axis=2).std(2, ddof=1)], axis=1
    )
    assert np.allclose(encoder.embed_audio(waveforms).numpy(), expected, atol=1e-3)
    assert expected.shape == (2, 320)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r3d_18", "s3d"])
def test_torchvision_features_enter_its_own_classifier(name: str) -> None:
    """The classifier's linear layer, put back on our features, gives the model's own answer."""
    encoder = TowerEncoder(f"torchvision:{name}").eval()
    reference = torchvision.models.get_model(name, weights=None).eval()
    reference.load_state_dict(encoder.tower.network.state_dict(), strict=False)
    frames = torch.randint(0, 256, (1, 16, encoder.spec.frame_height, encoder.spec.frame_width, 3), dtype=torch.uint8)
    presets = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    assert [encoder.spec.frame_height, encoder.spec.frame_width] == list(presets.crop_size)
    mean, deviation = (torch.tensor(values).view(3, 1, 1, 1) for values in (presets.mean, presets.std))
    last = reference.fc if name == "r3d_18" else reference.classifier[-1]
    with torch.inference_mode():
        features = encoder.embed_video(frames)
        answers = last(features if name == "r3d_18" else features[:, :, None, None, None]).flatten(1)
        expected = reference((frames.permute(0, 4, 1, 2, 3) / 255 - mean) / deviation)
    assert features.shape == (1, 512 if name == "r3d_18" else 1024)
    assert torch.allclose(answers, expected, atol=1e-3)


@pytest.mark.slow
def test_torchvision_weights_come_from_a_local_file(tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path))
    state = TowerEncoder("torchvision:r3d_18").tower.network.state_dict()
    state = {name: value + 0.01 if value.is_floating_point() else value for name, value in state.items()}
    save_file(state, folder / "w.safetensors")
    torch.save(state | {"fc.weight": torch.zeros(400, 512), "fc.bias": torch.zeros(400)}, folder / "w.pth")
    hashes = set()
    for file in ("w.safetensors", "w.pth"):
        opened = open_encoder(f"torchvision:r3d_18={folder / file}")
        assert isinstance(opened.encoder, TowerEncoder)
        assert torch.equal(opened.encoder.tower.network.state_dict()["stem.0.weight"], state["stem.0.weight"])
        assert opened.untrained is not opened.encoder
        hashes.add(opened.facts.weights)
    assert len(hashes) == 1
    untrained = open_encoder("torchvision:r3d_18", seed=3)
    assert untrained.encoder is untrained.untrained
    assert untrained.facts.weights == open_encoder("torchvision:r3d_18", seed=3).facts.weights not in hashes

    del state["layer1.0.conv1.0.weight"]
    save_file(state, folder / "short.safetensors")
    with pytest.raises(
        EncoderError, match=r"torchvision:r3d_18=.*short\.safetensors: the weights lack layer1\.0\.conv1\.0\.weight"
    ):
        open_encoder(f"torchvision:r3d_18={folder / 'short.safetensors'}")
    (folder / "evil.pth").write_bytes(f"cos\nsystem\n(S'touch {folder}/evil'\ntR.".encode())
    with pytest.raises(EncoderError, match=r"evil\.pth cannot be read"):
        open_encoder(f"torchvision:r3d_18={folder / 'evil.pth'}")
    assert not (folder / "evil").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere", "nowhere: must be a run or export folder, random, statistics, torchvision:.*, got nothing there"),
        ("torchvision:vgg", "torchvision:vgg: must be one of r3d_18"),
        ("torchvision:r3d_18=", "WEIGHTS must be a file of weights, got nothing there"),
        ("torchvision:r3d_18=no.pth", "no.pth must be a file of weights, got nothing there"),
    ],
)
def test_names_that_stand_for_nothing(name: str, reason: str) -> None:
    with pytest.raises(EncoderError, match=reason):
        open_encoder(name)


def test_the_hash_tells_weights_and_settings_apart() -> None:
    base = weights_hash(small_encoder())
    assert base == weights_hash(small_encoder())
    assert base != weights_hash(small_encoder(seed=1))
    assert base != weights_hash(small_encoder(is_grey=True))
    changed = small_encoder()
    with torch.no_grad():
        changed.pair.audio.last.weight[0, 0] += 1e-6
    assert base != weights_hash(changed)
    changed = small_encoder()
    changed.log_mel.bands[3, 3] += 1  # a filter that is saved nowhere
    assert base != weights_hash(changed)


def test_the_hash_sees_settings_of_inner_modules() -> None:
    def scaled(constant: float, tensor: float = 1.0) -> nn.Sequential:
        inner = nn.Linear(2, 2)
        torch.nn.init.zeros_(inner.weight)
        torch.nn.init.zeros_(inner.bias)
        inner.constant, inner.scale = constant, torch.tensor([tensor])  # type: ignore[assignment]
        return nn.Sequential(inner)

    assert weights_hash(scaled(0.0)) == weights_hash(scaled(0.0))
    assert weights_hash(scaled(0.0)) != weights_hash(scaled(5.0))
    assert weights_hash(scaled(0.0, 1.00001)) != weights_hash(scaled(0.0, 1.00004))


def test_random_depends_on_the_seed_alone() -> None:
    first, again, other = (open_encoder("random", seed=seed) for seed in (5, 5, 6))
    assert first.facts.weights == again.facts.weights != other.facts.weights
    assert first.encoder is first.untrained
