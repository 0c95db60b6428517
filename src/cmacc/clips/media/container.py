"""Open media with PyAV, from a file or from bytes, and read a stream from a given time on.

Trade-offs and traps:

* One thread per decoder (``thread_type = "NONE"``): workers give the parallelism, and FFmpeg's frame threads can
  deadlock together with Python logging callbacks.
* Seeking goes to the keyframe before the window and decodes forward; a seek that fails or lands too late (MPEG-TS has
  no index, and other indices lie) is tried again earlier, then met by reopening and reading from the beginning, slow
  but right.
* Only local files are opened (``protocol_whitelist``): a playlist in disguise must not make a decoder fetch an address.
"""

import io
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import av
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from cmacc.clips.clip import MediaError

# A frame belongs to a time also when a rounding of the last digits says that it begins a hair later.
ROUNDING_SECONDS = 1e-6
# No real file is beyond them, but a damaged one may say so, and would have gigabytes allocated.
MOST_PIXELS = 2**26  # 8192 x 8192
_HIGHEST_AUDIO_RATE_HZ = 1_000_000
LONGEST_SECONDS = 30 * 86_400.0
# A seek may land after the time asked for, or between keyframes: then it is tried again so much earlier.
_SEEK_BACK_SECONDS = (0.0, 2.0, 10.0)
# After a seek FFmpeg may invent time stamps: in MPEG program streams, which do not stamp every frame (off by some
# frames), and on the last page of an Ogg stream (the asked time plus a tick a packet). Sound is cheap to skip through.
_LOST_BY_SEEKING = (("mpeg", "video"), ("mpeg", "audio"), ("ogg", "audio"))
# What these name may lie anywhere, outside the folder that a scan was told to keep to.
_LISTS_OF_FILES = ("concat", "hls", "dash", "imf")
_FAULTS = (av.FFmpegError, ValueError, OSError, ArithmeticError, IndexError, RuntimeError)
_Frame = TypeVar("_Frame", VideoFrame, AudioFrame)


@dataclass(frozen=True)
class Medium:
    """Something to open: a local file, or a file's bytes in memory; ``name`` is what errors call it."""

    name: str
    content: Path | bytes

    @classmethod
    def file(cls, path: Path | str) -> "Medium":
        """A local file."""
        return cls(str(path), Path(path))

    def open(self) -> AbstractContextManager[InputContainer]:
        """Open for reading; every fault of FFmpeg's inside the ``with`` becomes a `MediaError` that names the file."""
        return _opened(self)


@contextmanager
def _opened(medium: Medium) -> Iterator[InputContainer]:
    source: str | io.BytesIO
    if isinstance(medium.content, bytes):
        source, options = io.BytesIO(medium.content), dict[str, str]()
    else:
        if not medium.content.is_file():
            raise MediaError(f"{medium.name}: no such file")
        source, options = str(medium.content.absolute()), {"protocol_whitelist": "file"}
    try:
        with av.open(source, "r", metadata_errors="ignore", options=options) as container:
            if container.format.name in _LISTS_OF_FILES:
                raise MediaError(f"{medium.name}: does not decode (it is a list of other files, which are not opened)")
            yield container
    except MediaError:
        raise
    except _FAULTS as error:
        reason = getattr(error, "strerror", None) or error  # without the path, which is said already
        raise MediaError(f"{medium.name}: does not decode ({type(error).__name__}: {reason})") from error


def streams(container: InputContainer, name: str) -> tuple[VideoStream | None, AudioStream | None]:
    """The first picture and the first sound, ready to decode on one thread.

    Raises
    ------
    MediaError
        There is neither, FFmpeg does not know the codec of one, or its size or rate is absurd; ``name`` is the file's.
    """
    # Cover art is a video stream of one picture: not what a clip is made of.
    video = next((s for s in container.streams.video if "attached_pic" not in str(s.disposition)), None)
    audio = next(iter(container.streams.audio), None)
    if video is None and audio is None:
        raise MediaError(f"{name}: neither picture nor sound in the file")
    for stream in (video, audio):
        if stream is not None:
            if stream.codec_context is None:  # whatever PyAV's types say
                raise MediaError(f"{name}: FFmpeg does not know the codec of its {stream.type} stream")
            stream.codec_context.thread_type = "NONE"
    if video is not None:
        if video.codec_context.width * video.codec_context.height > MOST_PIXELS:
            size = f"{video.codec_context.width} x {video.codec_context.height}"
            raise MediaError(f"{name}: a picture must have at most {MOST_PIXELS} pixels, got {size}: damaged?")
        # The size may change on the way. Options that are set already, such as strictness, stay.
        video.codec_context.options = {**video.codec_context.options, "max_pixels": str(MOST_PIXELS)}
    if audio is not None and not 0 <= audio.codec_context.sample_rate <= _HIGHEST_AUDIO_RATE_HZ:
        rate = audio.codec_context.sample_rate
        raise MediaError(f"{name}: sound must have at most {_HIGHEST_AUDIO_RATE_HZ} Hz, got {rate}: damaged?")
    return video, audio


def stream_start_seconds(stream: VideoStream | AudioStream) -> float:
    """Where the stream begins on the file's clock."""
    if stream.start_time is None or stream.time_base is None:
        return 0.0
    return float(stream.start_time * stream.time_base)


def stream_duration_seconds(container: InputContainer, stream: VideoStream | AudioStream) -> float:
    """Length of a stream: as stated, else of the file, else counted from its packets; 0 where nothing tells it.

    What is stated is believed up to `LONGEST_SECONDS`.
    """
    if stream.duration and stream.time_base:
        seconds = float(stream.duration * stream.time_base)
        if seconds <= LONGEST_SECONDS:
            return seconds
    start_seconds = stream_start_seconds(stream)
    if container.duration:
        late_seconds = max(0.0, start_seconds - (container.start_time or 0) / av.time_base)
        seconds = container.duration / av.time_base - late_seconds
        if seconds <= LONGEST_SECONDS:
            return seconds
    container.seek(0)
    ends = [
        float((packet.pts + (packet.duration or 0)) * packet.time_base)
        for packet in container.demux(stream)
        if packet.pts is not None and packet.time_base is not None
    ]
    return max(ends, default=0.0) - start_seconds


def frames_from(
    medium: Medium,
    container: InputContainer,
    stream: VideoStream | AudioStream,
    seconds: float,
    decode: Callable[[InputContainer, VideoStream | AudioStream], Iterator[_Frame]],
    run_in_seconds: float = 0.0,
) -> Iterator[_Frame]:
    """Frames in order, from one at or before ``seconds`` on where there is one; ``run_in_seconds`` earlier if asked.

    ``decode`` reads frames from where the container stands.
    """
    assert stream.time_base is not None
    start = stream.start_time or 0
    latest = max((seconds + ROUNDING_SECONDS) / stream.time_base, start)
    earliest = start - math.ceil(run_in_seconds / stream.time_base)  # the run-in of the first frame is before the start
    for back_seconds in () if (container.format.name, stream.type) in _LOST_BY_SEEKING else _SEEK_BACK_SECONDS:
        target = math.floor((seconds - run_in_seconds - back_seconds) / stream.time_base)
        if back_seconds and target <= earliest:
            break
        try:
            container.seek(max(target, earliest), stream=stream, backward=True, any_frame=False)
            frames = decode(container, stream)
            first = next(frames, None)
        except av.FFmpegError:
            continue
        if first is None or first.pts is None or first.pts > latest:
            continue
        # What decoding from elsewhere gives first may lack what it refers to.
        if isinstance(first, AudioFrame) or first.key_frame:
            yield first
            yield from frames
            return
    with medium.open() as fresh:
        again = next(s for s in streams(fresh, medium.name) if s is not None and s.index == stream.index)
        yield from decode(fresh, again)
