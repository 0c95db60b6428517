"""Frame differences against a naive loop, mean pooling, and that encoders without either are what they were."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cmacc.clips import ClipSpec, to_video
from cmacc.encoders import AudioVisualEncoder, EncoderConfig, momentum_copy
from cmacc.encoders.video import FrameDifferences, build_video_backbone
from cmacc.pretraining import ConfigError, DataConfig, OptimConfig, PretrainConfig
from cmacc.pretraining.cmacc_encoder import CmaccEncoder
from cmacc.pretraining.encoding import encode_queries
from cmacc.pretraining.features import weights_hash
from cmacc.pretraining.learner import Learner
from cmacc.pretraining.random_clips import RandomClips

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"mel_bins": 16, "hidden_size": 24, "embedding_size": 10}
MOTION: dict[str, Any] = {"video_input": "differences", "video_pooling": "mean"}


def naive(video: Tensor) -> Tensor:
    """Pixel by pixel."""
    pixels = video.double().numpy()
    clips, _, times, height, width = pixels.shape
    found = np.zeros((clips, 3, times - 1, height, width))
    for clip, time, row, column in np.ndindex(clips, times - 1, height, width):
        before, after = (
            0.299 * red + 0.587 * green + 0.114 * blue
            for red, green, blue in (pixels[clip, :, time + later, row, column] for later in (0, 1))
        )
        found[clip, :, time, row, column] = 2 * (after - before)
    return torch.from_numpy(found)


@pytest.mark.parametrize("times", [2, 3, 7])
def test_they_are_those_of_a_loop_over_pixels(times: int) -> None:
    video = torch.randn(3, 3, times, 4, 5)
    torch.testing.assert_close(FrameDifferences()(video), naive(video).float(), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):  # no digits are lost before the first layer
        torch.testing.assert_close(FrameDifferences()(video), naive(video).float(), rtol=1e-5, atol=1e-6)


def test_a_still_clip_is_all_zeros_and_a_constant_light_over_it_changes_nothing() -> None:
    still = torch.randn(2, 3, 1, 6, 6).expand(-1, -1, 5, -1, -1)
    assert not FrameDifferences()(still).any()
    moving = torch.randn(2, 3, 5, 6, 6)
    torch.testing.assert_close(FrameDifferences()(moving + 3), FrameDifferences()(moving), rtol=0, atol=1e-5)


def test_gradients_are_finite_differences() -> None:
    video = torch.randn(1, 3, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(FrameDifferences(), video)


@pytest.mark.parametrize("name", ["tiny", "r3d_18"])
def test_the_layers_see_differences_and_the_mean_pools_their_map(name: str) -> None:
    plain, _ = build_video_backbone(name)
    backbone, size = build_video_backbone(name, "mean", "differences")
    assert size == backbone.map_channels == plain.map_channels
    backbone.load_state_dict(plain.state_dict())  # there is nothing to learn in either
    plain.eval(), backbone.eval()
    video = torch.randn(2, 3, 6, 32, 32)
    prepared = backbone.prepare(video)
    assert prepared.shape == (2, 3, 5, 32, 32)
    seen = naive(video).float()
    feature_map = plain.feature_map(seen)
    torch.testing.assert_close(backbone.feature_map(video), feature_map, rtol=1e-4, atol=1e-5)
    mean = np.asarray(feature_map.detach().double()).reshape(2, size, -1).mean(-1)
    torch.testing.assert_close(backbone(video), torch.from_numpy(mean).float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(backbone(prepared, prepared=True), backbone(video))


def test_an_encoder_of_both_trains_and_evaluates_clips_alone_as_in_a_batch() -> None:
    encoder = AudioVisualEncoder(EncoderConfig(**MOTION, **SMALL)).video
    assert encoder.feature_size == 192
    video = torch.randn(4, 3, 6, 32, 32)
    (encoder(video).embedding @ torch.randn(10)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters())
    encoder.eval()
    with torch.no_grad():
        whole = encoder(video).embedding
        torch.testing.assert_close(
            torch.cat([encoder(row[None]).embedding for row in video]), whole, rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(momentum_copy(encoder)(video).embedding, whole)


def test_chunks_give_the_gradient_of_the_whole_batch() -> None:
    found = []
    for chunk_size in (None, 3):
        config = PretrainConfig(
            data=DataConfig(clip=ClipSpec(frame_count=4, frame_height=16, frame_width=16, audio_seconds=0.5)),
            encoder=EncoderConfig(**MOTION, **SMALL),
            optim=OptimConfig(batch_size=8, chunk_size=chunk_size, steps=10),
            precision="fp32",
        )
        table = RandomClips(24, config, CPU)
        learner = Learner.build(table.encoder(config), table.views(config), config, CPU, None)
        passed = encode_queries(learner, learner.views.of(table.batch(torch.arange(8)), 0), {}, step=0)
        passed.backward((passed.queries["video"].embedding @ torch.ones(10)).square().sum())
        found.append([parameter.grad for parameter in learner.encoder.video.parameters()])
    assert all(gradient is not None and gradient.any() for gradient in found[0])
    for whole, chunks in zip(*found, strict=True):
        torch.testing.assert_close(whole, chunks, rtol=1e-4, atol=1e-6)


def test_evaluation_sees_differences_too_and_pools_its_map() -> None:
    pair = AudioVisualEncoder(EncoderConfig(**MOTION, **SMALL)).eval()
    encoder = CmaccEncoder(pair, ClipSpec(frame_count=5, frame_height=32, frame_width=32), is_grey=False)
    frames = torch.randint(0, 256, (2, 5, 32, 32, 3), dtype=torch.uint8)
    found = encoder.embed_video(frames)
    body, pool = pair.video.backbone.body, pair.video.backbone.pool  # type: ignore[operator, union-attr]
    wanted = pool(body(naive(to_video(frames)).float()))  # type: ignore[operator]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.pool_map(encoder.map_video(frames)), found)


def test_names_of_weights_hashes_and_texts_are_what_they_were() -> None:
    """`weights_hash` covers the config's text and public attributes; test_trainer.py holds a whole run's numbers."""
    plain, motion = AudioVisualEncoder(EncoderConfig(**SMALL)), AudioVisualEncoder(EncoderConfig(**MOTION, **SMALL))
    assert plain.state_dict().keys() == motion.state_dict().keys()
    assert "video_input" not in repr(plain.config)
    assert all("differences" not in vars(module) for module in plain.modules())
    assert sum(isinstance(module, FrameDifferences) for module in plain.modules()) == 0


@pytest.mark.parametrize(("name", "change"), [("r3d_18", setting) for setting in MOTION.items()], ids=[*MOTION])
def test_the_hash_of_weights_tells_inputs_and_poolings_apart(name: str, change: tuple[str, str]) -> None:
    """With equal weights: they have none of their own."""
    config = EncoderConfig(video=name, **SMALL)
    other = dataclasses.replace(config, **dict([change]))  # type: ignore[arg-type]
    one, changed = AudioVisualEncoder(config), AudioVisualEncoder(other)
    changed.load_state_dict(one.state_dict())
    assert weights_hash(one) != weights_hash(changed)
    assert weights_hash(changed) == weights_hash(momentum_copy(changed).train())


@pytest.mark.usefixtures("users_checks")
def test_errors() -> None:
    with pytest.raises(
        ValueError, match=r"^FrameDifferences: clips must have at least 2 frames to see what changes, g"
    ):
        AudioVisualEncoder(EncoderConfig(**MOTION, **SMALL)).video(torch.zeros(2, 3, 1, 16, 16))
    with pytest.raises(
        ConfigError, match=r"^data.clip.frame_count must be at least 2 with encoder.video_input=differe"
    ):
        PretrainConfig(data=DataConfig(clip=ClipSpec(frame_count=1)), encoder=EncoderConfig(**MOTION))
    with pytest.raises(ValueError, match=r"^EncoderConfig: video_input must be one of frames, differences, got 'flow'"):
        EncoderConfig(video_input="flow")  # type: ignore[arg-type]
    message = r"^EncoderConfig: video_input must be frames with a tower \(timm:test_resnet\), which was made for them"
    with pytest.raises(ValueError, match=message):
        EncoderConfig(video="timm:test_resnet", video_input="differences")
