"""Augmentation against naive per-pixel arithmetic and torchvision's crop."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional as reference

from cmacc.clips.loading.transforms import (
    AugmentConfig,
    View,
    augment_video,
    augment_waveforms,
    draw_view,
    grey_video,
    mask_spectrograms,
    stretch_spectrograms,
    to_video,
    window_length,
)

IDENTITY = View(
    0.0, 0.0, 1.0, 1.0, False, False, 1.0, 1.0, 1.0, 0.0, (0.0, 0.0), (0.0, 0.0), 1.0, 0.0, (1.0, 0.0), (1.0, 0.0)
)
NOTHING = AugmentConfig(1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
MEAN, DEVIATION = 0.43, 0.22


def random_frames(batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (batch, 3, 10, 14, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def changed(**fields: object) -> View:
    return dataclasses.replace(IDENTITY, **fields)  # type: ignore[arg-type]


def test_plain_conversion() -> None:
    frames = random_frames()
    video = to_video(frames)
    assert video.shape == (2, 3, 3, 10, 14)
    assert video[1, 2, 0, 4, 5].item() == pytest.approx((frames[1, 0, 4, 5, 2].item() / 255 - MEAN) / DEVIATION)


def test_identity_view_is_the_plain_conversion() -> None:
    frames = random_frames()
    np.testing.assert_allclose(augment_video(frames, [IDENTITY] * 2), to_video(frames), atol=1e-5)


def test_config_of_zeros_draws_the_identity() -> None:
    for seed in range(20):
        view = draw_view(NOTHING, np.random.default_rng(seed))
        assert (view.crop_height, view.crop_width, view.flip, view.grey) == (1, 1, False, False)
        assert (view.brightness, view.contrast, view.saturation, view.gain_db) == (1, 1, 1, 0)
        assert view.time_mask[0] == view.time_mask[1]
        assert view.window == view.stretch_time[0] == view.stretch_frequency[0] == 1
        frames = random_frames(1, seed)
        np.testing.assert_allclose(augment_video(frames, [view]), to_video(frames), atol=1e-5)


def test_flip_mirrors_left_and_right() -> None:
    frames = random_frames()
    got = augment_video(frames, [changed(flip=True), IDENTITY])
    np.testing.assert_allclose(got[0], to_video(frames)[0].flip(-1), atol=1e-5)
    np.testing.assert_allclose(got[1], to_video(frames)[1], atol=1e-5)


def test_grey_is_grey_video() -> None:
    frames = random_frames()
    got = augment_video(frames, [changed(grey=True)] * 2)
    np.testing.assert_allclose(got, grey_video(to_video(frames)), atol=2e-5)
    luma = (frames[1, 2, 3, 4].double() * torch.tensor([0.299, 0.587, 0.114])).sum() / 255
    assert got[1, :, 2, 3, 4].tolist() == pytest.approx([(luma.item() - MEAN) / DEVIATION] * 3, abs=1e-5)


def slow_colours(frames: NDArray[np.uint8], view: View) -> NDArray[np.float64]:
    """Brightness, contrast about the clip's mean luma, saturation, then the clamp; pixel by pixel in float64."""

    def luma(pixel: NDArray[np.float64]) -> float:
        return float(0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2])

    pixels = [view.brightness * pixel for pixel in frames.reshape(-1, 3).astype(float) / 255]
    mean = math.fsum(luma(pixel) for pixel in pixels) / len(pixels)
    out = []
    for pixel in pixels:
        contrasted = mean + view.contrast * (pixel - mean)
        saturation = 0.0 if view.grey else view.saturation
        saturated = luma(contrasted) + saturation * (contrasted - luma(contrasted))
        out.append((np.clip(saturated, 0, 1) - MEAN) / DEVIATION)
    return np.array(out).reshape(frames.shape).transpose(3, 0, 1, 2)


@pytest.mark.parametrize("seed", range(6))
def test_colours_equal_the_slow_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    brightness, contrast, saturation = rng.uniform(0.3, 1.9, 3)
    view = changed(brightness=brightness, contrast=contrast, saturation=saturation, grey=seed == 5)
    frames = random_frames(1, seed)
    wanted = slow_colours(frames[0].numpy(), view)
    assert np.isclose(wanted, -MEAN / DEVIATION).any() or np.isclose(wanted, (1 - MEAN) / DEVIATION).any() or seed == 5
    np.testing.assert_allclose(augment_video(frames, [view])[0], wanted, atol=1e-4)


@pytest.mark.parametrize(("top", "left", "height", "width"), [(0, 0, 5, 7), (3, 2, 7, 12), (9, 13, 1, 1), (4, 1, 6, 3)])
def test_crop_equals_torchvision(top: int, left: int, height: int, width: int) -> None:
    frames = random_frames()
    view = changed(crop_top=top / 10, crop_left=left / 14, crop_height=height / 10, crop_width=width / 14)
    crop = reference.resized_crop(
        frames.permute(0, 1, 4, 2, 3).float(), top, left, height, width, [10, 14], antialias=False
    )
    wanted = (crop / 255 - MEAN) / DEVIATION
    np.testing.assert_allclose(augment_video(frames, [view] * 2), wanted.transpose(1, 2), atol=1e-4)


def test_views_are_per_clip() -> None:
    frames = random_frames(4)
    views = [draw_view(AugmentConfig(), np.random.default_rng(seed)) for seed in range(4)]
    together = augment_video(frames, views)
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(augment_video(frames[order], [views[i] for i in order]), together[order], atol=1e-6)
    for i in range(4):
        np.testing.assert_allclose(augment_video(frames[i : i + 1], [views[i]])[0], together[i], atol=1e-5)
    assert not torch.allclose(together, to_video(frames))


# ---- sound ----------------------------------------------------------------------------------------------------------


def test_gain() -> None:
    waves = torch.randn(3, 50)
    got = augment_waveforms(waves, [changed(gain_db=gain) for gain in np.array([0.0, 20.0, -6.0206])])
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, waves * torch.tensor([[1.0], [10.0], [0.5]]), rtol=1e-5)


def test_masks_put_the_mean_in_their_place() -> None:
    spectrograms = torch.randn(2, 20, 40)
    views = [changed(time_mask=(0.25, 0.5), frequency_mask=(0.9, 1.0)), IDENTITY]
    got = mask_spectrograms(spectrograms, views)
    wanted = spectrograms.clone()
    wanted[0, :, 10:20] = spectrograms[0].mean()
    wanted[0, 18:] = spectrograms[0].mean()
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def slow_stretch(spectrogram: NDArray[np.float64], view: View) -> NDArray[np.float64]:
    """Each place in pixels of the old picture, linear between the middles of the four pixels around it."""
    mels, time = spectrogram.shape

    def source(place: int, count: int, size: float, centre: float) -> tuple[int, int, float]:
        share = (place + 0.5) / count  # of the new axis; 0.5 is its middle
        old = (0.5 + centre / 2 + size * (share - 0.5)) * count - 0.5
        old = min(max(old, 0.0), count - 1.0)
        below = min(int(old), count - 1)
        return below, min(below + 1, count - 1), old - below

    out = np.empty_like(spectrogram)
    for row in range(mels):
        low, high, up = source(row, mels, *view.stretch_frequency)
        for column in range(time):
            left, right, along = source(column, time, *view.stretch_time)
            lower = (1 - along) * spectrogram[low, left] + along * spectrogram[low, right]
            upper = (1 - along) * spectrogram[high, left] + along * spectrogram[high, right]
            out[row, column] = (1 - up) * lower + up * upper
    return out


def test_stretching_equals_the_slow_loop() -> None:
    spectrograms = torch.randn(6, 12, 30)
    config = AugmentConfig(stretch=2.0)
    views = [draw_view(config, np.random.default_rng(seed)) for seed in range(5)] + [IDENTITY]
    assert {view.stretch_time[0] > 1 for view in views} == {view.stretch_frequency[0] > 1 for view in views}
    assert len({view.stretch_time[0] > 1 for view in views}) == 2
    got = stretch_spectrograms(spectrograms, views)
    for ours, before, view in zip(got, spectrograms.numpy().astype(float), views, strict=True):
        np.testing.assert_allclose(ours, slow_stretch(before, view), atol=1e-4)
    assert not torch.allclose(got[0], spectrograms[0], atol=0.1)


def test_without_stretching_nothing_changes_by_a_bit() -> None:
    spectrograms = torch.randn(20, 12, 30)
    views = [draw_view(AugmentConfig(), np.random.default_rng(seed)) for seed in range(20)]
    assert stretch_spectrograms(spectrograms, views) is spectrograms


# ---- windows --------------------------------------------------------------------------------------------------------


def numbered(clips: int, frames: int, samples_per_frame: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames whose grey value is their number, and samples whose value is their place, in frames."""
    video = torch.arange(frames, dtype=torch.uint8).view(1, frames, 1, 1, 1).expand(clips, -1, 2, 2, 3)
    sound = torch.arange(frames * samples_per_frame) / samples_per_frame
    return video.contiguous(), sound.expand(clips, -1).contiguous()


@pytest.mark.parametrize("window", [0.01, 0.2, 0.5, 0.77, 0.99, 1.0])
def test_a_window_is_consecutive_and_at_the_same_place_of_picture_and_sound(window: float) -> None:
    config = dataclasses.replace(NOTHING, window=window)
    views = [draw_view(config, np.random.default_rng(seed)) for seed in range(200)]
    frames, waveforms = numbered(200, 30, 50)
    video, sound = augment_video(frames, views), augment_waveforms(waveforms, views)
    assert video.shape[2] == window_length(30, window) == max(1, round(30 * window))
    assert sound.shape[1] == window_length(1500, window) == round(1500 * window)
    numbers = ((video[:, 0, :, 0, 0] * DEVIATION + MEAN) * 255).round()
    first, onset = numbers[:, 0], sound[:, 0]
    assert torch.equal(numbers, first[:, None] + torch.arange(video.shape[2]))
    np.testing.assert_allclose(sound, onset[:, None] + torch.arange(sound.shape[1]) / 50, atol=1e-4)
    # Lengths are rounded, and with them the places: by a frame at the most, and half of one on average.
    assert (first - onset).abs().max() <= 1
    assert {first.min().item(), first.max().item()} == {0, 30 - video.shape[2]}


def test_every_start_of_a_window_is_equally_likely() -> None:
    config = AugmentConfig(window=0.5)
    rng = np.random.default_rng(0)
    views = [draw_view(config, rng) for _ in range(3000)]
    waveforms = torch.arange(9.0).expand(3000, 9)
    starts = augment_waveforms(waveforms, [dataclasses.replace(view, gain_db=0.0) for view in views])[:, 0]
    counts = np.bincount(starts.int(), minlength=6)  # 4 of 9 samples have 6 places
    assert len(counts) == 6
    assert ((counts - 500) ** 2 / 500).sum() < 20.5  # chi-squared with 5 degrees of freedom: p = 0.001


def test_without_a_window_nothing_is_cut_and_draws_before_it_stay() -> None:
    frames, waveforms = numbered(3, 8, 10)
    whole = [draw_view(AugmentConfig(), np.random.default_rng(seed)) for seed in range(3)]
    assert augment_video(frames, whole).shape[2] == 8
    assert augment_waveforms(waveforms, whole).shape == waveforms.shape
    cut = [draw_view(AugmentConfig(window=0.5, stretch=2.0), np.random.default_rng(seed)) for seed in range(3)]
    added = ("window", "window_place", "stretch_time", "stretch_frequency")
    old = [field.name for field in dataclasses.fields(View) if field.name not in added]
    assert [[getattr(view, name) for name in old] for view in cut] == [
        [getattr(view, name) for name in old] for view in whole
    ]


# ---- drawing --------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    st.builds(
        AugmentConfig,
        min_crop_area=st.floats(0.05, 1),
        max_aspect_change=st.floats(1, 2),
        flip_probability=st.floats(0, 1),
        grey_probability=st.floats(0, 1),
        brightness=st.floats(0, 0.99),
        contrast=st.floats(0, 0.99),
        saturation=st.floats(0, 0.99),
        gain_db=st.floats(0, 30),
        time_mask=st.floats(0, 0.99),
        frequency_mask=st.floats(0, 0.99),
        window=st.floats(0.01, 1),
        stretch=st.floats(1, 4),
    ),
    st.integers(0, 2**32),
)
def test_drawn_views_stay_in_range(config: AugmentConfig, seed: int) -> None:
    view = draw_view(config, np.random.default_rng(seed))
    tiny = 1e-9
    assert 0 <= view.crop_top <= 1 - view.crop_height + tiny
    assert 0 <= view.crop_left <= 1 - view.crop_width + tiny
    # A side that would be longer than the picture is cut to it, which costs area by at most the aspect's change.
    assert view.crop_height * view.crop_width >= config.min_crop_area / config.max_aspect_change - tiny
    stretched = view.crop_height / view.crop_width
    assert 1 / config.max_aspect_change - tiny <= stretched <= config.max_aspect_change + tiny
    for name in ("brightness", "contrast", "saturation"):
        assert abs(getattr(view, name) - 1) <= getattr(config, name) + tiny
    assert abs(view.gain_db) <= config.gain_db
    for name in ("time_mask", "frequency_mask"):
        begin, end = getattr(view, name)
        assert 0 <= begin <= end <= 1 + tiny
        assert end - begin <= getattr(config, name) + tiny
    assert view.window == config.window
    assert 0 <= view.window_place < 1
    for size, centre in (view.stretch_time, view.stretch_frequency):
        assert 1 / config.stretch - tiny <= size <= config.stretch + tiny
        # What is enlarged lies inside, and what is made smaller contains all of it.
        assert abs(centre) <= abs(1 - size) + tiny


def test_switching_one_part_off_leaves_the_rest() -> None:
    config = AugmentConfig(window=0.5, stretch=1.5)
    for field in dataclasses.fields(AugmentConfig):
        off = 1.0 if field.name in ("min_crop_area", "max_aspect_change", "window", "stretch") else 0.0
        full = draw_view(config, np.random.default_rng(7))
        part = draw_view(dataclasses.replace(config, **{field.name: off}), np.random.default_rng(7))
        differing = {f.name for f in dataclasses.fields(View) if getattr(full, f.name) != getattr(part, f.name)}
        kinds = {name.split("_")[0] for name in differing}
        assert len(kinds) <= 1, field.name


def test_probabilities_are_met() -> None:
    rng = np.random.default_rng(0)
    views = [draw_view(AugmentConfig(flip_probability=0.3, grey_probability=0.8), rng) for _ in range(600)]
    assert np.mean([view.flip for view in views]) == pytest.approx(0.3, abs=0.075)  # four standard deviations
    assert np.mean([view.grey for view in views]) == pytest.approx(0.8, abs=0.066)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("min_crop_area", 0.0, r"must be in \(0, 1\]"),
        ("min_crop_area", 1.5, r"must be in \(0, 1\]"),
        ("window", 0.0, r"must be in \(0, 1\]"),
        ("window", 1.1, r"must be in \(0, 1\]"),
        ("stretch", 0.5, "must be at least 1 and finite"),
        ("stretch", float("inf"), "must be at least 1 and finite"),
        ("max_aspect_change", 0.9, "must be at least 1 and finite"),
        ("flip_probability", -0.1, r"must be in \[0, 1\]"),
        ("grey_probability", 1.1, r"must be in \[0, 1\]"),
        ("brightness", 1.0, r"must be in \[0, 1\)"),
        ("contrast", -0.2, r"must be in \[0, 1\)"),
        ("saturation", 2.0, r"must be in \[0, 1\)"),
        ("time_mask", 1.0, r"must be in \[0, 1\)"),
        ("frequency_mask", -1.0, r"must be in \[0, 1\)"),
        ("gain_db", -3.0, "must be at least 0"),
        ("gain_db", float("nan"), "must be at least 0"),
        ("max_aspect_change", float("nan"), "must be at least 1 and finite"),
    ],
)
def test_config_is_checked(field: str, value: float, rule: str) -> None:
    with pytest.raises(ValueError, match=f"AugmentConfig: {field} {rule}, got {value}"):
        AugmentConfig(**{field: value})
