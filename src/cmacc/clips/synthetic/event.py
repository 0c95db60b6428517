"""The settings of a synthetic world, the parts of its classes, and the event of one clip."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]  # float32 while drawing, float64 elsewhere

SHAPES = ("disc", "square", "triangle", "star", "cross", "ring", "crescent", "lens")
MOTIONS = ("bounce", "swing", "pulse", "roll", "collide", "spin", "orbit", "dart")
TIMBRES = ("marimba", "buzz", "noise", "bell", "pluck", "whistle", "voice", "glass")
SIZE_RANGE = (0.12, 0.24)  # radius as a share of the frame's side
PITCH_RANGE_HZ = (160.0, 1200.0)  # of the largest and of the smallest object
AAC_SAMPLE_RATES_HZ = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
# One random stream per purpose, so that additional draws in one do not change the others.
DUPLICATE, CLASS, EVENT, MOTION, TIMBRE, PICTURE_NUISANCE, SOUND_NUISANCE = range(7)


@dataclass(frozen=True)
class WorldConfig:
    """Settings of a world. Equal settings give equal files.

    Parameters
    ----------
    clip_count : int
        Number of clips. Single clips do not depend on it.
    class_count : int
        Number of classes, 2..64.
    zipf_exponent : float
        Class frequency is proportional to (class_index + 1) ** -zipf_exponent; 0 is uniform.
    duplicate_share : float
        Probability that a clip (except the first) repeats the event of an earlier clip, with new nuisances.
    nuisance : float
        Strength of the nuisances, 0 (clean) to 1 (strong).
    duration_seconds : float
        Length of a clip, 1..60.
    frame_rate_hz, frame_size, sample_rate_hz : int
        Frames per second, frame width and height in pixels (even), audio samples per second.
    seed : int
        Seed; each seed gives another world.

    Raises
    ------
    ValueError
        A value is out of range.
    """

    clip_count: int = 400
    class_count: int = 16
    zipf_exponent: float = 0.0
    duplicate_share: float = 0.0
    nuisance: float = 1.0
    duration_seconds: float = 3.0
    frame_rate_hz: int = 16
    frame_size: int = 96
    sample_rate_hz: int = 16000
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate all fields."""
        whole = {"clip_count": (1, 10**6), "class_count": (2, 64), "frame_rate_hz": (8, 60), "frame_size": (32, 512),
                 "seed": (0, 2**63)}  # fmt: skip
        real = {"zipf_exponent": (0, 5), "duplicate_share": (0, 1), "nuisance": (0, 1), "duration_seconds": (1, 60)}
        for name, (low, high) in (whole | real).items():
            value = getattr(self, name)
            if not low <= value <= high or (name in whole and value != int(value)):
                raise ValueError(f"WorldConfig: {name} must be in {low}..{high}, got {value}")
        if self.frame_size % 2:  # 4:2:0 chroma halves both sides
            raise ValueError(f"WorldConfig: frame_size must be even, got {self.frame_size}")
        if self.sample_rate_hz not in AAC_SAMPLE_RATES_HZ:
            raise ValueError(f"WorldConfig: sample_rate_hz must be in {AAC_SAMPLE_RATES_HZ}, got {self.sample_rate_hz}")


@dataclass(frozen=True)
class Event:
    """All causes of one clip. Near-duplicates only differ in ``index``, ``duplicate_of`` and ``nuisance_seed``.

    Positions are relative to the frame width, from the left. ``onset_seconds`` is empty for motions with a continuous
    sound (roll, spin, orbit).
    """

    index: int
    duplicate_of: int | None
    class_index: int
    label: str
    shape: str
    motion: str
    timbre: str
    size: float
    pitch_hz: float
    period_seconds: float
    phase: float
    base_angle_radians: float
    motion_seed: tuple[int, int, int]
    timbre_seed: tuple[int, int, int]
    nuisance_seed: tuple[int, int]
    onset_seconds: tuple[float, ...] = ()
    onset_strengths: tuple[float, ...] = ()
    horizontal_path: tuple[float, ...] = ()  # one place per frame


def class_parts(class_index: int, class_count: int) -> tuple[str, str, str]:
    """Return the shape, motion and timbre of a class.

    A shape is an instrument with a timbre; a motion is the way it is played. Every motion is used before any is used
    twice, and classes share shapes. With 8 classes, a shape leaves four candidates, and with more classes a motion also
    leaves several. So the appearance or sound at a single moment does not determine the class.
    """
    shapes = max(2, math.ceil(class_count / len(MOTIONS)))
    motion, again = class_index % len(MOTIONS), class_index // len(MOTIONS)
    shape = (motion + again) % shapes
    return SHAPES[shape], MOTIONS[motion], TIMBRES[shape]


def frame_seconds(config: WorldConfig) -> Floats:
    """Time of every frame of a clip, (T,)."""
    return np.arange(round(config.duration_seconds * config.frame_rate_hz)) / config.frame_rate_hz
