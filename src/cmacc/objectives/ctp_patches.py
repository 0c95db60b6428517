"""Patches that move and scale over a clip (Wang et al., 2021): draw their tracks, and paste them.

The paper's constants are for 112 pixels and 16 frames. Lengths scale with the shorter side of the frame, and change a
frame with the number of frames, so that a patch crosses the same share of the picture within a clip of any size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

PAPER_SIDE = 112
_PAPER_STEPS = 15  # from the first frame to the last
LEAST_SIDE = 2  # pixels, of a box
LEAST_FRAME_SIDE = 16  # pixels: the paper's smallest patches then have about two

SHAPES = ("rectangle", "ellipse", "rhombus")
SHAPE_SHARES = (0.5, 0.35, 0.15)
INTERPOLATIONS = ("linear", "accelerating", "decelerating")
INTERPOLATION_SHARES = (0.7, 0.15, 0.15)
INNER_KEY_FRAME_SHARES = (0.5, 0.3, 0.2)  # of none, one, two
SOFT_EDGE_SHARE = 0.5
_SIDES = (16, 24, 28, 32, 48, 64)
_RATIOS = (0.5, 0.67, 0.75, 1, 1.33, 1.5, 2)
_SIDE_JITTER = 0.18
_LEAST_OPACITY = 0.8
_SOFT_FROM = (0.30, 0.45)
_HARD_EDGE = 0.5


@dataclass(frozen=True)
class CatchThePatchConfig:
    """Settings of `CatchThePatch`.

    Parameters
    ----------
    patches
        Number of patches of a clip.
    speed
        Largest mean speed of a patch between two key frames along either axis, in pixels a frame of a clip of 16 frames
        of 112 pixels.
    growth
        Largest change of the logarithm of a patch's width and height, a frame of such a clip.
    visible
        Probability that a patch is shown in a frame. The first frame always shows it.
    channels
        Channels of the feature map that the patches are cut from.
    hidden
        Width of the hidden layer.
    """

    patches: int = 3
    speed: float = 3.0
    growth: float = 0.025
    visible: float = 0.8
    channels: int = 128
    hidden: int = 256

    def __post_init__(self) -> None:
        for name in ("patches", "channels", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"objective.ctp.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("speed", "growth"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"objective.ctp.{name} must be at least 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.visible <= 1:
            raise ValueError(f"objective.ctp.visible must be between 0 and 1, got {self.visible}")


@dataclass(frozen=True)
class Tracks:
    """The patches of one clip of T frames, in the order in which they are pasted: larger mean area first.

    Attributes
    ----------
    boxes
        ``(patches, T, 4)`` int64: left, top, right, bottom pixel edges, right and bottom exclusive.
    opacity
        ``(patches, T)``, 0 to 1; 0 where the patch is hidden.
    shape
        ``(patches,)`` int64, an index of `SHAPES`.
    source_frame
        ``(patches,)`` int64: the frame whose box is the patch's content.
    soft_from
        ``(patches,)``: the distance from the centre, where the edge is at 0.5, from which the patch fades out; 0.5 is a
        hard edge.
    """

    boxes: NDArray[np.int64]
    opacity: NDArray[np.float64]
    shape: NDArray[np.int64]
    source_frame: NDArray[np.int64]
    soft_from: NDArray[np.float64]


def draw_tracks(
    config: CatchThePatchConfig, rng: np.random.Generator, frame_count: int, height: int, width: int
) -> Tracks:
    """Draw the patches of one clip. They depend on the arguments only.

    Key frames and kinds of interpolation are the same for all patches of a clip, as in the released code.

    Raises
    ------
    ValueError
        Fewer than two frames, or frames of less than 16 pixels.
    """
    if frame_count < 2:
        raise ValueError(f"draw_tracks: frame_count must be at least 2, got {frame_count}")
    if min(height, width) < LEAST_FRAME_SIDE:
        raise ValueError(f"draw_tracks: frames must have at least {LEAST_FRAME_SIDE} pixels, got {height} x {width}")
    patches, scale, frame = config.patches, min(height, width) / PAPER_SIDE, np.array([width, height])
    keys = draw_key_frames(rng, frame_count)
    move_kinds, size_kinds = draw_interpolations(rng, len(keys) - 1), draw_interpolations(rng, len(keys) - 1)
    steps = np.diff(keys)[:, None] * (_PAPER_STEPS / (frame_count - 1))  # in frames of the paper's clip

    side, root = rng.choice(_SIDES, (patches, 1)) * scale, np.sqrt(rng.choice(_RATIOS, (patches, 1)))
    first_size = np.concatenate([side * root, side / root], axis=1)
    first_size *= np.exp(rng.uniform(-_SIDE_JITTER, _SIDE_JITTER, (patches, 2)))
    first_size = first_size.clip(LEAST_SIDE, frame - 1)
    nearest = first_size / 2  # the centre's distance from the edge of the picture
    centres = [rng.uniform(nearest, frame - nearest)]
    for move in rng.uniform(-1, 1, (patches, len(steps), 2)).swapaxes(0, 1) * steps[:, None] * config.speed * scale:
        centres.append((centres[-1] + move).clip(nearest, frame - nearest))
    growth = rng.uniform(-1, 1, (patches, len(steps), 2)) * steps * config.growth
    sizes = first_size[:, None] * np.exp(np.pad(growth.cumsum(axis=1), ((0, 0), (1, 0), (0, 0))))
    boxes = _pixel_boxes(
        interpolate(keys, np.stack(centres, axis=1), move_kinds), interpolate(keys, sizes, size_kinds), frame
    )

    opacity = interpolate(keys, rng.uniform(_LEAST_OPACITY, 1, (patches, len(keys), 1)), np.zeros_like(move_kinds))
    source_frame = rng.integers(frame_count, size=patches)
    visible = rng.random((patches, frame_count)) < config.visible
    visible[:, 0] = True
    visible[np.arange(patches), source_frame] = True
    shape = rng.choice(len(SHAPES), patches, p=SHAPE_SHARES)
    soft = rng.random(patches) < SOFT_EDGE_SHARE
    soft_from = np.where(soft, rng.uniform(*_SOFT_FROM, patches), _HARD_EDGE)

    area = (boxes[..., 2:] - boxes[..., :2]).prod(axis=-1).mean(axis=1)
    order = np.argsort(-area, kind="stable")
    opacity = opacity[..., 0] * visible
    return Tracks(boxes[order], opacity[order], shape[order], source_frame[order], soft_from[order])


def draw_key_frames(rng: np.random.Generator, frame_count: int) -> NDArray[np.int64]:
    """The first and the last frame, and up to two between them: increasing. In very short clips some coincide."""
    number = rng.choice(3, p=INNER_KEY_FRAME_SHARES)
    inner = ([], [8 + rng.integers(-2, 2)], [5 + rng.integers(-1, 1), 10 + rng.integers(-1, 1)])[number]
    at = np.rint(np.array([0, *inner, _PAPER_STEPS]) * ((frame_count - 1) / _PAPER_STEPS))
    return np.unique(at.astype(np.int64))


def draw_interpolations(rng: np.random.Generator, number: int) -> NDArray[np.int64]:
    """A kind for each interval between key frames, an index of `INTERPOLATIONS`."""
    return rng.choice(len(INTERPOLATIONS), number, p=INTERPOLATION_SHARES)


def interpolate(keys: NDArray[np.int64], values: NDArray[np.float64], kinds: NDArray[np.int64]) -> NDArray[np.float64]:
    """The values at all frames, ``(patches, T, n)``, from those at the key frames, ``(patches, keys, n)``."""
    frames = np.arange(keys[0], keys[-1] + 1)
    interval = (np.searchsorted(keys, frames, side="right") - 1).clip(max=len(keys) - 2)
    part = (frames - keys[interval]) / np.diff(keys)[interval]
    part = np.stack([part, part**2, 1 - (1 - part) ** 2])[kinds[interval], np.arange(len(frames))]
    start, end = values[:, interval], values[:, interval + 1]
    between: NDArray[np.float64] = start + (end - start) * part[:, None]
    return between


def _pixel_boxes(
    centres: NDArray[np.float64], sizes: NDArray[np.float64], frame: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Clipped to the picture, rounded, and at least `LEAST_SIDE` wide and high."""
    start = np.rint((centres - sizes / 2).clip(0, frame)).astype(np.int64)
    end = np.rint((centres + sizes / 2).clip(0, frame)).astype(np.int64)
    start = np.minimum(start, frame - LEAST_SIDE)
    return np.concatenate([start, np.maximum(end, start + LEAST_SIDE)], axis=-1)


@torch.no_grad()
def paste(
    video: Float[Tensor, "batch channels time height width"], tracks: Sequence[Tracks]
) -> Float[Tensor, "batch channels time height width"]:
    """Paste the patches onto clips, on their device; the clips stay as they are.

    The content is taken from the clips without patches and resized to each frame's box, bilinearly and without
    smoothing. In its source frame a patch therefore cannot be seen, unless another lies beneath.

    Parameters
    ----------
    video
        ``(M, C, T, H, W)``.
    tracks
        The patches of each clip; as many for each.
    """
    clean = video.contiguous()
    pasted = clean.clone()
    batch = {each.name: np.stack([getattr(of_clip, each.name) for of_clip in tracks]) for each in fields(Tracks)}
    for patch in range(batch["boxes"].shape[1]):
        _paste_one(clean, pasted, Tracks(**{name: values[:, patch] for name, values in batch.items()}))
    return pasted


def _paste_one(clean: Tensor, pasted: Tensor, tracks: Tracks) -> None:
    """Paste one patch onto each clip, in place; here the rows of the tracks are clips.

    Only the pixels within the boxes are computed, about a seventh of all. Their number is known here, so that nothing
    waits for a GPU.
    """
    (clips, channels, frames, height, width), device = clean.shape, clean.device
    corner, size = tracks.boxes[..., :2], tracks.boxes[..., 2:] - tracks.boxes[..., :2]
    each, source = np.arange(clips), tracks.source_frame
    counts = size.prod(axis=-1)
    # Index of the first pixel of each box in the flattened clips' first channel.
    of_frame = each[:, None] * (channels * frames) + np.arange(frames)
    starts = (of_frame * height + corner[..., 1]) * width + corner[..., 0]
    pixels = torch.from_numpy(counts.reshape(-1)).to(device)
    box_width, box_height, source_width, source_height, start, source_start, first, shape = _at_pixels(
        pixels,
        (
            size[..., 0],
            size[..., 1],
            size[each, source, 0, None],
            size[each, source, 1, None],
            starts,
            starts[each, source, None],
            counts.cumsum().reshape(counts.shape) - counts,
            tracks.shape[:, None],
        ),
        int(counts.sum()),
    )
    steepness = 1 / np.maximum(_HARD_EDGE - tracks.soft_from, 1e-6)
    opacity, steep = _at_pixels(pixels, (tracks.opacity, steepness[:, None]), int(counts.sum()))
    dtype = torch.promote_types(clean.dtype, torch.float32)

    place = torch.arange(len(first), device=device) - first
    row = place // box_width
    column = place - row * box_width
    left, right, x = _neighbours(column, box_width, source_width, dtype)
    upper, lower, y = _neighbours(row, box_height, source_height, dtype)
    channel = torch.arange(channels, device=device)[:, None] * (frames * height * width)
    upper, lower = channel + (source_start + upper * width), channel + (source_start + lower * width)
    above = torch.lerp(clean.take(upper + left).to(dtype), clean.take(upper + right).to(dtype), x)
    below = torch.lerp(clean.take(lower + left).to(dtype), clean.take(lower + right).to(dtype), x)

    across, down = ((column + 0.5) / box_width - 0.5).abs(), ((row + 0.5) / box_height - 0.5).abs()
    round_, pointed = shape == SHAPES.index("ellipse"), shape == SHAPES.index("rhombus")
    distance = torch.where(round_, across.hypot(down), torch.where(pointed, across + down, across.maximum(down)))
    alpha = (opacity * ((_HARD_EDGE - distance) * steep).clamp(0, 1)).to(dtype)
    target = channel + (start + row * width + column)
    beneath = pasted.take(target).to(dtype)
    pasted.view(-1)[target] = torch.lerp(beneath, torch.lerp(above, below, y), alpha).to(pasted.dtype)


def _neighbours(place: Tensor, size: Tensor, source_size: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The two source pixels around a pixel of the resized box, along one axis, and the weight of the second."""
    # Multiplied before divided: where both sizes are the same, the weight is exactly 0.
    at = ((place.to(dtype) + 0.5) * source_size / size - 0.5).clamp(min=0)
    before = at.long()
    last = source_size - 1
    return before, torch.minimum(before + 1, last), at - before


def _at_pixels(counts: Tensor, columns: Sequence[NDArray[Any]], total: int) -> list[Tensor]:
    """Each column, ``(clips, frames)``, repeated for the pixels of each box."""
    # Row by row, on CPUs in a third of the time of looking up a box for each pixel.
    table = np.stack(np.broadcast_arrays(*columns)).reshape(len(columns), -1)
    if table.dtype == np.float64:
        table = table.astype(np.float32)
    return [row.repeat_interleave(counts, output_size=total) for row in torch.from_numpy(table).to(counts.device)]
