"""Figures of an ablation: differences with intervals on a common scale, and curves with the range of the seeds.

Differences are drawn in rows of their own, lengths in percent of whatever width there is, so that names stand beside
them as HTML: they wrap, and none of them enters an SVG.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cmacc.viewer.ablation_words import digits_for, signed
from cmacc.viewer.drawing import INK, SETTINGS, as_svg, label_steps, new_sheet, short_number
from cmacc.viewer.page import escape

_HUES = 8
_DASHES = ("solid", (0, (5, 1.6)), (0, (1.6, 1.2)))


@dataclass(frozen=True)
class Pen:
    """How a variant is drawn everywhere: a colour's name, and how many times the colours have been gone through."""

    colour: str
    round: int = 0


def pens(variants: Sequence[str], reference: str) -> dict[str, Pen]:
    """The reference in the colour of the text, the others in eight colours; dashed from the ninth on."""
    others = [name for name in variants if name != reference]
    return {reference: Pen("ink")} | {n: Pen(f"c{i % _HUES + 1}", i // _HUES) for i, n in enumerate(others)}


def legend(entries: Sequence[tuple[Pen, str]]) -> str:
    """Which line is whose, as HTML; names are plain text."""
    return (
        '<div class="legend">'
        + "".join(
            f'<span><i class="line{f" dash{pen.round % len(_DASHES)}" if pen.round % len(_DASHES) else ""}" '
            f'style="background:var(--{pen.colour})"></i>{escape(name)}</span>'
            for pen, name in entries
        )
        + "</div>"
    )


@dataclass(frozen=True)
class Curve:
    """Mean over seeds with its range, all ``(points,)``; ``dotted`` for a level that it is compared with."""

    places: NDArray[np.float64]
    means: NDArray[np.float64]
    lows: NDArray[np.float64]
    highs: NDArray[np.float64]
    pen: Pen
    dotted: bool = False


def curve_panel(
    curves: Sequence[Curve],
    *,
    label: str = "step",
    levels: Sequence[float] = (),
    bottom: float | None = None,
    percent: bool = False,
) -> str:
    """Curves over steps or seconds, each with a faint band from the lowest seed to the highest, as ``<svg>``.

    Parameters
    ----------
    curves
        At least one; later ones on top.
    label
        Of the horizontal axis.
    levels
        Where dotted reference lines are drawn.
    bottom
        Limit of the vertical axis where it should not follow the data.
    percent
        Whether values are shares, to be shown in percent.
    """
    import matplotlib
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    with matplotlib.rc_context(SETTINGS):
        sheet, axes = new_sheet(3.5, 2.05)
        shade = 0.16 if len(curves) <= 4 else 0.09  # many bands upon each other would be mud
        for curve in curves:
            if len(curve.places) > 1 and bool((curve.highs > curve.lows).any()):
                outline = np.concatenate([curve.lows, curve.highs[::-1]])
                around = np.concatenate([curve.places, curve.places[::-1]])
                axes.fill(around, outline, color=INK[curve.pen.colour], alpha=shade, linewidth=0)
        for curve in curves:
            dash = (0, (1, 2)) if curve.dotted else _DASHES[curve.pen.round % len(_DASHES)]
            alone = "o" if len(curve.places) == 1 else None
            ink = INK[curve.pen.colour]
            width = 1.1 if curve.dotted else 1.5
            axes.plot(curve.places, curve.means, color=ink, linewidth=width, linestyle=dash, marker=alone, markersize=4)
        for level in levels:
            axes.axhline(level, color=INK["muted"], linewidth=1.0, linestyle=(0, (1, 2)))
        low, high = axes.get_ylim()
        slack = max(0.0, 0.05 * max(abs(low), abs(high)) - (high - low)) / 2  # else a constant is blown up into noise
        axes.set_ylim(low - slack if bottom is None else bottom, high + slack)
        label_steps(axes)
        if label != "step":
            axes.xaxis.set_major_formatter(FuncFormatter(short_number))
            axes.set_xlabel(label)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0) if percent else FuncFormatter(short_number))
        return as_svg(sheet)


@dataclass(frozen=True)
class Scale:
    """What all forest plots of a metric share, so that they can be compared: ends and ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def percent(self, value: float) -> str:
        """Place of a value on a lane."""
        return f"{100 * (value - self.low) / (self.high - self.low):.2f}%"


def scale_over(values: Sequence[float]) -> Scale:
    """A scale that holds zero and all finite values, with three to five round ticks.

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
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(nice for nice in (1.0, 2.0, 5.0, 10.0) if nice * power >= rough * 0.999)
    first, last = math.ceil(low / step), math.floor(high / step)
    return Scale(low, high, tuple(float(f"{count * step:.12g}") for count in range(first, last + 1)))


@dataclass(frozen=True)
class Mark:
    """A point with its interval (NaN where there is none); ``which`` is 0 for a dot in c1, 1 for a diamond in c2."""

    value: float
    low: float
    high: float
    which: int


def forest_lane(marks: Sequence[Mark], scale: Scale, kinds: int) -> str:
    """The row of a forest plot: ``marks`` one below the other in ``kinds`` places, as HTML of any width."""
    parts = [_upright(scale.percent(tick), "rule", 0.7) for tick in scale.ticks]
    parts.append(_upright(scale.percent(0.0), "ink", 1.2))
    for mark in marks:
        y = f"{100 * (mark.which + 1) / (kinds + 1):.0f}%" if kinds > 1 else "50%"
        colour = f"c{mark.which + 1}"
        if not math.isnan(mark.low):
            parts.append(
                f'<line x1="{scale.percent(mark.low)}" x2="{scale.percent(mark.high)}" y1="{y}" y2="{y}" '
                f'stroke="var(--{colour})" stroke-width="2.4"/>'
            )
        shape = '<circle r="4.2"' if mark.which == 0 else '<path d="M0-5.4 5.4 0 0 5.4-5.4 0z"'
        parts.append(f'<svg x="{scale.percent(mark.value)}" y="{y}" overflow="visible">{shape} ' + _solid(colour))
    return f'<div class="lane"><svg aria-hidden="true">{"".join(parts)}</svg></div>'


def forest_axis(scale: Scale, better: int) -> str:
    """Ticks below the rows, and to which side is better (1 right, -1 left, 0 neither)."""
    digits = 0 if digits_for(max(abs(scale.low), abs(scale.high))) < 3 else _digits_of(scale)
    ticks = "".join(
        f'<text x="{scale.percent(tick)}" y="13" text-anchor="middle">{signed(tick, digits)}</text>'
        for tick in scale.ticks
    )
    arrow = {
        1: '<text x="100%" y="30" text-anchor="end" class="better">better →</text>',
        -1: '<text x="0" y="30" class="better">← better</text>',
        0: "",
    }[better]
    return f'<svg class="axis">{ticks}{arrow}</svg>'


def _digits_of(scale: Scale) -> int:
    return max(len(f"{tick:.6f}".rstrip("0").partition(".")[2]) for tick in scale.ticks)


def _upright(x: str, colour: str, width: float) -> str:
    return f'<line x1="{x}" x2="{x}" y1="0" y2="100%" stroke="var(--{colour})" stroke-width="{width}"/>'


def _solid(colour: str) -> str:
    return f'fill="var(--{colour})" stroke="var(--card)" stroke-width="1"/></svg>'
