"""Figures: curves and maps as small SVG with the colours of the page, frames and spectrograms as JPEG.

SVG text stays text, which is sharp on every screen, and small. No string from a file enters an SVG, so that neither
HTML nor matplotlib's own markup (``$...$``) can be injected. Names are in the HTML legend.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.collections import LineCollection
from matplotlib.image import imsave
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray

from cmacc.viewer.drawing import INK, as_svg, number_axis, sheet_of, short_number
from cmacc.viewer.run_folder import Series

_MAX_POINTS = 600  # more than a panel has pixels to show
_PANEL = (3.5, 2.05)
_MAP = (7.2, 4.4)

DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.6)), (0, (1.6, 1.2)))
DOTTED = (0, (1, 2))


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes
    ----------
    series
        Its points.
    colour
        Name of its colour.
    smooth
        Whether to draw the running mean, with the points as a faint line below it.
    band
        Lower and upper ends of a faint band, ``(n,)`` each.
    dash
        Line style of matplotlib.
    """

    series: Series
    colour: str
    smooth: bool = False
    band: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
    dash: Any = "solid"


def line_panel(
    lines: Sequence[Line],
    *,
    label: str = "step",
    levels: Sequence[float] = (),
    bottom: float | None = None,
    top: float | None = None,
    percent: bool = False,
) -> Markup:
    """Curves over steps or seconds, as an ``<svg>`` element.

    Parameters
    ----------
    lines
        At least one; later lines are drawn on top.
    label
        Label of the horizontal axis.
    levels
        Values of dotted reference lines.
    bottom, top
        Limits of the vertical axis. Default: those of the data.
    percent
        Whether values are shares, shown in percent.
    """
    with sheet_of(*_PANEL) as (sheet, axes):
        shade = 0.16 if len(lines) <= 4 else 0.09  # many overlapping bands need a lighter shade
        for line in lines:  # all of these first, below every curve
            if line.smooth:
                raw = thinned(line.series)
                axes.plot(raw.steps, raw.values, color=INK[line.colour], alpha=0.28, linewidth=0.6)
            if line.band is not None:
                axes.fill_between(line.series.steps, *line.band, color=INK[line.colour], alpha=shade, linewidth=0)
        for line in lines:
            shown = thinned(smoothed(line.series) if line.smooth else line.series)
            style = {"color": INK[line.colour], "linestyle": line.dash, "linewidth": 1.5}
            axes.plot(shown.steps, shown.values, marker="o" if len(shown.steps) == 1 else None, markersize=4, **style)
        for level in levels:
            axes.axhline(level, color=INK["muted"], linewidth=1.0, linestyle=DOTTED)
        low, high = axes.get_ylim()
        # Margin around a constant curve, whose noise matplotlib would otherwise magnify.
        slack = max(0.0, 0.05 * max(abs(low), abs(high)) - (high - low)) / 2
        axes.set_ylim(low - slack if bottom is None else bottom, high + slack if top is None else top)
        number_axis(axes, label, whole=label == "step")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0) if percent else FuncFormatter(short_number))
        return as_svg(sheet)


def stack_panel(steps: NDArray[np.float64], parts: Mapping[str, NDArray[np.float64]], colours: Sequence[str]) -> Markup:
    """Stacked seconds of all phases, averaged over intervals of steps, as an ``<svg>`` element."""
    stretches = np.array_split(np.arange(len(steps)), min(80, len(steps)))
    places = np.asarray([steps[rows].mean() for rows in stretches])
    heights = np.asarray([[part[rows].mean() for rows in stretches] for part in parts.values()])
    if len(places) == 1:  # an area needs two edges
        places, heights = np.asarray([steps[0] - 0.5, steps[0] + 0.5]), heights.repeat(2, axis=1)
    with sheet_of(*_PANEL) as (sheet, axes):
        axes.stackplot(places, heights, colors=[INK[colour] for colour in colours], linewidth=0, alpha=0.85)
        # The first steps wait for workers and compilers, and would flatten everything after them.
        axes.set_ylim(0, 1.15 * max(1e-9, float(np.quantile(heights.sum(0), 0.95))))
        axes.set_xlim(places[0], places[-1])
        number_axis(axes, "step", whole=True)
        return as_svg(sheet)


def histogram_panel(values: Sequence[float], label: str, *, logarithmic: bool = False) -> Markup:
    """A histogram as an ``<svg>`` element, with ``logarithmic`` bins for values that span decades."""
    numbers = np.asarray(values, np.float64)
    low, high = float(numbers.min()), float(numbers.max())
    logarithmic = logarithmic and low > 0 and high > 3 * low
    if logarithmic:
        edges = np.geomspace(low, high * (1 + 1e-9), 31)
    else:
        slack = 0.5 if high == low else 0.0  # a single value: a bar of width 1 around it
        edges = np.linspace(low - slack, high + slack, 31 if high > low else 2)
    with sheet_of(*_PANEL) as (sheet, axes):
        axes.hist(numbers, bins=list(edges), color=INK["c1"], alpha=0.85)
        number_axis(axes, label)
        if logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(short_number))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_ylabel("files")
        return as_svg(sheet)


def overlaid_histogram(groups: Sequence[tuple[Sequence[float], str]], label: str) -> Markup:
    """Groups of different sizes in one histogram, as shares of each group, as an ``<svg>`` element.

    Parameters
    ----------
    groups
        (values, colour name) of each, none empty; the first is drawn as an area, the others as lines.
    label
        Label of the horizontal axis.
    """
    numbers = [np.asarray(values, np.float64) for values, _ in groups]
    everything = np.concatenate(numbers)
    low, high = float(everything.min()), float(everything.max())
    # Few keys in many bins would leave gaps.
    bins = int(np.clip(2 * math.sqrt(min(len(values) for values in numbers)), 6, 24))
    whole = bool((everything == everything.round()).all())
    if whole:  # every bin covers the same number of integers; otherwise there would be a comb of empty bins
        width = max(1, math.ceil((high - low + 1) / bins))
        edges = np.arange(low - 0.5, high + 0.5 + width, width)
    else:
        edges = np.linspace(low, high, bins + 1)
    with sheet_of(*_PANEL) as (sheet, axes):
        for place, (values, (_, colour)) in enumerate(zip(numbers, groups, strict=True)):
            style: dict[str, Any] = {"color": INK[colour], "weights": np.full(len(values), 1 / len(values))}
            style |= {"alpha": 0.35} if place == 0 else {"histtype": "step", "linewidth": 1.5}
            axes.hist(values, bins=list(edges), **style)
        number_axis(axes, label, whole=whole)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylabel("share of its keys")
        return as_svg(sheet)


@dataclass(frozen=True)
class Points:
    """Points of one kind: positions ``(n, 2)``, colour name, matplotlib marker, and size in square points."""

    places: NDArray[np.float64]
    colour: str
    marker: str = "o"
    size: float = 14.0


def points_panel(layers: Sequence[Points], joined: NDArray[np.float64] | None = None) -> Markup:
    """Points of several kinds in the plane, later kinds on top, as an ``<svg>`` element.

    Parameters
    ----------
    layers
        One layer per kind. One style for all points of a layer keeps the SVG small.
    joined
        ``(n, 2, 2)``: pairs of positions to join by thin lines.
    """
    with sheet_of(*_MAP) as (sheet, axes):
        if joined is not None:
            axes.add_collection(LineCollection(list(joined), colors=INK["muted"], linewidths=0.5, alpha=0.45))
        for layer in layers:
            style: dict[str, Any] = {"s": layer.size, "marker": layer.marker, "color": INK[layer.colour]}
            axes.scatter(*layer.places.T, alpha=0.9, linewidths=0, zorder=3, **style)
        axes.autoscale_view()
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_axis_off()
        return as_svg(sheet)


def heat_map(values: NDArray[np.float64], limit: float, groups: NDArray[np.int64]) -> str:
    """A square matrix as a ``data:`` URL: orange above 0, blue below, stronger towards ``limit``.

    Parameters
    ----------
    values
        ``(n, n)``.
    limit
        The absolute value with full colour, above 0.
    groups
        ``(n,)``: group of each row; rows of a group are adjacent. A bar above and beside the matrix changes its shade
        between groups.
    """
    strength = np.clip(np.abs(values) / limit, 0, 1)
    # Transparent at 0, and of medium brightness at the limit: legible on a light and on a dark page.
    hue = np.where(values[..., None] > 0, [224, 122, 48], [58, 134, 200])
    scale = max(1, 384 // len(values))
    cells = np.kron(np.concatenate([hue, 255 * strength[..., None]], axis=2), np.ones((scale, scale, 1)))
    shade = np.cumsum(np.diff(groups, prepend=groups[:1]) != 0) % 2
    bar = np.kron(np.where(shade[:, None] == 0, [128, 128, 128, 110], [128, 128, 128, 255]), np.ones((scale, 1)))
    thick = max(3, len(cells) // 48)
    sheet = np.zeros((len(cells) + 2 * thick, len(cells) + 2 * thick, 4))
    sheet[2 * thick :, 2 * thick :] = cells
    sheet[2 * thick :, :thick] = bar[:, None]
    sheet[:thick, 2 * thick :] = bar[None]
    return _address(sheet.round().astype(np.uint8), "png")


def picture(pixels: NDArray[np.uint8]) -> str:
    """An RGB image ``(height, width, 3)`` as a ``data:`` URL."""
    return _address(pixels, "jpeg", pil_kwargs={"quality": 80})


def spectrogram_picture(log_mel: NDArray[np.float32], quietest: float, loudest: float) -> str:
    """A spectrogram ``(mels, time)`` as a ``data:`` URL, low frequencies at the bottom, from quietest to loudest."""
    return picture(spectrogram_pixels(log_mel, quietest, loudest))


def spectrogram_pixels(log_mel: NDArray[np.float32], quietest: float, loudest: float) -> NDArray[np.uint8]:
    """The same as an RGB image ``(height, width, 3)``; few bands are drawn two pixels high."""
    share = np.clip((log_mel[::-1] - quietest) / max(loudest - quietest, 1e-6), 0, 1)
    rgb = (matplotlib.colormaps["magma"](share)[..., :3] * 255).astype(np.uint8)
    return np.repeat(rgb, 2, axis=0) if len(rgb) < 100 else rgb


def smoothed(series: Series) -> Series:
    """Centred running mean over a fortieth of the curve; the window is cut at the ends.

    Examples
    --------
    >>> wave = Series(np.arange(120.0), np.resize([0.0, 3.0, 6.0], 120))
    >>> smoothed(wave).values[[0, 1, 60]].tolist()
    [1.5, 3.0, 3.0]
    """
    reach = len(series.values) // 80
    window = np.ones(2 * reach + 1)
    total = np.convolve(series.values, window, "full")[reach : reach + len(series.values)]
    count = np.convolve(np.ones(len(series.values)), window, "full")[reach : reach + len(series.values)]
    return Series(series.steps, total / count)


def thinned(series: Series) -> Series:
    """At most 600 points: the minimum and the maximum of every interval, so that no spike is lost."""
    count = len(series.values)
    if count <= _MAX_POINTS:
        return series
    rows: set[int] = {0, count - 1}
    for stretch in np.array_split(np.arange(count), _MAX_POINTS // 2 - 1):
        rows |= {int(stretch[series.values[stretch].argmin()]), int(stretch[series.values[stretch].argmax()])}
    kept = sorted(rows)
    return Series(series.steps[kept], series.values[kept])


def picture_file(pixels: NDArray[np.uint8], kind: str, **options: Any) -> bytes:
    """An image as a file of a kind of matplotlib's `imsave`, such as ``png``."""
    file = io.BytesIO()
    imsave(file, pixels, format=kind, **options)
    return file.getvalue()


def _address(pixels: NDArray[np.uint8], kind: str, **options: Any) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture_file(pixels, kind, **options)).decode()}"
