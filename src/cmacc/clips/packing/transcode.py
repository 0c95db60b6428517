"""Transcode one sample for fast random access: an .mp4 file with frequent keyframes, and a .flac file.

Frames and audio keep their times, on a clock that starts at the first frame (at the first sample, if there is no
video). A window of the packed sample is therefore the same window of the original.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from cmacc.clips.clip import MediaError
from cmacc.clips.media.container import ROUNDING_SECONDS, Medium, stream_start_seconds, streams
from cmacc.clips.media.frames import even_size, timed_frames, upright
from cmacc.clips.media.sound import read_sounds

_CHUNK_SECONDS = 60  # of audio in memory; whole seconds, so that chunks join without a seam at any sample rate
_FINEST_TICKS = 90_000
_FLAC_FRAME_SAMPLES = 4_608  # four times FFmpeg's choice: a clip is then read in a quarter of the frames
# No dates and versions in the file, so that the same input gives the same bytes.
_REPRODUCIBLE = {"fflags": "+bitexact"}


@dataclass(frozen=True)
class PackSettings:
    """How samples are stored.

    Parameters
    ----------
    short_side
        Short side of the video in pixels. Smaller videos keep their size.
    keyframe_every
        Keyframe interval in frames. A random window decodes half of it in vain, on average.
    crf
        Constant rate factor of x264, 0 to 51; lower is better and larger.
    sample_rate_hz
        Sample rate of the mono audio.
    samples_per_shard
        Number of samples in a tar file.
    """

    short_side: int = 128
    keyframe_every: int = 16
    crf: int = 23
    sample_rate_hz: int = 16_000
    samples_per_shard: int = 256

    def __post_init__(self) -> None:
        for name, lowest in (
            ("short_side", 16),
            ("keyframe_every", 1),
            ("sample_rate_hz", 1000),
            ("samples_per_shard", 1),
        ):
            if getattr(self, name) < lowest:
                raise ValueError(f"PackSettings: {name} must be at least {lowest}, got {getattr(self, name)}")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"PackSettings: crf must be in [0, 51], got {self.crf}")


def transcode(path: Path, start_seconds: float, duration_seconds: float, settings: PackSettings, stem: Path) -> None:
    """Write ``stem``.mp4 and ``stem``.flac, each if the file has that stream.

    Parameters
    ----------
    path
        The original.
    start_seconds, duration_seconds
        The part to transcode; ``start_seconds`` is 0 except for segments of longer files.
    settings
        Sizes and rates.
    stem
        Output path without extension.

    Raises
    ------
    MediaError
        The original cannot be decoded.
    """
    medium = Medium.file(path)
    with medium.open() as container:
        video, audio = streams(container, medium.name)
        timed = video if video is not None else audio
        assert timed is not None
        origin = stream_start_seconds(timed) + start_seconds
        if video is not None:
            _write_picture(medium, container, video, origin, duration_seconds, settings, stem.with_suffix(".mp4"))
        if audio is not None:
            _write_sound(medium, container, audio, origin, duration_seconds, settings, stem.with_suffix(".flac"))


def _write_picture(
    medium: Medium,
    container: InputContainer,
    stream: VideoStream,
    origin: float,
    duration_seconds: float,
    settings: PackSettings,
    out: Path,
) -> None:
    # The ticks of the original keep its times exact. They may be as coarse as a frame, so a segment that begins between
    # two ticks needs finer ones.
    begins_on_a_tick = origin == stream_start_seconds(stream)
    tick = stream.time_base if begins_on_a_tick else None
    base = tick if tick is not None and tick.denominator <= _FINEST_TICKS else Fraction(1, _FINEST_TICKS)
    scaler = VideoReformatter()
    with av.open(str(out), "w", format="mp4", options=_REPRODUCIBLE) as file:
        encoder: VideoStream | None = None
        frames = timed_frames(medium, container, stream, origin)
        for ticks, frame in _with_ticks(frames, origin, duration_seconds, base):
            turned = upright(frame)
            if encoder is None:
                height, width = even_size(turned.height, turned.width, settings.short_side)
                encoder = file.add_stream("libx264", rate=stream.average_rate or 25)
                encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
                encoder.codec_context.time_base = base
                encoder.codec_context.thread_count = 1
                encoder.codec_context.options = {
                    "preset": "veryfast",
                    "tune": "fastdecode",
                    "crf": str(settings.crf),
                    # B-frames that are not referenced: decoding a window skips most of them.
                    "x264-params": f"keyint={settings.keyframe_every}:scenecut=0:bframes=3:b-adapt=0:b-pyramid=none",
                }
            picture = scaler.reformat(turned, encoder.width, encoder.height, "yuv420p", interpolation="AREA", threads=1)
            picture.pts, picture.time_base = ticks, base
            picture.pict_type = PictureType.NONE  # do not copy the original's keyframes
            file.mux(encoder.encode(picture))
        if encoder is None:
            raise MediaError(f"{medium.name}: no picture could be decoded at {origin:.3f} s")
        file.mux(encoder.encode(None))


def _with_ticks(
    frames: Iterator[tuple[float, VideoFrame]], origin: float, duration_seconds: float, base: Fraction
) -> Iterator[tuple[int, VideoFrame]]:
    """Frames with their ticks after ``origin``, from the frame displayed there (tick 0) to the end of the sample.

    The encoder accepts one frame per tick; of several, the last one is displayed. A late first frame (in AVI with
    B-frames) is displayed from the beginning, as in a clip, because a file that starts late would have another zero.
    """
    shown: tuple[int, VideoFrame] | None = None
    for time, frame in frames:
        if shown is not None and time - origin >= duration_seconds - ROUNDING_SECONDS:
            break
        ticks = max(0, round((time - origin) / base)) if shown is not None else 0
        if shown is not None and ticks > shown[0]:
            yield shown
        shown = ticks, frame
    if shown is not None:
        yield shown


def _write_sound(
    medium: Medium,
    container: InputContainer,
    stream: AudioStream,
    origin: float,
    duration_seconds: float,
    settings: PackSettings,
    out: Path,
) -> None:
    rate = settings.sample_rate_hz
    total = max(1, round(duration_seconds * rate))
    with av.open(str(out), "w", format="flac", options=_REPRODUCIBLE) as file:
        encoder = file.add_stream("flac", rate=rate, layout="mono")
        encoder.codec_context.format = "s16"
        encoder.codec_context.options = {"frame_size": str(_FLAC_FRAME_SAMPLES)}
        for begin in range(0, total, _CHUNK_SECONDS * rate):
            count = min(_CHUNK_SECONDS * rate, total - begin)
            [(chunk, _)] = read_sounds(medium, container, stream, [origin + begin / rate], count, rate)
            file.mux(encoder.encode(_pcm(chunk, rate, begin)))
        file.mux(encoder.encode(None))


def _pcm(waveform: NDArray[np.float32], rate: int, pts: int) -> av.AudioFrame:
    samples = np.clip(np.round(waveform * 32_768), -32_768, 32_767).astype(np.int16)
    frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = rate, pts, Fraction(1, rate)
    return frame
