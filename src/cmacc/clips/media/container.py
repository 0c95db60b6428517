"""Open media with PyAV, from a file or from bytes, and read a stream from a given time on.

Trade-offs and traps:

* One thread per decoder (``thread_type = "NONE"``): workers provide the parallelism, and FFmpeg's frame threads can
  deadlock with Python logging callbacks.
* Seek to the keyframe before the window, and decode forward. If a seek fails or lands too late (MPEG-TS has no index,
  and other indices may be wrong), retry with an earlier time, and finally reopen the file and read it from the start,
  which is slow but correct.
* Several streams of a type: choose the same one as FFmpeg's players (`streams`). A cover image does not count as video.
* Many containers state one length for the whole file, or none. Then the length of a stream is computed from packets.
* Only local files are opened (``protocol_whitelist``): a disguised playlist must not make a decoder access the network.
"""

import io
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import av
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Disposition, Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from cmacc.clips.clip import MediaError

# A frame also counts as started at a time if, due to rounding, its start is slightly later.
ROUNDING_SECONDS = 1e-6
# Limits that real files do not exceed. Damaged files may state more, which would allocate gigabytes.
MOST_PIXELS = 2**26  # 8192 x 8192
_HIGHEST_AUDIO_RATE_HZ = 1_000_000
LONGEST_SECONDS = 30 * 86_400.0
# A seek may land after the requested time, or between keyframes. Then it is retried this much earlier.
_SEEK_BACK_SECONDS = (0.0, 2.0, 10.0)
# After a seek, FFmpeg may invent time stamps: in MPEG program streams, which do not stamp every frame (off by some
# frames), and on the last page of an Ogg stream (the requested time plus a tick per packet). Skipping through audio is
# cheap.
_LOST_BY_SEEKING = (("mpeg", "video"), ("mpeg", "audio"), ("ogg", "audio"))
# Formats in which FFmpeg assigns the length of the whole file to each stream.
_ONE_LENGTH = ("asf", "gxf")
# Raw streams, whose length FFmpeg estimates from the first bit rate or the last time stamp.
_GUESSED_LENGTH = (
    "aac", "ac3", "amr", "dts", "eac3", "h264", "hevc", "loas", "m4v", "mjpeg", "mp3", "mpeg", "mpegvideo", "truehd",
)  # fmt: skip
# An estimate this close to the counted length comes from a header, which excludes padding of the last packet.
_PADDING_SECONDS = 0.1
# FFmpeg writes this to an AVI header if it cannot seek back to write the actual number, as in a pipe.
_UNKNOWN_FRAMES = 2**30
# Streams for a part of the audience, or that accompany the main stream.
_SECONDARY = (
    Disposition.dub
    | Disposition.comment
    | Disposition.hearing_impaired
    | Disposition.visual_impaired
    | Disposition.clean_effects
    | Disposition.dependent
)
# They may refer to files outside of the scanned folder.
_LISTS_OF_FILES = ("concat", "hls", "dash", "imf")
_FAULTS = (av.FFmpegError, ValueError, OSError, ArithmeticError, IndexError, RuntimeError)
_Frame = TypeVar("_Frame", VideoFrame, AudioFrame)
_Stream = TypeVar("_Stream", VideoStream, AudioStream)


@dataclass(frozen=True)
class Medium:
    """A local file, or the bytes of a file in memory; ``name`` is used in error messages."""

    name: str
    content: Path | bytes

    @classmethod
    def file(cls, path: Path | str) -> "Medium":
        """Create from a local file."""
        return cls(str(path), Path(path))

    def open(self) -> AbstractContextManager[InputContainer]:
        """Open for reading. FFmpeg errors inside the ``with`` block become a `MediaError` with the name of the file."""
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
        reason = getattr(error, "strerror", None) or error  # without the path, which the message already has
        raise MediaError(f"{medium.name}: does not decode ({type(error).__name__}: {reason})") from error


def streams(container: InputContainer, name: str) -> tuple[VideoStream | None, AudioStream | None]:
    """The video and the audio stream that FFmpeg's players would choose, ready to decode on one thread.

    Default streams are preferred, and streams that are not dubs, comments or for the hearing or visually impaired. In a
    tie, FFmpeg decides (for audio: the program of the video, then the bit rate).

    Raises
    ------
    MediaError
        There is neither, FFmpeg does not know the codec of one, or its frame size or sample rate exceeds a limit. The
        message contains ``name``.
    """
    pictures = [stream for stream in container.streams.video if not is_cover_image(stream)]
    video = _preferred(pictures, container.streams.best("video"))
    audio = _preferred(container.streams.audio, container.streams.best("audio", related=video))
    if video is None and audio is None:
        raise MediaError(f"{name}: no video and no audio in the file")
    for stream in (video, audio):
        if stream is not None:
            if stream.codec_context is None:  # possible, despite PyAV's type annotations
                raise MediaError(f"{name}: FFmpeg does not know the codec of its {stream.type} stream")
            stream.codec_context.thread_type = "NONE"
    if video is not None:
        if video.codec_context.width * video.codec_context.height > MOST_PIXELS:
            size = f"{video.codec_context.width} x {video.codec_context.height}"
            raise MediaError(f"{name}: a picture must have at most {MOST_PIXELS} pixels, got {size}: damaged?")
        # The size may change later in the stream. Keep options that are already set, such as strictness.
        video.codec_context.options = {**video.codec_context.options, "max_pixels": str(MOST_PIXELS)}
    if audio is not None and not 0 <= audio.codec_context.sample_rate <= _HIGHEST_AUDIO_RATE_HZ:
        rate = audio.codec_context.sample_rate
        raise MediaError(f"{name}: sound must have at most {_HIGHEST_AUDIO_RATE_HZ} Hz, got {rate}: damaged?")
    return video, audio


def is_cover_image(stream: Stream) -> bool:
    """Whether it is a cover image, which FFmpeg presents as a video stream of one frame."""
    return bool(stream.disposition & Disposition.attached_pic)


def _preferred(candidates: Sequence[_Stream], best_of_ffmpeg: object) -> _Stream | None:
    # Despite PyAV's type annotations, the context is None if FFmpeg does not know the codec.
    candidates = [stream for stream in candidates if stream.codec_context is not None] or candidates
    # The first, in a tie.
    return max(candidates, key=lambda stream: (_prominence(stream), stream == best_of_ffmpeg), default=None)


def _prominence(stream: Stream) -> int:
    marks = stream.disposition
    return bool(marks & Disposition.default) - bool(marks & _SECONDARY)


def stream_start_seconds(stream: VideoStream | AudioStream) -> float:
    """Start of the stream on the file's clock."""
    if stream.start_time is None or stream.time_base is None:
        return 0.0
    return float(stream.start_time * stream.time_base)


def _is_unfinished(container: InputContainer) -> bool:
    return any(stream.frames == _UNKNOWN_FRAMES for stream in container.streams)


def stated_frames(container: InputContainer, stream: VideoStream) -> int:
    """Number of frames stated by the container; 0 if unknown."""
    return 0 if _is_unfinished(container) else stream.frames


def stated_seconds(container: InputContainer, stream: VideoStream | AudioStream) -> float | None:
    """Length of a stream stated by the container; None if missing, estimated, or that of the whole file."""
    if container.format.name in (*_ONE_LENGTH, *_GUESSED_LENGTH) or _is_unfinished(container):
        return None
    seconds = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
    return seconds if 0 < seconds <= LONGEST_SECONDS else None


def stated_end_seconds(container: InputContainer) -> float | None:
    """End of the longest stream stated by the container, on the file's clock; None if unknown."""
    if not container.duration or container.format.name in _GUESSED_LENGTH or _is_unfinished(container):
        return None
    seconds = container.duration / av.time_base
    return (container.start_time or 0) / av.time_base + seconds if seconds <= LONGEST_SECONDS else None


def states_no_length(path: Path) -> bool:
    """Whether it is a WAV or CAF file that was written to a pipe, so that its header was never completed."""
    with path.open("rb") as file:
        form = file.read(12)
        if form[:4] == b"RIFF" and form[8:] == b"WAVE":
            chunk, unknown = struct.Struct("<4sI"), (0, 2**32 - 1)
        elif form[:4] == b"caff":
            chunk, unknown = struct.Struct(">4sQ"), (0, 2**64 - 1)
            file.seek(8)
        else:
            return False
        while len(head := file.read(chunk.size)) == chunk.size:
            name, size = chunk.unpack(head)
            if name == b"data":
                return size in unknown
            file.seek(size + (size % 2 if form[:4] == b"RIFF" else 0), io.SEEK_CUR)
    return False


def stream_duration_seconds(
    medium: Medium,
    container: InputContainer,
    stream: VideoStream | AudioStream,
    ends: Mapping[int, float] | None = None,
) -> float:
    """Length of a stream: as stated, or computed from its packets; not positive if unknown.

    Parameters
    ----------
    medium, container, stream
        The open file.
    ends
        End of each stream on the file's clock, by stream index, if already known. Otherwise, if the length is not
        stated, the whole file is read again.
    """
    stated = stated_seconds(container, stream)
    if stated is not None:
        return stated
    if ends is None:
        with medium.open() as fresh:  # not all containers can seek back to the start
            known = [packet_end_seconds(packet) for packet in fresh.demux(fresh.streams[stream.index])]
        ends = {stream.index: max((end for end in known if end is not None), default=0.0)}
    counted = ends.get(stream.index, 0.0) - stream_start_seconds(stream)
    if container.format.name in _GUESSED_LENGTH and stream.duration and stream.time_base:
        guess = float(stream.duration * stream.time_base)
        return guess if counted <= 0 or abs(guess - counted) < _PADDING_SECONDS else counted
    return counted


def packet_end_seconds(packet: Any) -> float | None:  # a `Packet`, which is only generic in PyAV's stubs
    """End of a packet on the file's clock; None if it is empty or has no time stamp."""
    stamp = packet.pts if packet.pts is not None else packet.dts
    if not packet.size or stamp is None or packet.time_base is None:
        return None
    return float((stamp + (packet.duration or 0)) * packet.time_base)


def can_seek(container: InputContainer, stream: VideoStream | AudioStream) -> bool:
    """Whether time stamps are right after a seek; otherwise `frames_from` reads from the start of the file."""
    return (container.format.name, stream.type) not in _LOST_BY_SEEKING


def frames_from(
    medium: Medium,
    container: InputContainer,
    stream: VideoStream | AudioStream,
    seconds: float,
    decode: Callable[[InputContainer, VideoStream | AudioStream], Iterator[_Frame]],
    run_in_seconds: float = 0.0,
) -> Iterator[_Frame]:
    """Frames in order, starting at or before ``seconds`` if there is such a frame; seeks ``run_in_seconds`` earlier.

    ``decode`` reads frames from the current position of the container.
    """
    assert stream.time_base is not None
    start = stream.start_time or 0
    latest = max((seconds + ROUNDING_SECONDS) / stream.time_base, start)
    earliest = start - math.ceil(run_in_seconds / stream.time_base)  # the run-in of the first frame precedes the start
    for back_seconds in _SEEK_BACK_SECONDS if can_seek(container, stream) else ():
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
        # A first frame that is not a keyframe may refer to missing frames.
        if isinstance(first, AudioFrame) or first.key_frame:
            yield first
            yield from frames
            return
    with medium.open() as fresh:
        again = next(s for s in streams(fresh, medium.name) if s is not None and s.index == stream.index)
        yield from decode(fresh, again)
