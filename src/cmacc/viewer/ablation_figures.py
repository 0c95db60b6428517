"""How variants are drawn everywhere, and the scale that the intervals of a metric share.

Differences are drawn by the template in rows of their own, lengths in percent of whatever width there is, so that names
stand beside them as HTML: they wrap, and none of them enters an SVG.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from cmacc.viewer.ablation_words import signed
from cmacc.viewer.figures import DASHES
from cmacc.viewer.page import Legend

_HUES = 8


@dataclass(frozen=True)
class Pen:
    """How a variant is drawn everywhere: a colour's name, and how many times the colours have been gone through."""

    colour: str
    round: int = 0

    @property
    def dash(self) -> int:
        """Place among `DASHES`."""
        return self.round % len(DASHES)


def pens(variants: Sequence[str], reference: str) -> dict[str, Pen]:
    """The reference in the colour of the text, the others in eight colours; dashed from the ninth on."""
    others = [name for name in variants if name != reference]
    return {reference: Pen("ink")} | {n: Pen(f"c{i % _HUES + 1}", i // _HUES) for i, n in enumerate(others)}


def legend_of(variants: Sequence[str], reference: str, shown: Sequence[str]) -> Legend:
    """Which line is whose."""
    drawn = pens(variants, reference)
    return [
        (drawn[name].colour, name + (" (reference)" if name == reference else ""), f"line dash{drawn[name].dash}")
        for name in shown
    ]


@dataclass(frozen=True)
class Scale:
    """What all intervals of a metric share, so that they can be compared: ends and ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def place(self, value: float) -> str:
        """Of a value on a lane, in percent."""
        return f"{100 * (value - self.low) / (self.high - self.low):.2f}%"

    @property
    def labels(self) -> list[tuple[str, str]]:
        """Place and text of every tick."""
        digits = max(len(f"{tick:.9f}".rstrip("0").partition(".")[2]) for tick in self.ticks)
        return [(self.place(tick), signed(tick, digits)) for tick in self.ticks]


def scale_over(values: Sequence[float]) -> Scale:
    """A scale that holds zero and all finite values, with a few round ticks.

    Examples
    --------
    >>> scale_over([-0.21, 0.066]).ticks
    (-0.2, -0.1, 0.0)
    """
    known = [0.0, *(value for value in values if math.isfinite(value))]
    low, high = min(known), max(known)
    if high == low:
        low, high = -0.05, 0.05
    room = 0.09 * (high - low)
    low, high = low - room, high + room
    ticks = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high)
    return Scale(low, high, tuple(float(f"{tick:.12g}") for tick in ticks if low <= tick <= high))
