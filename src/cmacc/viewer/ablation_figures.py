"""Line styles of variants, and the common scale of the intervals of a metric.

The template draws differences itself, with lengths in percent of the available width and names as HTML. Names can then
wrap, and none of them enters an SVG.
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
    """Line style of a variant: a colour name, and the number of complete rounds through the colours."""

    colour: str
    round: int = 0

    @property
    def dash(self) -> int:
        """Index into `DASHES`."""
        return self.round % len(DASHES)


def pens(variants: Sequence[str], reference: str) -> dict[str, Pen]:
    """The reference has the text colour, the others have eight colours; from the ninth on they are dashed."""
    others = [name for name in variants if name != reference]
    return {reference: Pen("ink")} | {n: Pen(f"c{i % _HUES + 1}", i // _HUES) for i, n in enumerate(others)}


def legend_of(variants: Sequence[str], reference: str, shown: Sequence[str]) -> Legend:
    """Legend entries of the shown variants."""
    drawn = pens(variants, reference)
    return [
        (drawn[name].colour, name + (" (reference)" if name == reference else ""), f"line dash{drawn[name].dash}")
        for name in shown
    ]


@dataclass(frozen=True)
class Scale:
    """The common scale of all intervals of a metric: limits and ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def place(self, value: float) -> str:
        """Position of a value, in percent of the width."""
        return f"{100 * (value - self.low) / (self.high - self.low):.2f}%"

    @property
    def labels(self) -> list[tuple[str, str]]:
        """Position and text of every tick."""
        digits = max(len(f"{tick:.9f}".rstrip("0").partition(".")[2]) for tick in self.ticks)
        return [(self.place(tick), signed(tick, digits)) for tick in self.ticks]


def scale_over(values: Sequence[float]) -> Scale:
    """A scale that includes zero and all finite values, with a few round ticks.

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
