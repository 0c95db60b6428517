"""What the encoders promise of their outputs, for every backbone on small inputs."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from cmacc.encoders import AudioVisualEncoder, Encoder, EncoderConfig, Encoding
from cmacc.encoders.audio import AudioBackboneName, build_audio_backbone
from cmacc.encoders.norm import InputNorm, WholeBatchNorm, set_norms
from cmacc.encoders.pair import HeadName
from cmacc.encoders.video import VideoBackboneName, build_video_backbone

VIDEO, SPECTROGRAMS = (2, 3, 4, 32, 32), (2, 16, 40)


@pytest.mark.parametrize(
    ("video", "audio", "features"),
    [
        ("tiny", "tiny", (1536, 1536)),
        ("r3d_18", "resnet18", (512, 512)),
        ("mc3_18", "resnet18_1d", (512, 512)),
        ("r2plus1d_18", "small", (512, 7680)),
    ],
)
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_shapes_and_what_belongs_together(
    video: VideoBackboneName, audio: AudioBackboneName, features: tuple[int, int], head: HeadName
) -> None:
    config = EncoderConfig(video, audio, mel_bins=16, head=head, hidden_size=24, embedding_size=10)
    pair = AudioVisualEncoder(config)
    encodings = tuple(pair(video=torch.randn(VIDEO), audio=torch.randn(SPECTROGRAMS)).values())
    for encoder, encoding, size in zip((pair.video, pair.audio), encodings, features, strict=True):
        penultimate = size if head == "linear" else 24
        assert encoding.feature.shape == (2, size) == (2, encoder.feature_size)
        assert encoding.penultimate.shape == (2, penultimate) == (2, encoder.penultimate_size)
        assert encoding.embedding.shape == (2, 10)
        assert encoding.length.shape == (2,)
        torch.testing.assert_close(encoding.embedding.square().sum(1), torch.ones(2))
        assert encoder.last.bias is None
        torch.testing.assert_close(
            encoding.embedding * encoding.length[:, None], encoding.penultimate @ encoder.last.weight.T
        )
        if head == "linear":
            centred = encoding.feature - encoding.feature.mean(0)
            expected = centred / (centred.square().mean(0) + 1e-5).sqrt()
            torch.testing.assert_close(encoding.penultimate, expected, rtol=1e-3, atol=1e-3)
        assert (encoding.embedding[0] - encoding.embedding[1]).norm() > 1e-3


@pytest.mark.parametrize("audio", ["tiny", "small"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_every_parameter_gets_a_gradient(head: HeadName, audio: str) -> None:
    """A parameter without one would stop DistributedDataParallel."""
    pair = AudioVisualEncoder(EncoderConfig(audio=audio, mel_bins=16, head=head))
    video, sound = pair(torch.randn(VIDEO), torch.randn(SPECTROGRAMS)).values()
    (video.embedding.sum() + sound.embedding.sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in pair.parameters())


def test_tiny_is_tiny() -> None:
    pair = AudioVisualEncoder()
    for encoder in (pair.video, pair.audio):
        assert 0.4e6 <= sum(parameter.numel() for parameter in encoder.backbone.parameters()) <= 1.1e6


@pytest.mark.parametrize("frames", [1, 4, 8, 16])
@pytest.mark.parametrize("pixels", [16, 48])
def test_tiny_video_takes_any_length_and_size(frames: int, pixels: int) -> None:
    backbone, size = build_video_backbone("tiny")
    assert backbone.eval()(torch.randn(1, 3, frames, pixels, pixels)).shape == (1, size)


@pytest.mark.parametrize("time", [1, 7, 101, 501])
@pytest.mark.parametrize("mel_bins", [1, 16, 64, 80, 128])
def test_small_audio_takes_any_length_and_mel_bands(time: int, mel_bins: int) -> None:
    backbone, size = build_audio_backbone("small", mel_bins)
    inputs = torch.randn(2, mel_bins, time, requires_grad=True)
    features = backbone.eval()(inputs)
    assert features.shape == (2, size)
    features.sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.isfinite().all()


def test_small_audio_is_statistics_of_three_convolutions() -> None:
    """Written out in NumPy, at 80 mels, where bands are whole rows, and a time that is halved without rest."""
    backbone, size = build_audio_backbone("small", 80)
    set_norms(backbone.eval(), "group")
    x = torch.randn(3, 80, 192)
    with torch.no_grad():
        features, wanted = backbone(x).numpy(), []
        layers = cast(Any, backbone).layers
        outputs = backbone.prepare(x)[:, None]
        for number, layer in enumerate(layers):
            outputs = layer(outputs)
            if number > 0:
                rows = outputs.numpy().astype(float)
                wanted.append(rows.reshape(3, rows.shape[1], 10, -1, rows.shape[3]).mean(axis=3))
    means = np.concatenate([rows.mean(axis=3) for rows in wanted], axis=1).reshape(3, -1)
    deviations = np.concatenate([rows.std(axis=3) for rows in wanted], axis=1).reshape(3, -1)
    assert features.shape == (3, size)
    np.testing.assert_allclose(features[:, : size // 2], means, atol=1e-5)
    np.testing.assert_allclose(features[:, size // 2 :] ** 2, deviations**2 + 1e-5, atol=1e-5)
    assert deviations.mean() > 0.1


def test_tiny_features_tell_when_something_happens() -> None:
    """The same picture and the same sound, early or late, must not have the same feature."""
    video, _ = build_video_backbone("tiny")
    audio, _ = build_audio_backbone("tiny", 16)
    flash, click = torch.zeros(1, 3, 16, 32, 32), torch.zeros(1, 16, 160)
    flash[:, :, 2], click[:, :, 20] = 5.0, 5.0
    for backbone, early, late in (
        (video.eval(), flash, flash.roll(11, dims=2)),
        (audio.eval(), click, click.roll(110, dims=2)),
    ):
        a, b, silence = (backbone(x) for x in (early, late, torch.zeros_like(early)))
        assert (a - b).norm() > 0.3 * (a - silence).norm() > 0


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_the_head_keeps_its_precision_under_autocast_and_in_float64(head: HeadName) -> None:
    encoder = AudioVisualEncoder(EncoderConfig(mel_bins=16, head=head)).audio.eval()
    inputs = torch.randn(3, 16, 40)
    with torch.autocast("cpu", torch.bfloat16):
        encoding: Encoding = encoder(inputs)
    exact = encoding.penultimate.double() @ encoder.last.weight.double().T
    torch.testing.assert_close((encoding.embedding * encoding.length[:, None]).double(), exact, rtol=1e-4, atol=1e-6)
    assert {encoding.embedding.dtype, encoding.penultimate.dtype, encoding.feature.dtype} == {torch.float32}
    double = encoder.double()(inputs.double())
    norms = double.embedding.square().sum(1)
    torch.testing.assert_close(norms, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-14)


def test_an_embedding_of_nothing_is_finite_and_has_finite_gradients() -> None:
    encoder = AudioVisualEncoder(EncoderConfig(mel_bins=16)).audio
    nn.init.zeros_(encoder.last.weight)
    encoding = encoder(torch.randn(SPECTROGRAMS))
    encoding.embedding.sum().backward()
    assert encoding.embedding.tolist() == [[0.0] * 128] * 2
    assert encoder.last.weight.grad is not None
    assert torch.isfinite(encoder.last.weight.grad).all()


@pytest.mark.usefixtures("users_checks")
def test_errors() -> None:
    for name in ("mel_bins", "hidden_size", "embedding_size"):
        with pytest.raises(ValueError, match=f"^EncoderConfig: {name} must be at least 1, got 0"):
            EncoderConfig(**{name: 0})
    with pytest.raises(ValueError, match=r"^EncoderConfig: head must be one of linear, mlp, got 'none'"):
        EncoderConfig(head="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name must be one of tiny, r3d_18, mc3_18, r2plus1d_18, got 'resnet18'"):
        build_video_backbone("resnet18")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name must be one of tiny, small, resnet18, resnet18_1d, got 'r3d_18'"):
        build_audio_backbone("r3d_18", 16)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("modality", "name", "shape"),
    [
        ("video", "tiny", (2, 192, 4, 3, 3)),
        ("video", "r3d_18", (2, 512, 1, 3, 3)),
        ("audio", "tiny", (2, 192, 2, 13)),
        ("audio", "small", (2, 384, 10, 13)),
        ("audio", "resnet18", (2, 512, 1, 4)),
        ("audio", "resnet18_1d", (2, 512, 4)),
    ],
)
def test_a_feature_map_is_what_the_feature_is_pooled_from(modality: str, name: str, shape: tuple[int, ...]) -> None:
    inputs = torch.randn(2, 3, 8, 48, 48) if modality == "video" else torch.randn(2, 16, 101)
    config = EncoderConfig(mel_bins=16, **{modality: name})  # type: ignore[arg-type]
    pair = AudioVisualEncoder(config).eval()
    with torch.no_grad():
        plain = pair(**{modality: inputs})[modality]
        asked = pair(**{modality: inputs}, feature_maps_of=(modality,))[modality]
    assert plain.feature_map is None
    assert asked.feature_map is not None
    assert asked.feature_map.shape == shape
    assert torch.equal(asked.feature, plain.feature)
    assert torch.equal(asked.embedding, plain.embedding)
    backbone = getattr(pair, modality).backbone
    assert torch.equal(backbone.pool(asked.feature_map), plain.feature)


def test_a_backbone_without_a_map_says_so() -> None:
    encoder = Encoder(torch.nn.Linear(3, 4), 4, "linear", 4, 2)
    with pytest.raises(ValueError, match="backbone must be a Backbone to give a feature map, got Linear"):
        encoder(torch.randn(2, 3), with_feature_map=True)


def test_torchvisions_weights_fit_the_video_backbone_by_their_own_names() -> None:
    from torchvision.models.video import r3d_18

    own = AudioVisualEncoder(EncoderConfig(video="r3d_18", norm="batch")).video.backbone.state_dict()
    theirs = {name: value for name, value in r3d_18(weights=None).state_dict().items() if not name.startswith("fc.")}
    assert own.keys() == theirs.keys()


@pytest.mark.parametrize(
    ("video", "audio"), [("tiny", "tiny"), ("tiny", "small"), ("r3d_18", "resnet18"), ("r2plus1d_18", "resnet18_1d")]
)
def test_with_group_norm_a_feature_does_not_depend_on_the_rest_of_the_batch(video: str, audio: str) -> None:
    """But for what the sound's mel bands are standardised by, which is frozen here."""
    told = {"video": torch.randn(4, 3, 4, 32, 32), "audio": torch.randn(4, 16, 60)}
    for norm, alone in (("group", True), ("batch", False)):
        config = EncoderConfig(video=video, audio=audio, mel_bins=16, norm=norm)  # type: ignore[arg-type]
        pair = AudioVisualEncoder(config)
        inputs = [module for module in pair.modules() if isinstance(module, InputNorm)]
        assert len(inputs) == 1
        inputs[0].eval()
        for modality, values in told.items():
            backbone = getattr(pair, modality).backbone
            together, half = backbone(values)[:2], backbone(values[:2])
            assert torch.allclose(together, half, atol=1e-4, rtol=1e-4) == alone, (norm, modality)
        assert isinstance(pair.video.hidden[-1], WholeBatchNorm)
