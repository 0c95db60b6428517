"""Motion: position, scale, angle, loudness and onsets as functions of time, one small function per motion.

Video and audio are computed from the same function, which keeps them in sync.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cmacc.clips.synthetic.event import Event, Floats


class Track(NamedTuple):
    """A motion at given times: the first five fields have the shape of the times; onsets (n,) are of the whole clip."""

    x: Floats
    y: Floats
    scale: Floats
    angle: Floats
    loudness: Floats
    onset_seconds: Floats
    onset_strengths: Floats


def trace(event: Event, seconds: Floats, duration_seconds: float) -> Track:
    """Follow the event's motion.

    Parameters
    ----------
    event : Event
    seconds : (T,) float
        Times at which to evaluate the motion.
    duration_seconds : float
        Onsets are returned in [0, duration_seconds).

    Returns
    -------
    Track
        Positions relative to the frame size (y downwards), angles in radians, loudness of a continuous sound in 0..1.
    """
    rng = np.random.default_rng(event.motion_seed)
    draws = rng.random(4)
    still_x, still_y = (1.5 * event.size + (1 - 3 * event.size) * draws[:2]).tolist()
    at_rest = Track(
        x=np.full_like(seconds, still_x),
        y=np.full_like(seconds, still_y),
        scale=np.ones_like(seconds),
        angle=np.full_like(seconds, event.base_angle_radians),
        loudness=0 * seconds,
        onset_seconds=np.zeros(0),
        onset_strengths=np.zeros(0),
    )
    track = _MOTIONS[event.motion](_Stage(event, seconds, duration_seconds, 1.1 * event.size, draws, rng, at_rest))
    heard = (track.onset_seconds >= 0) & (track.onset_seconds < duration_seconds)
    return track._replace(onset_seconds=track.onset_seconds[heard], onset_strengths=track.onset_strengths[heard])


class _Stage(NamedTuple):
    """Inputs of a motion. ``draws`` (4,) are uniform. Motions may return onsets outside the clip; `trace` cuts them."""

    event: Event
    seconds: Floats
    duration_seconds: float
    margin: float  # minimum distance of the object's centre to the border of the frame
    draws: Floats
    rng: np.random.Generator
    at_rest: Track


def _bounce(stage: _Stage) -> Track:
    """Bounces get shorter, then the object is thrown again: an accelerating rhythm."""
    event, seconds, duration_seconds, margin, draws, _, at_rest = stage
    period = event.period_seconds
    flights = np.tile(period * 0.72 ** np.arange(4), math.ceil(duration_seconds / period) + 1)
    onsets = np.cumsum(flights) - event.phase * flights[:4].sum()
    flight = np.minimum(np.searchsorted(onsets, seconds, "right"), len(flights) - 1)
    progress = 1 - (onsets[flight] - seconds) / flights[flight]
    height = (1 - 2 * margin) * (0.6 + 0.4 * draws[2]) * (flights[flight] / period) ** 2
    return at_rest._replace(
        x=margin + (1 - 2 * margin) * (draws[0] + (draws[3] - draws[0]) * seconds / duration_seconds),
        y=1 - margin - height * 4 * progress * (1 - progress),
        onset_seconds=onsets,
        onset_strengths=flights / period,
    )


def _swing(stage: _Stage) -> Track:
    """A pendulum that sounds at both extremes."""
    event, seconds, duration_seconds, margin, draws, _, at_rest = stage
    swing_period = 1.5 * event.period_seconds
    reach = 0.6 + 0.3 * draws[2]
    length = (0.5 - margin) / math.sin(reach)
    deviation = reach * np.cos(2 * np.pi * (seconds / swing_period + event.phase))
    onsets = (np.arange(1, 2 * duration_seconds / swing_period + 3) / 2 - event.phase) * swing_period
    return at_rest._replace(
        x=0.5 + length * np.sin(deviation),
        y=0.35 + 0.4 * draws[3] + length * (np.cos(deviation) - 1) / 2,
        angle=at_rest.angle - deviation,
        onset_seconds=onsets,
        onset_strengths=np.ones_like(onsets),
    )


def _pulse(stage: _Stage) -> Track:
    """Pairs of beats, like a heart."""
    event, seconds, duration_seconds, _, draws, _, at_rest = stage
    gap = 0.2 + 0.06 * draws[2]
    beats = (np.arange(duration_seconds / event.period_seconds + 2) - event.phase) * event.period_seconds
    onsets, strengths = (beats[:, None] + [0, gap]).ravel(), np.tile([1.0, 0.6], len(beats))
    bumps = np.exp(-0.5 * ((seconds[:, None] - onsets) / 0.05) ** 2)
    scale = 0.8 + 0.6 * (bumps * strengths).max(1)
    return at_rest._replace(scale=scale, onset_seconds=onsets, onset_strengths=strengths)


def _roll(stage: _Stage) -> Track:
    """Rolls back and forth without slipping; faster is louder."""
    event, seconds, _, margin, draws, _, at_rest = stage
    reach, turn = 0.5 - margin, 2 * np.pi * (seconds / (2.2 * event.period_seconds) + event.phase)
    return at_rest._replace(
        x=0.5 + reach * np.sin(turn),
        y=np.full_like(seconds, 0.35 + 0.6 * draws[2] - margin / 2),
        angle=at_rest.angle + reach * np.sin(turn) / event.size,
        loudness=np.abs(np.cos(turn)) ** 1.5,
    )


def _collide(stage: _Stage) -> Track:
    """Collisions with four walls, in two incommensurate rhythms."""
    event, seconds, duration_seconds, margin, draws, _, at_rest = stage
    periods = event.period_seconds, event.period_seconds * (1.25 + 0.6 * draws[2])
    rhythms = tuple(zip(periods, (2 * event.phase, 2 * draws[3]), strict=True))
    x, y = (margin + (1 - 2 * margin) * (1 - np.abs((seconds / p + f) % 2 - 1)) for p, f in rhythms)
    onsets = np.sort(np.concatenate([(np.arange(1, duration_seconds / p + 3) - f) * p for p, f in rhythms]))
    return at_rest._replace(x=x, y=y, onset_seconds=onsets, onset_strengths=np.ones_like(onsets))


def _spin(stage: _Stage) -> Track:
    """One swell per turn."""
    event, seconds, at_rest = stage.event, stage.seconds, stage.at_rest
    turn = 2 * np.pi * (seconds / event.period_seconds + event.phase)
    return at_rest._replace(angle=at_rest.angle + turn, loudness=(0.5 + 0.5 * np.cos(turn)) ** 2)


def _orbit(stage: _Stage) -> Track:
    """A carousel seen from the side: close is large and loud."""
    event, seconds, at_rest = stage.event, stage.seconds, stage.at_rest
    turn = 2 * np.pi * (seconds / (1.4 * event.period_seconds) + event.phase)
    scale = 1 + 0.35 * np.sin(turn)
    return at_rest._replace(
        x=0.5 + (0.45 - stage.margin) * np.cos(turn),
        y=at_rest.y * 0.6 + 0.2 + 0.08 * np.sin(turn),
        scale=scale,
        loudness=(scale / 1.35) ** 3,
    )


def _dart(stage: _Stage) -> Track:
    """Rests, then jumps, and sounds when it lands."""
    event, seconds, duration_seconds, margin, draws, rng, at_rest = stage
    period = event.period_seconds
    leaps = math.ceil(duration_seconds / (0.45 * period)) + 2
    onsets = np.cumsum(period * rng.uniform(0.45, 1.0, leaps)) - event.phase * 0.4 * period
    stops_x = margin + (1 - 2 * margin) * ((draws[0] + np.cumsum(rng.uniform(0.3, 0.7, leaps + 1))) % 1)
    stops_y = margin + (1 - 2 * margin) * rng.random(leaps + 1)
    stop = np.minimum(np.searchsorted(onsets, seconds, "right"), leaps - 1)
    ease = np.clip(1 - (onsets[stop] - seconds) / 0.15, 0, 1) ** 2
    x, y = (s[stop] + (s[stop + 1] - s[stop]) * ease for s in (stops_x, stops_y))
    return at_rest._replace(x=x, y=y, onset_seconds=onsets, onset_strengths=np.ones_like(onsets))


_MOTIONS: dict[str, Callable[[_Stage], Track]] = {
    "bounce": _bounce,
    "swing": _swing,
    "pulse": _pulse,
    "roll": _roll,
    "collide": _collide,
    "spin": _spin,
    "orbit": _orbit,
    "dart": _dart,
}
