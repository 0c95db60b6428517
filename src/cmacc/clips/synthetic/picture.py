"""Draw the video of an event: a moving object on a drifting background with distractors, flicker and pixel noise.

Drawing only uses numpy, in one pass over all frames.
"""

import numpy as np
from numpy.typing import NDArray

from cmacc.clips.synthetic.event import PICTURE_NUISANCE, SHAPES, Event, Floats, WorldConfig, frame_seconds
from cmacc.clips.synthetic.motion import trace


def _signed_distance(shape: str, u: Floats, v: Floats) -> Floats:
    """Approximate signed distance in object radii, negative inside. All shapes have about the same area."""
    radius = np.hypot(u, v)
    if shape == "disc":
        return radius - 0.9
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.8
    if shape == "triangle":
        return np.maximum(v, 0.866 * np.abs(u) - 0.5 * v) - 0.7
    if shape == "star":
        point = np.abs(np.arctan2(v, u) * np.float32(5 / np.pi) % 2 - 1)
        return 0.7 * (radius - 0.5 - 0.75 * point)
    if shape == "cross":
        u, v = np.abs(u), np.abs(v)
        return np.minimum(np.maximum(u - 1.1, v - 0.38), np.maximum(v - 1.1, u - 0.38))
    if shape == "ring":
        return np.abs(radius - 0.85) - 0.27
    if shape == "crescent":
        return np.maximum(radius - 1.1, 0.8 - np.hypot(u - 0.6, v))
    return 0.6 * (np.hypot(u / 1.5, v / 0.6) - 1)


def _paint(frames: Floats, shape: str, x: Floats, y: Floats, radius: Floats, angle: Floats, colours: Floats) -> None:
    """Paint a two-coloured, outlined shape into frames (T, S, S, 3); x, y, radius, angle are (T,), colours (3, 3).

    The second colour on one half makes rotation visible even for a disc. Only a window that follows the object is
    computed; indices clipped at the border name a pixel twice, with the same colour both times.
    """
    side = frames.shape[1]
    window = np.arange(-1, int(3.2 * side * radius.max()) + 2) - int(1.6 * side * radius.max())
    number = np.arange(len(x))[:, None, None]
    rows = np.clip((y * side).astype(int)[:, None, None] + window[None, :, None], 0, side - 1)
    columns = np.clip((x * side).astype(int)[:, None, None] + window[None, None, :], 0, side - 1)
    cos, sin, pixels = (a.astype(np.float32)[:, None, None] for a in (np.cos(angle), np.sin(angle), radius * side))
    right = ((columns + 0.5 - side * x[:, None, None]) / pixels).astype(np.float32)
    down = ((rows + 0.5 - side * y[:, None, None]) / pixels).astype(np.float32)
    u, v = cos * right + sin * down, cos * down - sin * right
    distance = _signed_distance(shape, u, v) * pixels
    cover, inner = np.clip(0.5 - distance, 0, 1)[..., None], np.clip(-0.7 - distance, 0, 1)[..., None]
    half = np.clip(0.5 + (v - np.float32(0.15)) * pixels, 0, 1)[..., None]
    fill = colours[0] + half * (colours[1] - colours[0])
    below = frames[number, rows, columns]
    frames[number, rows, columns] = below + cover * (colours[2] + inner * (fill - colours[2]) - below)


def _palette(rng: np.random.Generator, backdrop: Floats, nuisance: float) -> Floats:
    """Draw fill, second fill and outline (3, 3); of six colours the one farthest from the backdrop, to stay visible."""
    candidates = rng.random((6, 3))
    drawn = candidates[np.argmax(((candidates - backdrop) ** 2).sum(1))]
    fill = (1 - nuisance) * np.array([0.9, 0.8, 0.3]) + nuisance * drawn
    second = fill * 0.4 if fill.mean() > 0.4 else 0.4 * fill + 0.6
    return np.stack([fill, second, np.full(3, float(backdrop.mean() < 0.5))]).astype(np.float32)


def draw(config: WorldConfig, event: Event) -> NDArray[np.uint8]:
    """Draw all frames, (T, S, S, 3) RGB."""
    rng = np.random.default_rng([*event.nuisance_seed, PICTURE_NUISANCE])
    nuisance, side, seconds = config.nuisance, config.frame_size, frame_seconds(config)
    track = trace(event, seconds, config.duration_seconds)
    count = len(seconds)
    jitter = nuisance * 0.012 * rng.standard_normal((2, count))
    grid = (np.arange(side) + 0.5) / side
    across, down = grid - jitter[0][:, None], grid - jitter[1][:, None]

    backdrop = (1 - nuisance) * np.array([0.15, 0.15, 0.2]) + nuisance * rng.uniform(0.15, 0.85, 3)
    # Gradients and gratings with separate drifts. Expanding sin(a + b) into sines and cosines of the two axes turns the
    # whole backdrop into one product of (T, S, waves) and (T, waves, 3 S).
    waves = 2 * np.pi * rng.uniform(-4, 4, (3, 2))
    phases = rng.uniform(0, 6, (3, 1)) + rng.normal(0, 5, (3, 1)) * seconds
    a = waves[:, :1, None] * across + phases[..., None]
    b = waves[:, 1:, None] * down
    tints = nuisance * rng.normal(0, 0.09, (3, 1, 1, 3))
    left = np.concatenate([np.cos(b), np.sin(b), np.ones_like(b[:1])]).transpose(1, 2, 0)
    right = np.concatenate([np.sin(a)[..., None] * tints, np.cos(a)[..., None] * tints,
                            np.broadcast_to(backdrop, (1, count, side, 3))]).transpose(1, 0, 2, 3)  # fmt: skip
    frames = left.astype(np.float32) @ right.astype(np.float32).reshape(count, 7, 3 * side)
    frames = frames.reshape(count, side, side, 3)
    for _ in range(rng.integers(1, 5) if nuisance else 0):
        (x, y), radius = rng.random(2), rng.uniform(0.05, 0.14)
        blend = backdrop + nuisance * (_palette(rng, backdrop, 1.0) - backdrop)
        _paint(frames, SHAPES[rng.integers(len(SHAPES))], x + jitter[0], y + jitter[1], np.full(count, radius),
               np.full(count, rng.uniform(0, 2 * np.pi)), blend.astype(np.float32))  # fmt: skip
    _paint(frames, event.shape, track.x + jitter[0], track.y + jitter[1], event.size * track.scale, track.angle,
           _palette(rng, backdrop, nuisance))  # fmt: skip
    flicker = 1 + nuisance * (rng.uniform(0, 0.12) * np.sin(rng.uniform(3, 40) * seconds + rng.uniform(0, 6))
                              + 0.04 * rng.standard_normal(count))  # fmt: skip
    # Read pixel noise from random positions of one short strip: drawing it per pixel would cost more than the rest.
    strip = rng.standard_normal(4 * frames[0].size, np.float32) * np.float32(255 * nuisance * rng.uniform(0.01, 0.06))
    starts = rng.integers(3 * frames[0].size, size=count)
    pictures = np.empty(frames.shape, np.uint8)
    for picture, frame, light, start in zip(pictures, frames, flicker, starts, strict=True):
        frame *= np.float32(255 * light)
        frame += strip[start : start + frame.size].reshape(frame.shape)
        np.clip(frame + np.float32(0.5), 0, 255, out=frame)
        picture[:] = frame
    return pictures
