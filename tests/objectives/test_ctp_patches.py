"""Patches stand where their boxes say, and are drawn with the stated probabilities."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest, kstest

from cmacc.objectives.ctp_patches import (
    INNER_KEY_FRAME_SHARES,
    INTERPOLATION_SHARES,
    SHAPE_SHARES,
    SOFT_EDGE_SHARE,
    CatchThePatchConfig,
    Tracks,
    draw_interpolations,
    draw_key_frames,
    draw_tracks,
    interpolate,
    paste,
)

CONFIG = CatchThePatchConfig()
# The draws are seeded, so that a test passes always or never; by chance a right program fails one in 100,000.
SIGNIFICANCE = 1e-5


def drawn(seed: int, frames: int = 8, height: int = 40, width: int = 56, **changes: float) -> Tracks:
    return draw_tracks(replace(CONFIG, **changes), np.random.default_rng(seed), frames, height, width)


def plain(boxes: list[list[list[int]]], source_frame: list[int], opacity: float = 1.0) -> Tracks:
    """Rectangles with a hard edge."""
    patches = len(boxes)
    return Tracks(
        np.array(boxes),
        np.full((patches, len(boxes[0])), opacity),
        np.zeros(patches, np.int64),
        np.array(source_frame),
        np.full(patches, 0.5),
    )


def clips(count: int = 1, frames: int = 8, height: int = 40, width: int = 56) -> torch.Tensor:
    return torch.randn(count, 3, frames, height, width, dtype=torch.float64)


def naive_paste(video: NDArray[np.float64], tracks: list[Tracks]) -> NDArray[np.float64]:
    """Pixel by pixel."""
    pasted = video.copy()
    for m, of_clip in enumerate(tracks):
        for p in range(len(of_clip.boxes)):
            s = int(of_clip.source_frame[p])
            a1, b1, a2, b2 = (int(edge) for edge in of_clip.boxes[p, s])
            content = video[m, :, s, b1:b2, a1:a2]
            for t in range(video.shape[2]):
                x1, y1, x2, y2 = (int(edge) for edge in of_clip.boxes[p, t])
                for y in range(y1, y2):
                    for x in range(x1, x2):
                        u, v = (x + 0.5 - x1) / (x2 - x1), (y + 0.5 - y1) / (y2 - y1)
                        across, down = abs(u - 0.5), abs(v - 0.5)
                        distance = (max(across, down), np.sqrt(across**2 + down**2), across + down)[of_clip.shape[p]]
                        if distance >= 0.5:
                            continue
                        fade = 1.0
                        if of_clip.soft_from[p] < 0.5:
                            fade = np.clip((0.5 - distance) / (0.5 - of_clip.soft_from[p]), 0, 1)
                        alpha = of_clip.opacity[p, t] * fade
                        value = naive_sample(content, u * (a2 - a1) - 0.5, v * (b2 - b1) - 0.5)
                        pasted[m, :, t, y, x] = (1 - alpha) * pasted[m, :, t, y, x] + alpha * value
    return pasted


def naive_sample(content: NDArray[np.float64], x: float, y: float) -> NDArray[np.float64]:
    """Bilinear; pixels beyond the edge are those at the edge."""
    total = np.zeros(len(content))
    for row in (int(np.floor(y)), int(np.floor(y)) + 1):
        for column in (int(np.floor(x)), int(np.floor(x)) + 1):
            weight = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
            inside = min(max(row, 0), content.shape[1] - 1), min(max(column, 0), content.shape[2] - 1)
            total += weight * content[:, inside[0], inside[1]]
    return total


@pytest.mark.parametrize("count", [1, 3])
def test_pasting_is_that_of_a_loop_over_pixels(count: int) -> None:
    video = clips(count, frames=4, height=32, width=48)
    tracks = [drawn(seed, 4, 32, 48, patches=5) for seed in range(count)]
    before = video.clone()
    pasted = paste(video, tracks)
    np.testing.assert_allclose(pasted.numpy(), naive_paste(video.numpy(), tracks), atol=2e-6)  # opacities are float32
    assert torch.equal(video, before)
    single = paste(video.float(), tracks)
    torch.testing.assert_close(single, pasted.float(), atol=1e-5, rtol=0)


def test_opaque_patches_of_one_size_are_the_sources_pixels_exactly() -> None:
    video = clips(frames=3)
    boxes = [[[2, 3, 9, 14], [20, 10, 27, 21], [49, 29, 56, 40]]]
    pasted = paste(video, [plain(boxes, [1])])
    expected = video.clone()
    for t, (x1, y1, x2, y2) in enumerate(boxes[0]):
        expected[0, :, t, y1:y2, x1:x2] = video[0, :, 1, 10:21, 20:27]
    assert torch.equal(pasted, expected)


def test_a_later_patch_lies_on_top_and_both_show_the_clean_clip() -> None:
    video = clips(frames=2)
    under, over = [[0, 0, 20, 20], [10, 10, 30, 30]], [[30, 0, 40, 10], [12, 12, 22, 22]]
    pasted = paste(video, [plain([under, over], [0, 0])])
    assert torch.equal(pasted[0, :, 1, 12:22, 12:22], video[0, :, 0, 0:10, 30:40])
    assert torch.equal(pasted[0, :, 1, 10:12, 10:30], video[0, :, 0, 0:2, 0:20])


def test_nothing_changes_outside_the_boxes_nor_in_the_source_frame() -> None:
    video = clips()
    tracks = drawn(3, patches=1)
    changed = (paste(video, [tracks]) != video).any(1)[0]
    for t, (x1, y1, x2, y2) in enumerate(tracks.boxes[0]):
        changed[t, y1:y2, x1:x2] = False
    assert not changed.any()
    assert torch.equal(paste(video, [tracks])[:, :, tracks.source_frame[0]], video[:, :, tracks.source_frame[0]])


def test_hidden_patches_leave_no_trace() -> None:
    video = clips()
    tracks = drawn(1, visible=0.0)
    hidden = (tracks.opacity == 0).all(0)
    assert hidden.sum() == 8 - len({0, *tracks.source_frame.tolist()})
    assert torch.equal(paste(video, [tracks])[:, :, hidden], video[:, :, hidden])


@settings(max_examples=150)
@given(
    st.integers(0, 10**9), st.integers(2, 20), st.integers(16, 120), st.integers(16, 120), st.floats(0, 30),
    st.floats(0, 0.5),
)  # fmt: skip
def test_boxes_are_never_empty_and_within_the_picture(
    seed: int, frames: int, height: int, width: int, speed: float, growth: float
) -> None:
    tracks = drawn(seed, frames, height, width, speed=speed, growth=growth)
    start, end = tracks.boxes[..., :2], tracks.boxes[..., 2:]
    assert tracks.boxes.shape == (3, frames, 4)
    assert (start >= 0).all()
    assert (end - start >= 2).all()
    assert (end <= [width, height]).all()
    assert ((tracks.opacity == 0) | ((tracks.opacity >= 0.8) & (tracks.opacity <= 1))).all()
    assert (tracks.opacity[:, 0] > 0).all()
    area = (end - start).prod(axis=-1).mean(axis=1)
    assert (np.diff(area) <= 0).all()


def test_a_generator_of_the_same_seed_draws_the_same() -> None:
    first, again, other = drawn(5), drawn(5), drawn(6)
    for each in fields(Tracks):
        np.testing.assert_array_equal(getattr(first, each.name), getattr(again, each.name))
    assert (first.boxes != other.boxes).any()


def test_linear_interpolation_without_inner_key_frames_is_constant_velocity() -> None:
    values = np.array([[[3.0, 8.0], [18.0, -7.0]]])
    linear, faster, slower = (interpolate(np.array([0, 15]), values, np.array([kind]))[0] for kind in range(3))
    np.testing.assert_allclose(np.diff(linear, axis=0), np.tile([1.0, -1.0], (15, 1)))
    # Quadratic: constant second differences, from rest or to rest.
    np.testing.assert_allclose(np.diff(faster, n=2, axis=0), np.tile([30 / 225, -30 / 225], (14, 1)))
    np.testing.assert_allclose(slower[::-1], values[0, :1] + values[0, 1:] - faster)
    for track in (linear, faster, slower):
        np.testing.assert_allclose(track[[0, -1]], values[0])


def test_values_at_key_frames_are_kept() -> None:
    keys, values = np.array([0, 4, 9, 15]), np.random.default_rng(0).normal(size=(3, 4, 2))
    np.testing.assert_allclose(interpolate(keys, values, np.array([0, 1, 2]))[:, keys], values)


def test_a_patch_that_neither_moves_nor_grows_stays() -> None:
    boxes = drawn(2, speed=0.0, growth=0.0).boxes
    assert (boxes == boxes[:, :1]).all()


def test_moves_and_sizes_follow_the_size_of_the_frame_and_of_the_clip() -> None:
    """The same draw, in a picture four times as large and a clip four times as long."""
    small, large = drawn(4, 16, 112, 112), drawn(4, 61, 448, 448)
    np.testing.assert_allclose(large.boxes[:, ::4], small.boxes * 4, atol=4)


def check_shares(counts: NDArray[np.int64], shares: tuple[float, ...]) -> None:
    for count, share in zip(counts, shares, strict=True):
        assert binomtest(int(count), int(counts.sum()), share).pvalue > SIGNIFICANCE


def test_draws_have_the_stated_shares() -> None:
    of_clips = [drawn(seed, 16, 112, 112, patches=20, visible=0.7) for seed in range(300)]
    check_shares(np.bincount(np.concatenate([each.shape for each in of_clips])), SHAPE_SHARES)
    check_shares(np.bincount(np.concatenate([each.source_frame for each in of_clips])), (1 / 16,) * 16)
    soft_from = np.concatenate([each.soft_from for each in of_clips])
    soft = soft_from < 0.5
    check_shares(np.array([soft.sum(), (~soft).sum()]), (SOFT_EDGE_SHARE, 1 - SOFT_EDGE_SHARE))
    assert kstest(soft_from[soft], "uniform", (0.30, 0.15)).pvalue > SIGNIFICANCE
    shown = np.concatenate(
        [np.delete(each.opacity[p], [0, each.source_frame[p]]) > 0 for each in of_clips for p in range(len(each.shape))]
    )
    check_shares(np.array([shown.sum(), (~shown).sum()]), (0.7, 0.3))
    assert kstest([each.opacity[p, 0] for each in of_clips for p in range(20)], "uniform", (0.8, 0.2)).pvalue > 1e-5


def test_key_frames_and_interpolations_have_the_stated_shares() -> None:
    rng = np.random.default_rng(0)
    keys = [tuple(draw_key_frames(rng, 16).tolist()) for _ in range(5000)]
    inner = np.array([len(each) - 2 for each in keys])
    check_shares(np.bincount(inner), INNER_KEY_FRAME_SHARES)
    check_shares(np.bincount([each[1] - 6 for each in keys if len(each) == 3]), (0.25,) * 4)
    assert {each[1:3] for each in keys if len(each) == 4} == {(4, 9), (4, 10), (5, 9), (5, 10)}
    assert all(each[0] == 0 and each[-1] == 15 for each in keys)
    check_shares(np.bincount(draw_interpolations(rng, 5000)), INTERPOLATION_SHARES)


def test_patches_move_and_grow_by_at_most_what_is_stated() -> None:
    """Between the first and the last frame, which are key frames."""
    boxes = np.stack([drawn(seed, 16, 112, 112).boxes for seed in range(400)]).reshape(-1, 16, 4)
    inside = ((boxes[:, -1] > 0) & (boxes[:, -1] < 112)).all(axis=1)  # not clipped
    centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    move, ratio = centre[:, -1] - centre[:, 0], (size[:, -1] / size[:, 0])[inside]
    assert 25 < np.abs(move).max() <= 45 + 1
    assert np.abs(np.log(ratio)).max() <= 15 * 0.025 + 0.12  # two roundings of a small side


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patches": 0}, "objective.ctp.patches must be at least 1, got 0"),
        ({"channels": 0}, "objective.ctp.channels must be at least 1, got 0"),
        ({"hidden": -1}, "objective.ctp.hidden must be at least 1, got -1"),
        ({"speed": -1.0}, "objective.ctp.speed must be at least 0 and finite, got -1.0"),
        ({"growth": float("inf")}, "objective.ctp.growth must be at least 0 and finite, got inf"),
        ({"growth": float("nan")}, "objective.ctp.growth must be at least 0 and finite, got nan"),
        ({"visible": 1.5}, "objective.ctp.visible must be between 0 and 1, got 1.5"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_clips_that_cannot_hold_a_track_are_refused() -> None:
    with pytest.raises(ValueError, match="frame_count must be at least 2, got 1"):
        drawn(0, frames=1)
    with pytest.raises(ValueError, match="at least 16 pixels, got 40 x 15"):
        drawn(0, width=15)
