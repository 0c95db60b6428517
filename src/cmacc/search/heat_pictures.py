"""Draw a `Localisation`: a PNG of its best moments, and an .mp4 of the whole part with the original sound."""

from collections.abc import Iterator
from pathlib import Path

import av
import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray
from torch.nn import functional

from cmacc.clips import FILM_SOUND_RATE_HZ, Clip, ClipSpec, FilmWriter, decode_clips, probe
from cmacc.clips.progress import Progress, silent
from cmacc.clips.storage import written_aside
from cmacc.search.localise import Localisation, LocalisedMoment

_FRAMES_PER_MOMENT = 4
_STRIP_SIDE = 240  # short side of the pictures, in pixels
_FILM_SIDE = 480
_CHUNK_SECONDS = 2  # of film in memory; whole seconds, so that chunks of sound join without a seam
_FILM_RATES_HZ = (5, 60)
_COLOURS = "inferno"
_MOST_COVER = 0.7  # of the picture where it is hottest
_LEAST_FULL = 1e-4  # cosine; less is rounding
_FAINT = 0.2  # level below which nothing is drawn
_GREY_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)
_UNSEEN = 0.45  # brightness of what the encoder does not see


def write_strip(found: Localisation, path: Path, *, top: int = 3, overwrite: bool = False) -> None:
    """Write a PNG: a row of four frames with their heat for each of the best moments, and the agreement over time.

    Parameters
    ----------
    found
        What to draw.
    path
        File to write.
    top
        Number of moments.
    overwrite
        Whether to replace an existing file.

    Raises
    ------
    FileExistsError
        The file exists, and ``overwrite`` is not set; or it is the video itself.
    MediaError
        The video cannot be read any more.
    ValueError
        ``top`` is below 1.
    """
    _require_free(found, path, overwrite)
    moments = found.moments(top)
    paint = _Painter(found)
    height, width = _drawn_size(found, _STRIP_SIDE)
    wide = 2.1 * max(1.0, width / height)
    tall = wide * height / width
    with matplotlib.rc_context({"font.size": 9}):
        sheet = Figure(
            figsize=(_FRAMES_PER_MOMENT * wide + 0.4, len(moments) * (tall + 0.5) + 1.6), layout="constrained"
        )
        grid = sheet.add_gridspec(len(moments) + 1, 1, height_ratios=[*[tall + 0.5] * len(moments), 1.6])
        for place, moment in enumerate(moments):
            row = sheet.add_subfigure(grid[place, 0])
            _draw_moment(row, found, moment, place + 1, paint, (height, width))
        _draw_curve(sheet.add_subfigure(grid[-1, 0]).add_subplot(), found, moments)
        with written_aside(path) as aside:
            sheet.savefig(aside, format="png", dpi=120)


def write_video(found: Localisation, path: Path, *, overwrite: bool = False, progress: Progress = silent) -> None:
    """Write an .mp4 of the part: the picture with its heat, and the sound (mono, 48 kHz).

    The picture has at most 480 pixels on its short side, and the frame rate of the file, rounded to whole frames per
    second. What the encoder does not see, because its clips are cropped, is dark.

    Parameters
    ----------
    found
        What to draw.
    path
        File to write.
    overwrite
        Whether to replace an existing file.
    progress
        Called with ("video", seconds done, total seconds).

    Raises
    ------
    FileExistsError
        The file exists, and ``overwrite`` is not set; or it is the video itself.
    MediaError
        The video cannot be read any more.
    """
    _require_free(found, path, overwrite)
    paint = _Painter(found)
    height, width = _drawn_size(found, _FILM_SIDE)
    slowest, fastest = _FILM_RATES_HZ
    rate = min(max(slowest, round(probe(found.path).fps or 25)), fastest)
    with written_aside(path) as aside, FilmWriter(aside, frame_rate_hz=rate, crf=20) as film:
        for clip in _chunks(found, rate, height, width, progress):
            film.add(_painted(clip, paint, rate), clip.waveform.numpy())


def _painted(clip: Clip, paint: "_Painter", rate: int) -> Iterator[av.VideoFrame]:
    for number, pixels in enumerate(clip.frames.numpy()):
        painted = paint(pixels, clip.start_seconds + (number + 0.5) / rate)
        yield av.VideoFrame.from_ndarray(np.ascontiguousarray(painted), format="rgb24")


def _chunks(found: Localisation, rate: int, height: int, width: int, progress: Progress) -> Iterator[Clip]:
    """The part in clips of whole seconds at the size of the film; the last one is shorter."""
    frames = max(1, round((found.end_seconds - found.begin_seconds) * rate))
    for first in range(0, frames, _CHUNK_SECONDS * rate):
        progress("video", first // rate, frames // rate)
        count = min(_CHUNK_SECONDS * rate, frames - first)
        spec = ClipSpec(
            frame_count=count,
            frame_rate_hz=float(rate),
            frame_height=height,
            frame_width=width,
            audio_seconds=count / rate,
            sample_rate_hz=FILM_SOUND_RATE_HZ,
        )
        yield decode_clips(found.path, [found.begin_seconds + first / rate], spec)[0]
    progress("video", frames // rate, frames // rate)


class _Painter:
    """Draws heat over grey pictures. The colours mean the same in all of a file.

    Full heat is the upper quartile of the highest heat of windows that have any: in a long file, one odd window would
    outshine all others.
    """

    def __init__(self, found: Localisation) -> None:
        self._found = found
        highest = found.heat.max(axis=(1, 2, 3))
        self._full = max(_LEAST_FULL, float(np.quantile(highest[highest > 0], 0.75)) if (highest > 0).any() else 0.0)
        self._colours = matplotlib.colormaps[_COLOURS]

    def __call__(self, pixels: NDArray[np.uint8], seconds: float) -> NDArray[np.uint8]:
        """The picture ``(height, width, 3)`` of a time, with its heat."""
        height, width, _ = pixels.shape
        grey = pixels.astype(np.float32) @ _GREY_WEIGHTS
        top, left, tall, wide = self._found.view
        rows = slice(round(top * height), round((top + tall) * height))
        columns = slice(round(left * width), round((left + wide) * width))
        seen = grey[rows, columns][..., None]
        heat = torch.from_numpy(self._found.heat_at(seconds) / self._full)
        smooth = functional.interpolate(heat[None, None], seen.shape[:2], mode="bilinear", align_corners=False)[0, 0]
        # The root, because heat at one time may be a tenth of that at the next and still be right.
        level = smooth.clamp(0, 1).sqrt().numpy()
        cover = (_MOST_COVER * np.clip((level - _FAINT) / (1 - _FAINT), 0, 1))[..., None]
        # The dark end of the colours would look like shade.
        colours = 255 * np.asarray(self._colours(0.4 + 0.5 * level), np.float32)[..., :3]
        painted = np.repeat(_UNSEEN * grey[..., None], 3, axis=2)
        painted[rows, columns] = seen + cover * (colours - seen)
        return np.asarray(painted.round(), np.uint8)


def _draw_moment(
    row: SubFigure, found: Localisation, moment: LocalisedMoment, number: int, paint: _Painter, size: tuple[int, int]
) -> None:
    count = _FRAMES_PER_MOMENT
    row.suptitle(
        f"{number}.   {moment.start_seconds:.1f} to {moment.end_seconds:.1f} s, agreement {moment.agreement:.2f}",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    length = moment.end_seconds - moment.start_seconds
    spec = ClipSpec(
        frame_count=count,
        frame_rate_hz=count / length,
        frame_height=size[0],
        frame_width=size[1],
        audio_seconds=length,
    )
    [clip] = decode_clips(found.path, [moment.start_seconds], spec)
    for axes, pixels, seconds in zip(
        row.subplots(1, count), clip.frames.numpy(), spec.frame_times(moment.start_seconds), strict=True
    ):
        axes.imshow(paint(pixels, seconds), interpolation="lanczos")
        axes.set_xlabel(f"{seconds:.2f} s", labelpad=2)
        axes.set_xticks([])
        axes.set_yticks([])


def _draw_curve(axes: Axes, found: Localisation, moments: list[LocalisedMoment]) -> None:
    middles = found.start_seconds + found.spec.length_seconds / 2
    for number, moment in enumerate(moments, start=1):
        axes.axvspan(moment.start_seconds, moment.end_seconds, color="#f28e2b", alpha=0.25, linewidth=0)
        middle = (moment.start_seconds + moment.end_seconds) / 2
        axes.annotate(str(number), (middle, 0.97), xycoords=("data", "axes fraction"), ha="center", va="top")
    axes.plot(middles, found.agreement, color="#30506e", marker="o" if len(middles) < 30 else "", markersize=3)
    axes.set_xlim(found.begin_seconds, found.end_seconds)
    axes.set_ylim(min(0.0, 1.1 * float(found.agreement.min())), 1.0)
    axes.set_xlabel("seconds")
    axes.set_ylabel("agreement")
    axes.spines[["top", "right"]].set_visible(False)
    # A file's name may contain dollars, which begin a formula otherwise.
    axes.set_title(found.path.name, loc="left", fontsize=9, color="#606060", parse_math=False)


def _drawn_size(found: Localisation, short_side: int) -> tuple[int, int]:
    """Height and width of the drawn picture: at most ``short_side``, and for small pictures at least half of it."""
    shortest = min(found.picture_height, found.picture_width)
    scale = min(short_side, max(shortest, short_side // 2)) / shortest
    height, width = (max(2, 2 * round(scale * side / 2)) for side in (found.picture_height, found.picture_width))
    return height, width


def _require_free(found: Localisation, path: Path, overwrite: bool) -> None:
    if path.exists() and path.samefile(found.path):
        raise FileExistsError(f"{path} is the video itself; choose another --out")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another --out, or give --overwrite to replace it")
