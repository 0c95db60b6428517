"""The inputs of the encoders: windows of clips, their second views, and inputs that are computed again."""

import dataclasses

import numpy as np
import pytest
import torch

from cmacc.clips import AugmentConfig, ClipBatch, ClipSpec, LogMel, draw_view, to_video
from cmacc.clips.seeds import AUGMENTATION, seeded_rng
from cmacc.encoders import MODALITIES, EncoderConfig
from cmacc.pretraining import DataConfig, PretrainConfig
from cmacc.pretraining.clip_views import ClipViews

CLIP = ClipSpec(
    frame_count=8, frame_rate_hz=8.0, frame_height=16, frame_width=16, audio_seconds=1.0, sample_rate_hz=8000
)


def batch() -> ClipBatch:
    frames = torch.randint(0, 256, (4, 8, 16, 16, 3), dtype=torch.uint8)
    return ClipBatch(frames, 0.1 * torch.randn(4, 8000), torch.arange(4) + 3, torch.full((4,), -1), {})


def views(**augment: float) -> ClipViews:
    data = DataConfig(clip=CLIP, augment=AugmentConfig(**augment))
    return ClipViews(PretrainConfig(data=data, encoder=EncoderConfig(mel_bins=32)), torch.device("cpu"))


def test_training_views_are_windows_and_plain_ones_are_whole() -> None:
    cut, clips = views(window=0.5, stretch=1.5), batch()
    inputs = cut.of(clips, 0)
    assert inputs["video"].shape == (4, 3, 4, 16, 16)
    assert inputs["audio"].shape == (4, 32, 51)
    for modality in MODALITIES:
        other = cut.another(modality, clips, 0)
        assert other.shape == inputs[modality].shape
        assert not torch.allclose(other, inputs[modality], atol=0.1)
    assert torch.equal(cut.plain("video", clips, 0), to_video(clips.frames))
    assert torch.equal(cut.plain("audio", clips, 0), LogMel(8000, 32)(clips.waveforms))


def test_two_views_are_two_windows_of_one_clip() -> None:
    plain = dict.fromkeys(("time_mask", "frequency_mask", "gain_db"), 0.0)
    cut, clips = views(window=0.5, **plain), batch()
    # A ramp of loudness tells where a window lies.
    clips = dataclasses.replace(clips, waveforms=torch.randn(4, 8000) * torch.linspace(0.1, 1.0, 8000))
    first, second = cut.of(clips, 0)["audio"], cut.another("audio", clips, 0)
    louder = (first - second).mean(dim=(1, 2))
    config = AugmentConfig(window=0.5, **plain)
    for row, sample_id in enumerate(clips.sample_ids.tolist()):
        one, two = (
            draw_view(config, seeded_rng(AUGMENTATION, 0, 0, sample_id, *number)).window_place for number in ((), (1,))
        )
        assert abs(one - two) > 0.02
        assert (louder[row] > 0) == (one > two)


@pytest.mark.parametrize("augment", [{}, {"window": 0.4, "stretch": 2.0}])
def test_inputs_are_computed_again_from_what_is_kept(augment: dict[str, float]) -> None:
    made, clips = views(**augment), batch()
    kept = made.kept(clips, 5)
    assert kept["frames"].shape == clips.frames.shape
    wanted = made.of(clips, 5)
    for modality in MODALITIES:
        again = made.again(modality, kept.__getitem__)
        np.testing.assert_allclose(again, wanted[modality], atol=0.02)  # waveforms are kept in half precision


def test_spectrograms_are_stretched_before_they_are_masked() -> None:
    """A mask has whole bands and times, the same with stretching as without; and the sound beside it differs."""
    clips = batch()
    plain, stretched = (views(stretch=stretch, time_mask=0.5, frequency_mask=0.5) for stretch in (1.0, 2.0))
    masks = []
    for one in (plain, stretched):
        audio = one.of(clips, 0)["audio"]
        values = [spectrogram.flatten().mode().values for spectrogram in audio]
        masks.append(torch.stack([row == value for row, value in zip(audio, values, strict=True)]))
    assert masks[0].float().mean() > 0.1
    assert torch.equal(masks[0] & masks[1], masks[0])
