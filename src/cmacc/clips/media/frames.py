"""The picture's half of a clip: the frames on show at given times, scaled and cut to size.

* Packets are looked at before they are decoded: a frame that nothing refers to (most B-frames) and that no asked time
  falls on is skipped, which saves a quarter to a third of the work of a long group of pictures.
* Only the frames that a clip keeps are converted, and FFmpeg's scaler shrinks them before they reach Python.
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

# Frames are shown in another order than they are stored, but no codec keeps more than 16 of them back.
_LOOKAHEAD_PACKETS = 32
# AVI holds no presentation times: with B-frames (as in UCF101's Xvid files) FFmpeg gives the frames in the right order
# but some of their times swapped (1, 2, 4, 3, 5, 7, 6...), so the sorted times are dealt out in the frames' order.
_AVI_REORDER_DEPTH = 4


def read_frames(
    medium: Medium, container: InputContainer, stream: VideoStream, times: Sequence[float], out: NDArray[np.uint8]
) -> NDArray[np.float64]:
    """Write into ``out[i]`` the frame on show at ``times[i]``: the last one that began at or before it.

    Parameters
    ----------
    medium, container, stream
        The open file.
    times
        Ascending seconds on the stream's own clock. Before the first frame that one is shown, after the last that.
    out
        ``(len(times), height, width, 3)``, filled.

    Returns
    -------
    ``(len(times),)`` seconds at which the frames shown begin.

    Raises
    ------
    MediaError
        No frame could be decoded.
    """
    began = np.empty(len(times))
    scaler = VideoReformatter()  # one for all frames: setting one up costs more than scaling a frame
    filled = 0
    shown: VideoFrame | None = None
    shown_since = 0.0

    def show_until(end: float) -> None:
        nonlocal filled
        assert shown is not None
        count = bisect_left(times, end - ROUNDING_SECONDS, filled) - filled
        if count:
            out[filled : filled + count] = _scaled(scaler, shown, out.shape[1], out.shape[2])
            began[filled : filled + count] = shown_since
            filled += count

    tick = float(stream.time_base or 1)
    wanted = [math.floor((time + ROUNDING_SECONDS) / tick) for time in times]
    for time, frame in timed_frames(medium, container, stream, times[0], wanted):
        if shown is not None:
            show_until(time)
        if filled == len(times):
            return began
        shown, shown_since = frame, time
    if shown is None:
        raise MediaError(f"{medium.name}: no picture could be decoded at {times[0]:.3f} s")
    show_until(math.inf)
    return began


def timed_frames(
    medium: Medium, container: InputContainer, stream: VideoStream, seconds: float, wanted: Sequence[int] = ()
) -> Iterator[tuple[float, VideoFrame]]:
    """Frames with their times, in order, from one at or before ``seconds`` on where there is one.

    Parameters
    ----------
    medium, container, stream
        The open file.
    seconds
        On the stream's own clock.
    wanted
        Ascending ticks of the stream. If there are any, frames that are not on show at one of them may be missing, and
        it ends after the last.
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
    """Decode from where the container stands, in order of showing, and end after the last of the times ``wanted``.

    ``wanted`` are ascending ticks of the stream; without any, every frame is decoded to the end.
    """
    packets = container.demux(stream)
    if not wanted:
        for packet in packets:
            yield from packet.decode()
        return
    codec = stream.codec_context
    codec.skip_frame = "DEFAULT"
    codec.open(strict=False)  # some decoders (dav1d) read once, when they are opened, what they are to skip for good
    first = stream.start_time or 0
    wanted = [max(time, first) for time in wanted]
    ahead: deque[Packet[VideoStream]] = deque()
    starts: list[int] = []  # of the frames in ``ahead`` and of some before them
    ended = False
    while ahead or not ended:
        while not ended and len(ahead) < _LOOKAHEAD_PACKETS:
            packet = next(packets)  # the last is empty
            # A frame is never shown before it is decoded: beyond the last time there is nothing to find.
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
    """Whether one of the times ``wanted`` falls between ``start`` and the next of ``starts``; both lists ascend.

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
    """Scale to cover ``height`` x ``width``, keeping the aspect, then cut about the centre."""
    quarter_turns = round(frame.rotation / 90) % 4
    if quarter_turns % 2:
        height, width = width, height
    scale = max(height / frame.height, width / frame.width)
    scaled_height = max(height, round(frame.height * scale))
    scaled_width = max(width, round(frame.width * scale))
    if scaled_height * scaled_width > MOST_PIXELS:
        raise ValueError(f"a picture of {frame.width} x {frame.height} cannot cover {width} x {height}")
    # To shrink, the mean over a pixel's area is as good as FFmpeg's widened bilinear filter, in two thirds of its time.
    interpolation = "AREA" if scale < 1 else "BILINEAR"
    scaled = scaler.reformat(frame, scaled_width, scaled_height, "rgb24", interpolation=interpolation, threads=1)
    picture = scaled.to_ndarray()
    top, left = (scaled_height - height) // 2, (scaled_width - width) // 2
    return np.rot90(picture[top : top + height, left : left + width], quarter_turns)
