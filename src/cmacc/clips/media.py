"""Read media files with PyAV: what a file holds (`probe`) and one exact window of it (`decode_clip`).

Trade-offs and traps:

* One thread per decoder (``thread_type = "NONE"``): workers give the parallelism, and FFmpeg's frame threads can
  deadlock together with Python logging callbacks.
* Only the frames that a clip keeps are converted, and FFmpeg's scaler shrinks them before they reach Python.
* Seeking goes to the keyframe before the window and decodes forward; a seek that fails or lands too late is met by
  starting over from the beginning, slow but right.
* Sound is placed by counting samples from the first decoded frame, not by each frame's time stamp: Matroska rounds
  stamps to 1 ms and AVI to a whole frame, and placing by them would click at every frame border. Only a jump of more
  than ``_AUDIO_JUMP_SECONDS`` is believed.
* Only local files are opened (`protocol_whitelist`): a playlist in disguise must not make a decoder fetch an address.
"""

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import torch
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from cmacc.clips.clip import Clip, ClipSpec

_AUDIO_JUMP_SECONDS = 0.05
# AAC and Vorbis need a frame or two of run-in before what they give after a seek is right.
_AUDIO_RUN_IN_SECONDS = 0.15
_RESAMPLE_MARGIN_SECONDS = 0.01
# AVI holds no presentation times: with B-frames (as in UCF101's Xvid files) FFmpeg gives the frames in the right order
# but some of their times swapped (1, 2, 4, 3, 5, 7, 6...), so the sorted times are dealt out in the frames' order.
_AVI_REORDER_DEPTH = 4


class MediaError(ValueError):
    """A media file that cannot be read as asked; the message names the file and the reason."""


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds. A file without picture has ``fps``, ``width`` and ``height`` 0."""

    duration_seconds: float
    fps: float
    width: int
    height: int
    has_audio: bool
    audio_rate_hz: int


def probe(path: Path | str) -> MediaInfo:
    """Read a file's facts and decode the first frame of each stream, so that a file that cannot be used shows it.

    Raises
    ------
    MediaError
        The file is missing, holds neither picture nor sound, or does not decode.
    """
    with _open(path) as container:
        video, audio = _streams(container)
        if video is None and audio is None:
            raise MediaError(f"{path}: neither picture nor sound in the file")
        if video is not None and next(container.decode(video), None) is None:
            raise MediaError(f"{path}: no picture could be decoded")
        has_audio = False
        if audio is not None:
            container.seek(0)
            has_audio = next(container.decode(audio), None) is not None
        if video is None and not has_audio:
            raise MediaError(f"{path}: no sound could be decoded")
        duration_seconds = _duration_seconds(container, video or audio)
        if duration_seconds <= 0:
            raise MediaError(f"{path}: the file states no duration and holds no time stamps")
        rate = video.average_rate or video.guessed_rate or video.base_rate if video is not None else None
        return MediaInfo(
            duration_seconds=duration_seconds,
            fps=float(rate) if rate else 0.0,
            width=video.codec_context.width if video is not None else 0,
            height=video.codec_context.height if video is not None else 0,
            has_audio=has_audio,
            audio_rate_hz=int(audio.codec_context.sample_rate) if has_audio and audio is not None else 0,
        )


def decode_clip(path: Path | str, start_seconds: float, spec: ClipSpec) -> Clip:
    """Decode exactly one window of a file.

    Parameters
    ----------
    path
        The file.
    start_seconds
        Start of the half-open window ``[start_seconds, start_seconds + spec.length_seconds)`` on the clock that begins
        with the file's first picture (with its first sample, where there is no picture). It may reach over the ends:
        there the first or last frame is held and the sound is zero.
    spec
        Size of the clip.

    Returns
    -------
    Clip
        ``spec.frame_count`` frames and ``spec.sample_count`` samples, always. A stream that the file does not have is
        zeros.

    Raises
    ------
    MediaError
        The file is missing or a stream of it does not decode at that place.
    """
    with _open(path) as container:
        video, audio = _streams(container)
        if video is None and audio is None:
            raise MediaError(f"{path}: neither picture nor sound in the file")
        origin_seconds = _start_seconds(video if video is not None else audio)
        frames = np.zeros((spec.frame_count, spec.frame_height, spec.frame_width, 3), np.uint8)
        waveform = np.zeros(spec.sample_count, np.float32)
        if video is not None:
            first = spec.picture_start_seconds(start_seconds) + origin_seconds
            times = [first + (i + 0.5) / spec.frame_rate_hz for i in range(spec.frame_count)]
            _read_frames(container, video, times, frames)
        if audio is not None:
            waveform = _read_sound(container, audio, spec.audio_start_seconds(start_seconds) + origin_seconds, spec)
    return Clip(torch.from_numpy(frames), torch.from_numpy(waveform), start_seconds)


@contextmanager
def _open(path: Path | str) -> Iterator[InputContainer]:
    """Open a local file and turn every fault of FFmpeg's into a `MediaError` that names the file."""
    path = Path(path)
    if not path.is_file():
        raise MediaError(f"{path}: no such file")
    try:
        with av.open(
            str(path.absolute()), metadata_errors="ignore", options={"protocol_whitelist": "file"}
        ) as container:
            yield container
    except MediaError:
        raise
    except (av.FFmpegError, ValueError, OSError, ArithmeticError, IndexError, RuntimeError) as error:
        raise MediaError(f"{path}: does not decode ({type(error).__name__}: {error})") from error


def _streams(container: InputContainer) -> tuple[VideoStream | None, AudioStream | None]:
    # Cover art is a video stream of one picture: not what a clip is made of.
    video = next((s for s in container.streams.video if "attached_pic" not in str(s.disposition)), None)
    audio = next(iter(container.streams.audio), None)
    for stream in (video, audio):
        if stream is not None:
            if stream.codec_context is None:  # whatever PyAV's types say
                raise MediaError(f"{container.name}: FFmpeg does not know the codec of its {stream.type} stream")
            stream.codec_context.thread_type = "NONE"
    return video, audio


def _start_seconds(stream: VideoStream | AudioStream | None) -> float:
    if stream is None or stream.start_time is None or stream.time_base is None:
        return 0.0
    return float(stream.start_time * stream.time_base)


def _duration_seconds(container: InputContainer, stream: VideoStream | AudioStream | None) -> float:
    assert stream is not None
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if container.duration:
        return container.duration / av.time_base - max(0.0, _start_seconds(stream) - (container.start_time or 0) / 1e6)
    container.seek(0)
    ends = [
        float((packet.pts + (packet.duration or 0)) * packet.time_base)
        for packet in container.demux(stream)
        if packet.pts is not None and packet.time_base is not None
    ]
    return max(ends, default=0.0) - _start_seconds(stream)


def _frames_from(
    container: InputContainer, stream: VideoStream | AudioStream, seconds: float, run_in_seconds: float = 0.0
) -> Iterator[VideoFrame | AudioFrame]:
    """Frames in order, from one at or before ``seconds`` on where there is one; ``run_in_seconds`` earlier if asked.

    A seek that fails, or that lands too late (MPEG-TS has no index, and other indices lie), is met by opening the file
    anew and reading it from its beginning: slow, but right.
    """
    assert stream.time_base is not None
    start = stream.start_time or 0
    first: VideoFrame | AudioFrame | None = None
    try:
        target = max(int((seconds - run_in_seconds) / stream.time_base), start)
        container.seek(target, stream=stream, backward=True, any_frame=False)
        frames = cast("Iterator[VideoFrame | AudioFrame]", container.decode(stream))
        first = next(frames, None)
    except av.FFmpegError:
        pass
    if first is not None and first.pts is not None and first.pts <= max(seconds / stream.time_base, start):
        yield first
        yield from frames
        return
    with _open(container.name) as fresh:
        again = next(s for s in _streams(fresh) if s is not None and s.index == stream.index)
        yield from cast("Iterator[VideoFrame | AudioFrame]", fresh.decode(again))


def _timed_frames(container: InputContainer, stream: VideoStream, seconds: float) -> Iterator[tuple[float, VideoFrame]]:
    """Frames with their times, in order, from one at or before ``seconds`` on where there is one."""
    assert stream.time_base is not None
    depth = _AVI_REORDER_DEPTH if container.format.name == "avi" else 0
    step = float(1 / stream.average_rate) if stream.average_rate else 0.04
    time = _start_seconds(stream) - step
    times: list[float] = []
    frames: deque[VideoFrame] = deque()
    for frame in _frames_from(container, stream, seconds):
        assert isinstance(frame, VideoFrame)
        time = float(frame.pts * stream.time_base) if frame.pts is not None else time + step
        heappush(times, time)
        frames.append(frame)
        if len(frames) > depth:
            yield heappop(times), frames.popleft()
    while frames:
        yield heappop(times), frames.popleft()


def _read_frames(container: InputContainer, stream: VideoStream, times: list[float], out: NDArray[np.uint8]) -> None:
    """Write into ``out[i]`` the frame on show at ``times[i]``: the last one that began at or before it."""
    shown: VideoFrame | None = None
    filled = 0
    scaler = VideoReformatter()  # one for all frames: setting one up costs more than scaling a frame

    def show_until(end: float) -> None:
        nonlocal filled
        assert shown is not None
        count = sum(time < end for time in times[filled:])
        if count:
            out[filled : filled + count] = _scaled(scaler, shown, out.shape[1], out.shape[2])
            filled += count

    for time, frame in _timed_frames(container, stream, times[0]):
        if shown is not None:
            show_until(time)
        if filled == len(times):
            return
        shown = frame
    if shown is None:
        raise MediaError(f"{container.name}: no picture could be decoded at {times[0]:.3f} s")
    show_until(math.inf)


def _scaled(scaler: VideoReformatter, frame: VideoFrame, height: int, width: int) -> NDArray[np.uint8]:
    """Scale to cover ``height`` x ``width``, keeping the aspect, then cut about the centre."""
    quarter_turns = round(frame.rotation / 90) % 4
    if quarter_turns % 2:
        height, width = width, height
    scale = max(height / frame.height, width / frame.width)
    scaled_height = max(height, round(frame.height * scale))
    scaled_width = max(width, round(frame.width * scale))
    scaled = scaler.reformat(frame, scaled_width, scaled_height, "rgb24", interpolation="BILINEAR", threads=1)
    picture = scaled.to_ndarray()
    top, left = (scaled_height - height) // 2, (scaled_width - width) // 2
    return np.rot90(picture[top : top + height, left : left + width], quarter_turns)


def _read_sound(
    container: InputContainer, stream: AudioStream, start_seconds: float, spec: ClipSpec
) -> NDArray[np.float32]:
    """Decode ``spec.sample_count`` samples from ``start_seconds`` (the stream's own clock) at the asked rate."""
    assert stream.time_base is not None
    rate = stream.codec_context.sample_rate
    divisor = math.gcd(spec.sample_rate_hz, rate)
    up, down = spec.sample_rate_hz // divisor, rate // divisor
    # A margin of whole resampling periods on both sides keeps the filter's edges out of the clip.
    periods = math.ceil(_RESAMPLE_MARGIN_SECONDS * spec.sample_rate_hz / up)
    native = np.zeros(math.ceil(spec.sample_count / up) * down + 2 * periods * down, np.float32)
    first = round(start_seconds * rate) - periods * down  # index of native[0], counted from the clock's zero
    position: int | None = None
    for frame in _frames_from(container, stream, first / rate, _AUDIO_RUN_IN_SECONDS):
        assert isinstance(frame, AudioFrame)
        if frame.sample_rate != rate:
            raise MediaError(f"{container.name}: the sound's rate changes from {rate} to {frame.sample_rate} Hz")
        stamped = round(float(frame.pts * stream.time_base) * rate) if frame.pts is not None else position or 0
        if position is None or abs(stamped - position) > _AUDIO_JUMP_SECONDS * rate:
            position = stamped
        begin, end = max(position, first), min(position + frame.samples, first + len(native))
        if begin < end:
            native[begin - first : end - first] = _mono(frame)[begin - position : end - position]
        position += frame.samples
        if position >= first + len(native):
            break
    if up != down:
        from scipy.signal import resample_poly  # a second's import, which only decoding should wait for

        native = resample_poly(native, up, down, window=_resample_filter(up, down)).astype(np.float32)
    return native[periods * up : periods * up + spec.sample_count].copy()


@lru_cache(maxsize=16)
def _resample_filter(up: int, down: int) -> NDArray[np.float32]:
    from scipy.signal import firwin

    # resample_poly's own default (Kaiser 5.0), kept because designing it costs as much as using it.
    longest = max(up, down)
    return np.asarray(firwin(20 * longest + 1, 1.0 / longest, window=("kaiser", 5.0)), np.float32)


def _mono(frame: AudioFrame) -> NDArray[np.float32]:
    """Mean of the channels as float in [-1, 1], ``(samples,)``."""
    samples: NDArray[Any] = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(frame.samples, -1).T
    if samples.dtype == np.uint8:
        centred = samples.astype(np.float32) - 128.0
        return np.asarray(centred.mean(0) / 128.0, np.float32)
    mono = samples.mean(0, dtype=np.float64)
    if samples.dtype.kind == "i":
        mono /= -float(np.iinfo(samples.dtype).min)
    return np.asarray(mono, np.float32)
