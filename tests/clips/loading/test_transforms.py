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
    to_video,
)

IDENTITY = View(0.0, 0.0, 1.0, 1.0, False, False, 1.0, 1.0, 1.0, 0.0, (0.0, 0.0), (0.0, 0.0))
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


def test_switching_one_part_off_leaves_the_rest() -> None:
    for field in dataclasses.fields(AugmentConfig):
        off = 1.0 if field.name in ("min_crop_area", "max_aspect_change") else 0.0
        full = draw_view(AugmentConfig(), np.random.default_rng(7))
        part = draw_view(dataclasses.replace(AugmentConfig(), **{field.name: off}), np.random.default_rng(7))
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
        ("max_aspect_change", 0.9, "must be at least 1"),
        ("flip_probability", -0.1, r"must be in \[0, 1\]"),
        ("grey_probability", 1.1, r"must be in \[0, 1\]"),
        ("brightness", 1.0, r"must be in \[0, 1\)"),
        ("contrast", -0.2, r"must be in \[0, 1\)"),
        ("saturation", 2.0, r"must be in \[0, 1\)"),
        ("time_mask", 1.0, r"must be in \[0, 1\)"),
        ("frequency_mask", -1.0, r"must be in \[0, 1\)"),
        ("gain_db", -3.0, "must be at least 0"),
        ("gain_db", float("nan"), "must be at least 0"),
        ("max_aspect_change", float("nan"), "must be at least 1"),
    ],
)
def test_config_is_checked(field: str, value: float, rule: str) -> None:
    with pytest.raises(ValueError, match=f"AugmentConfig: {field} {rule}, got {value}"):
        AugmentConfig(**{field: value})
