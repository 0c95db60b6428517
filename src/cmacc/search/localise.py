"""Where in the picture the sound is: heat maps of agreement, drawn over the frames of a file.

For each window of the file:

1. The video's feature map before pooling, ``(C, t, h, w)``, is pooled and projected, as is the audio. The cosine of the
   two is the *agreement* of the window.
2. A block of 2 x 2 places of the map is set to zero at one time, and the map is pooled and projected again. What the
   agreement loses is due to these places (occlusion, Zeiler and Fergus 2014, in the map instead of the pixels).
3. The heat of a place at a time is the mean loss over the four blocks that contain it; those at the border lie partly
   outside. Negative heat means that the place agrees less with the sound than nothing would.

Blocks, and not single places, because an object is seen by neighbouring places, of which one would stand in for the
other. Compared with alternatives in docs/localise.md.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cmacc.clips import ClipSpec, MediaError, covering_starts, decode_clips, probe
from cmacc.clips.media.container import Medium, stream_start_seconds, streams
from cmacc.clips.media.frames import timed_frames
from cmacc.clips.progress import Progress, silent
from cmacc.pretraining.clip_encoder import ClipEncoder, EncoderError, MatchingEncoder, SpatialEncoder

_WINDOWS_AT_ONCE = 8
_BLOCK = 2  # places along each side
_MAPS_AT_ONCE_BYTES = 2**24  # of maps with a block removed


@dataclass(frozen=True)
class LocalisedMoment:
    """A window in which video and audio agree.

    Attributes
    ----------
    start_seconds, end_seconds
        The window, within the file.
    agreement
        Cosine of the embeddings of video and audio.
    x, y
        Centre of mass of the heat where it is highest in time, as shares of the picture's width and height from its
        top left corner.
    """

    start_seconds: float
    end_seconds: float
    agreement: float
    x: float
    y: float


@dataclass(frozen=True)
class Localisation:
    """Agreement of sound and picture over a file, or over a part of it.

    Attributes
    ----------
    path
        The file.
    begin_seconds, end_seconds
        The part of the file.
    spec
        Size of the windows, and of the frames in them.
    start_seconds
        ``(n,)`` float64: start of each window on the file's clock, ascending. A file shorter than a window has one,
        which begins before 0.
    agreement
        ``(n,)`` float32: cosine of the embeddings of video and audio.
    heat
        ``(n, t, h, w)`` float32: the agreement that is lost without the places around, by time and place. Times and
        places divide the window's video and the encoder's view evenly.
    picture_height, picture_width
        Size of the file's picture in pixels, as displayed.
    """

    path: Path
    begin_seconds: float
    end_seconds: float
    spec: ClipSpec
    start_seconds: NDArray[np.float64]
    agreement: NDArray[np.float32]
    heat: NDArray[np.float32]
    picture_height: int
    picture_width: int

    def heat_at(self, seconds: float) -> NDArray[np.float32]:
        """Heat at a time, ``(h, w)``: linear between the times of a window, and the mean of all windows with a picture.

        Where no window has a picture, the nearest ones continue.
        """
        length, times = self.spec.picture_seconds, self.heat.shape[1]
        into = seconds - self.spec.picture_start_seconds(0.0) - self.start_seconds
        outside = np.maximum(np.maximum(-into, into - length), 0.0)
        near = np.flatnonzero(outside <= outside.min() + 1e-9)
        # Time k of the map is the middle of its share of the window.
        places = np.clip(into[near] / length * times - 0.5, 0.0, times - 1.0)
        before = np.minimum(places.astype(np.int64), max(0, times - 2))
        share = (places - before)[:, None, None]
        after = np.minimum(before + 1, times - 1)
        found = (1 - share) * self.heat[near, before] + share * self.heat[near, after]
        return np.asarray(found.mean(0), np.float32)

    def moments(self, top: int = 3) -> list[LocalisedMoment]:
        """The windows of highest agreement that do not overlap, best first.

        Raises
        ------
        ValueError
            ``top`` is below 1.
        """
        if top < 1:
            raise ValueError(f"moments: top must be at least 1, got {top}")
        length = self.spec.length_seconds
        chosen: list[int] = []
        for place in np.argsort(-self.agreement, kind="stable").tolist():
            apart = np.abs(self.start_seconds[chosen] - self.start_seconds[place])
            if (apart >= length - 1e-6).all():
                chosen.append(place)
            if len(chosen) == top:
                break
        return [self._moment(place) for place in chosen]

    def _moment(self, window: int) -> LocalisedMoment:
        start = float(self.start_seconds[window])
        hottest = self.heat[window].clip(min=0).sum(axis=(1, 2)).argmax()
        x, y = centre_of_mass(self.heat[window, hottest])
        top, left, height, width = self.view
        return LocalisedMoment(
            max(start, self.begin_seconds),
            min(start + self.spec.length_seconds, self.end_seconds),
            float(self.agreement[window]),
            left + x * width,
            top + y * height,
        )

    @property
    def view(self) -> tuple[float, float, float, float]:
        """Top, left, height and width of the part that the encoder sees, as shares of the picture's sides.

        Clips are scaled to cover their size and cropped around the centre.
        """
        scale = max(self.spec.frame_height / self.picture_height, self.spec.frame_width / self.picture_width)
        height = self.spec.frame_height / (scale * self.picture_height)
        width = self.spec.frame_width / (scale * self.picture_width)
        return (1 - height) / 2, (1 - width) / 2, height, width


def localise(
    path: Path | str,
    encoder: ClipEncoder,
    *,
    begin_seconds: float = 0.0,
    end_seconds: float = math.inf,
    hop_seconds: float | None = None,
    progress: Progress = silent,
) -> Localisation:
    """Compare sound and picture in overlapping windows of a file, as long as the encoder's clips.

    Frames are decoded a few windows at a time. What is kept of an hour is about a megabyte for cmacc's own backbones.

    Parameters
    ----------
    path
        A file with sound and picture.
    encoder
        A `SpatialEncoder`.
    begin_seconds, end_seconds
        The part of the file to take windows from. A part shorter than a window has one around its middle.
    hop_seconds
        Time from one window to the next. Default: one second, or a window if that is shorter.
    progress
        Called with ("windows", done, total).

    Raises
    ------
    EncoderError
        The encoder lacks a modality, a common space or a feature map, or gives vectors that are not finite.
    MediaError
        The file cannot be read, or has no sound or no picture.
    ValueError
        The part is empty or outside of the file, or ``hop_seconds`` is not positive or longer than a window.
    """
    path = Path(path)
    spatial = _spatial(encoder)
    length = spatial.spec.length_seconds
    if hop_seconds is None:
        hop_seconds = min(1.0, length)
    if not 0 < hop_seconds <= length:
        raise ValueError(f"localise: hop_seconds must be in (0, {length:g}], the length of a window, got {hop_seconds}")
    info = probe(path)
    if not info.width or not info.has_audio:
        raise MediaError(f"{path}: must have sound and picture to compare, got no {_missing(info.has_audio)}")
    begin, end = max(0.0, begin_seconds), min(info.duration_seconds, end_seconds)
    if not begin < end:
        raise ValueError(
            f"{path}: the part to localise must lie in its {info.duration_seconds:.3f} s, got "
            f"{begin_seconds:g} to {end_seconds:g} s"
        )
    height, width = displayed_size(path)
    starts = [begin + start for start in covering_starts(end - begin, length, hop_seconds)]
    agreement: list[NDArray[np.float32]] = []
    heat: list[NDArray[np.float32]] = []
    for first in range(0, len(starts), _WINDOWS_AT_ONCE):
        progress("windows", first, len(starts))
        clips = decode_clips(path, starts[first : first + _WINDOWS_AT_ONCE], spatial.spec)
        agreed, hot = agreement_and_heat(
            spatial, torch.stack([clip.frames for clip in clips]), torch.stack([clip.waveform for clip in clips])
        )
        agreement.append(agreed.float().cpu().numpy())
        heat.append(hot.float().cpu().numpy())
    progress("windows", len(starts), len(starts))
    found = Localisation(
        path,
        begin,
        end,
        spatial.spec,
        np.asarray(starts),
        np.concatenate(agreement),
        np.concatenate(heat),
        height,
        width,
    )
    if not (np.isfinite(found.agreement).all() and np.isfinite(found.heat).all()):
        raise EncoderError(
            f"encoder {type(encoder).__name__}: must give finite vectors, got NaN or infinity for {path}"
        )
    return found


@torch.no_grad()
def agreement_and_heat(
    encoder: SpatialEncoder, frames: Tensor, waveforms: Tensor
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch map_time map_height map_width"]]:
    """Agreement and heat of clips: frames ``(B, T, height, width, 3)`` uint8, waveforms ``(B, S)`` float32."""
    heard = encoder.match_audio(encoder.embed_audio(waveforms.to(encoder.device)))
    maps = encoder.map_video(frames.to(encoder.device))
    agreement = (encoder.match_video(encoder.pool_map(maps)) * heard).sum(dim=1)
    heats = [_heat(encoder, *one) for one in zip(maps, heard, agreement, strict=True)]
    return agreement, torch.stack(heats)


def _heat(
    encoder: SpatialEncoder,
    feature_map: Float[Tensor, "channels time height width"],
    heard: Float[Tensor, " dim"],
    agreement: Float[Tensor, ""],
) -> Float[Tensor, "time height width"]:
    _, times, height, width = feature_map.shape
    # Blocks may begin one place outside: every place is then in four of them, also at the border.
    rows, columns = height + _BLOCK - 1, width + _BLOCK - 1
    at_once = max(1, _MAPS_AT_ONCE_BYTES // (feature_map.numel() * feature_map.element_size()))
    left = []
    for some in torch.arange(times * rows * columns, device=feature_map.device).split(at_once):
        time, row, column = some // (rows * columns), some // columns % rows, some % columns
        without = feature_map[None] * ~_blocks(time, row, column, feature_map)[:, None]
        left.append(encoder.match_video(encoder.pool_map(without)) @ heard)
    lost = (agreement - torch.cat(left)).view(times, rows, columns)
    return functional.avg_pool2d(lost, _BLOCK, stride=1)


def _blocks(time: Tensor, row: Tensor, column: Tensor, feature_map: Tensor) -> Tensor:
    """Masks ``(n, t, h, w)``, true in the block; block (row, column) ends with the place of that row and column."""

    def along(axis: int, last: Tensor, size: int) -> Tensor:
        place = torch.arange(feature_map.shape[axis], device=feature_map.device)
        return (place <= last[:, None]) & (place > last[:, None] - size)

    in_time, in_rows, in_columns = along(1, time, 1), along(2, row, _BLOCK), along(3, column, _BLOCK)
    return in_time[:, :, None, None] & in_rows[:, None, :, None] & in_columns[:, None, None, :]


def centre_of_mass(heat: NDArray[np.float32]) -> tuple[float, float]:
    """Centre of the positive part of a heat map ``(h, w)``, as x and y in [0, 1] from its top left corner.

    The middle, if nothing is positive.

    Examples
    --------
    >>> centre_of_mass(np.array([[0, 0, 0, 1], [0, 0, -9, 0]], np.float32))
    (0.875, 0.25)
    """
    weights = heat.clip(min=0).astype(np.float64)
    total = weights.sum()
    if not total > 0:
        return 0.5, 0.5
    height, width = heat.shape
    x = weights.sum(0) @ (np.arange(width) + 0.5) / (width * total)
    y = weights.sum(1) @ (np.arange(height) + 0.5) / (height * total)
    return float(x), float(y)


def displayed_size(path: Path) -> tuple[int, int]:
    """Height and width of a file's picture in pixels, as players display it.

    Raises
    ------
    MediaError
        The file cannot be read, or no picture can be decoded.
    """
    medium = Medium.file(path)
    with medium.open() as container:
        video, _ = streams(container, medium.name)
        if video is not None:
            for _, frame in timed_frames(medium, container, video, stream_start_seconds(video)):
                sides = frame.height, frame.width
                return sides if round(frame.rotation / 90) % 2 == 0 else sides[::-1]
    raise MediaError(f"{medium.name}: no picture could be decoded")


def _spatial(encoder: ClipEncoder) -> SpatialEncoder:
    name = type(encoder).__name__
    if not isinstance(encoder, MatchingEncoder) or set(encoder.modalities) != {"video", "audio"}:
        raise EncoderError(
            f"encoder {name}: must encode video and audio into a common space (match_video, match_audio), as runs and "
            f"exports of cmacc do, got {' and '.join(encoder.modalities)} alone"
        )
    if not isinstance(encoder, SpatialEncoder):
        raise EncoderError(
            f"encoder {name}: must give the feature map of its video before pooling (map_video and pool_map of "
            "cmacc.pretraining.clip_encoder.SpatialEncoder), got neither"
        )
    return encoder


def _missing(has_audio: bool) -> str:
    return "picture" if has_audio else "sound"
