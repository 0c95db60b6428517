"""Decode the video of a clip: the frames displayed at given times, scaled and cropped.

* Packets are inspected before decoding: a frame that no other frame refers to (most B-frames) and that is not displayed
  at a requested time is skipped. This saves a quarter to a third of the work for a long group of pictures.
* Only the frames of the clip are converted, and FFmpeg scales them down before they reach Python.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from heapq import heappop, heappush

import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from cmacc.clips.clip import MediaError
from cmacc.clips.media.container import MOST_PIXELS, ROUNDING_SECONDS, Medium, frames_from, stream_start_seconds

# Frames are displayed in another order than stored, but no codec delays more than 16 of them.
_LOOKAHEAD_PACKETS = 32
# AVI has no presentation times: with B-frames (as in UCF101's Xvid files), FFmpeg returns frames in the right order but
# with some times swapped (1, 2, 4, 3, 5, 7, 6...). So the sorted times are assigned to the frames in their order.
_AVI_REORDER_DEPTH = 4


def read_frames(
    medium: Medium, container: InputContainer, stream: VideoStream, times: Sequence[float], out: NDArray[np.uint8]
) -> NDArray[np.float64]:
    """Write the frame displayed at ``times[i]`` to ``out[i]``: the last one that starts at or before that time.

    Parameters
    ----------
    medium, container, stream
        The open file.
    times
        Ascending seconds on the stream's clock. Before the first and after the last frame, that frame is used.
    out
        Output array ``(len(times), height, width, 3)``.

    Returns
    -------
    ``(len(times),)`` start of each frame in seconds.

    Raises
    ------
    MediaError
        No frame could be decoded.
    """
    began = np.empty(len(times))
    scaler = VideoReformatter()  # one for all frames, since creating it costs more than scaling a frame
    filled = 0
    for frame, since, count in frames_shown(medium, container, stream, times):
        out[filled : filled + count] = _scaled(scaler, frame, out.shape[1], out.shape[2])
        began[filled : filled + count] = since
        filled += count
    return began


def frames_shown(
    medium: Medium, container: InputContainer, stream: VideoStream, times: Sequence[float]
) -> Iterator[tuple[VideoFrame, float, int]]:
    """The frames displayed at ``times``, as in `read_frames`, one after the other.

    Yields
    ------
    A frame, its start in seconds, and the number of ``times`` at which it is displayed (at least one).

    Raises
    ------
    MediaError
        No frame could be decoded.
    """
    done = 0
    shown: VideoFrame | None = None
    since = 0.0
    tick = float(stream.time_base or 1)
    wanted = [math.floor((time + ROUNDING_SECONDS) / tick) for time in times]
    for time, frame in timed_frames(medium, container, stream, times[0], wanted):
        if shown is not None and (count := bisect_left(times, time - ROUNDING_SECONDS, done) - done):
            yield shown, since, count
            done += count
        if done == len(times):
            return
        shown, since = frame, time
    if shown is None:
        raise MediaError(f"{medium.name}: no picture could be decoded at {times[0]:.3f} s")
    yield shown, since, len(times) - done


def timed_frames(
    medium: Medium, container: InputContainer, stream: VideoStream, seconds: float, wanted: Sequence[int] = ()
) -> Iterator[tuple[float, VideoFrame]]:
    """Frames with their times, in order, starting at or before ``seconds`` if there is such a frame.

    Parameters
    ----------
    medium, container, stream
        The open file.
    seconds
        Time on the stream's clock.
    wanted
        Ticks of the stream, in ascending order. If given, frames that are not displayed at one of them may be missing,
        and iteration ends after the last.
    """
    assert stream.time_base is not None
    is_avi = container.format.name == "avi"
    step = float(1 / stream.average_rate) if stream.average_rate else 0.04
    tick = float(stream.time_base)
    time = stream_start_seconds(stream) - step
    waiting_times: list[float] = []
    waiting: deque[VideoFrame] = deque()
    decode = partial(_decoded, wanted=() if is_avi else wanted)
    for frame in frames_from(medium, container, stream, seconds, decode):
        time = frame.pts * tick if frame.pts is not None else time + step
        heappush(waiting_times, time)
        waiting.append(frame)
        if len(waiting) > (_AVI_REORDER_DEPTH if is_avi else 0):
            yield heappop(waiting_times), waiting.popleft()
    while waiting:
        yield heappop(waiting_times), waiting.popleft()


def _decoded(container: InputContainer, stream: VideoStream, wanted: Sequence[int]) -> Iterator[VideoFrame]:
    """Decode from the current position in display order, and stop after the last of the times ``wanted``.

    ``wanted`` are ticks of the stream, in ascending order. If empty, all frames are decoded.
    """
    packets = container.demux(stream)
    if not wanted:
        for packet in packets:
            yield from packet.decode()
        return
    codec = stream.codec_context
    codec.skip_frame = "DEFAULT"
    codec.open(strict=False)  # some decoders (dav1d) only read `skip_frame` when they are opened
    first = stream.start_time or 0
    wanted = [max(time, first) for time in wanted]
    ahead: deque[Packet[VideoStream]] = deque()
    starts: list[int] = []  # of the frames in ``ahead`` and some earlier ones
    ended = False
    while ahead or not ended:
        while not ended and len(ahead) < _LOOKAHEAD_PACKETS:
            packet = next(packets)  # the last packet is empty
            # A frame is never displayed before it is decoded, so later packets are not needed.
            ended = packet.size == 0 or (packet.dts is not None and packet.dts > wanted[-1])
            if ended:
                break
            ahead.append(packet)
            if packet.pts is not None:
                insort(starts, packet.pts)
        if not ahead:
            break
        packet = ahead.popleft()
        codec.skip_frame = "DEFAULT" if _is_on_show(packet.pts, starts, wanted) else "NONREF"
        yield from codec.decode(packet)
        del starts[: max(0, len(starts) - 4 * _LOOKAHEAD_PACKETS)]
    codec.skip_frame = "DEFAULT"
    yield from codec.decode(None)


def _is_on_show(start: int | None, starts: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether one of the times ``wanted`` is between ``start`` and the next of ``starts``; both lists are sorted.

    Examples
    --------
    >>> _is_on_show(20, [0, 10, 20, 30], [25, 60])
    True
    >>> _is_on_show(10, [0, 10, 20, 30], [25, 60])
    False
    """
    if start is None:
        return True
    place = bisect_right(starts, start)
    end = starts[place] if place < len(starts) else math.inf
    return bisect_left(wanted, start) < bisect_left(wanted, end)


def _scaled(scaler: VideoReformatter, frame: VideoFrame, height: int, width: int) -> NDArray[np.uint8]:
    """Scale to cover ``height`` x ``width``, preserving the aspect ratio, then crop the centre."""
    quarter_turns = round(frame.rotation / 90) % 4
    if quarter_turns % 2:
        height, width = width, height
    scale = max(height / frame.height, width / frame.width)
    scaled_height = max(height, round(frame.height * scale))
    scaled_width = max(width, round(frame.width * scale))
    if scaled_height * scaled_width > MOST_PIXELS:
        raise ValueError(f"a picture of {frame.width} x {frame.height} cannot cover {width} x {height}")
    # For downscaling, area averaging is as good as FFmpeg's widened bilinear filter, in two thirds of the time.
    interpolation = "AREA" if scale < 1 else "BILINEAR"
    scaled = scaler.reformat(frame, scaled_width, scaled_height, "rgb24", interpolation=interpolation, threads=1)
    picture = scaled.to_ndarray()
    top, left = (scaled_height - height) // 2, (scaled_width - width) // 2
    return np.rot90(picture[top : top + height, left : left + width], quarter_turns)


def upright(frame: VideoFrame) -> VideoFrame:
    """The frame as players display it: rotated by its metadata, which an encoder does not write to its file."""
    quarter_turns = round(frame.rotation / 90) % 4
    if quarter_turns == 0:
        return frame
    pixels: NDArray[np.uint8] = np.rot90(frame.to_ndarray(format="rgb24"), quarter_turns)
    return VideoFrame.from_ndarray(np.ascontiguousarray(pixels))


def even_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Size with a short side of at most ``short_side`` and the same aspect ratio; both even, as 4:2:0 requires.

    Examples
    --------
    >>> even_size(240, 320, 128)
    (128, 170)
    >>> even_size(63, 47, 128)
    (64, 48)
    """
    scale = min(1.0, short_side / min(height, width))
    return max(2, round(height * scale / 2) * 2), max(2, round(width * scale / 2) * 2)
