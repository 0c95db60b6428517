"""Read properties of media files (`probe`), and decode exact windows of them (`decode_clips`)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from cmacc.clips.clip import Clip, ClipSpec, MediaError
from cmacc.clips.media.container import LONGEST_SECONDS, Medium, stream_duration_seconds, stream_start_seconds, streams
from cmacc.clips.media.frames import frames_shown, read_frames
from cmacc.clips.media.sound import read_sounds
from cmacc.clips.storage import PackedSample, read_extent

_WORTH_A_SEEK_SECONDS = 0.7  # shorter gaps are faster to decode than to seek


@dataclass(frozen=True)
class MediaInfo:
    """Properties of a file. Without video, ``fps``, ``width`` and ``height`` are 0."""

    duration_seconds: float
    fps: float
    width: int
    height: int
    has_audio: bool
    audio_rate_hz: int


def probe(path: Path | str) -> MediaInfo:
    """Read the properties of a file, and decode the first frame of each stream to detect unusable files.

    Raises
    ------
    MediaError
        The file is missing, has neither video nor audio, or does not decode.
    """
    medium = Medium.file(path)
    with medium.open() as container:
        return read_info(medium, container)


def facts_of(path: str) -> tuple[float, int, int, bool]:
    """What `probe` finds: seconds, width, height and whether there is sound.

    Plain values, for a guarded process. It stands here because such a process imports the module of its function, and
    this one it has.
    """
    info = probe(path)
    return info.duration_seconds, info.width, info.height, info.has_audio


def read_info(medium: Medium, container: InputContainer, ends: Mapping[int, float] | None = None) -> MediaInfo:
    """`probe` for a newly opened file; for ``ends`` see `stream_duration_seconds`."""
    name = medium.name
    video, audio = streams(container, name)
    undecoded = {stream.index for stream in (video, audio) if stream is not None}
    # Decode both in one pass: not all containers can seek back to the start.
    for packet in container.demux([stream for stream in (video, audio) if stream is not None]):
        if packet.stream_index in undecoded and packet.decode():
            undecoded.remove(packet.stream_index)
        if not undecoded:
            break
    if video is not None and video.index in undecoded:
        raise MediaError(f"{name}: no picture could be decoded")
    has_audio = audio is not None and audio.index not in undecoded
    if video is None and not has_audio:
        raise MediaError(f"{name}: no sound could be decoded")
    timed = video if video is not None else audio
    assert timed is not None
    duration_seconds = stream_duration_seconds(medium, container, timed, ends)
    if duration_seconds <= 0:
        raise MediaError(f"{name}: the file states no duration and holds no time stamps")
    if duration_seconds > LONGEST_SECONDS:
        raise MediaError(f"{name}: must last at most {LONGEST_SECONDS:g} s, got {duration_seconds:g} s: damaged?")
    rate = video.average_rate or video.guessed_rate or video.base_rate if video is not None else None
    return MediaInfo(
        duration_seconds=duration_seconds,
        fps=float(rate) if rate else 0.0,
        width=video.codec_context.width if video is not None else 0,
        height=video.codec_context.height if video is not None else 0,
        has_audio=has_audio,
        audio_rate_hz=int(audio.codec_context.sample_rate) if has_audio and audio is not None else 0,
    )


def decode_clip(source: Path | str | PackedSample, start_seconds: float, spec: ClipSpec) -> Clip:
    """Decode exactly one window: `decode_clips` with one start."""
    return decode_clips(source, [start_seconds], spec)[0]


def decode_clips(source: Path | str | PackedSample, starts: Sequence[float], spec: ClipSpec) -> list[Clip]:
    """Decode exact windows of one file, which is opened only once.

    Windows that overlap or share keyframes are decoded together: k of them cost less than k times one. Their video and
    audio are the same as if they were decoded alone, except for the noise that some files ask an AAC decoder to add.

    Parameters
    ----------
    source
        A file, or a sample of a packed shard.
    starts
        Start of each half-open window ``[start_seconds, start_seconds + spec.length_seconds)``. Time starts at the
        first frame (or at the first audio sample, without video). Windows may exceed the file: there, the first or last
        frame is repeated and audio is zero. ``spec.short_files`` determines what happens if the file is shorter than a
        window.
    spec
        Size of the clips.

    Returns
    -------
    list of Clip
        In the order of ``starts``. Each always has ``spec.frame_count`` frames and ``spec.sample_count`` samples.
        Missing streams are zeros.

    Raises
    ------
    MediaError
        The file is missing, a stream does not decode in a window, or the file is too short and ``spec.short_files`` is
        ``refuse``.
    """
    if not starts:
        return []
    with open_source(source) as file:
        return file.clips(starts, spec)


@contextmanager
def open_source(source: Path | str | PackedSample) -> Iterator["OpenFile"]:
    """Open a file, or a sample of a packed shard; errors as in `Medium.open`."""
    if isinstance(source, PackedSample):
        media = [
            Medium(f"{source.shard} at {extent.offset}", read_extent(source.shard, extent))
            for extent in (source.video, source.audio)
            if extent is not None
        ]
    else:
        media = [Medium.file(source)]
    with ExitStack() as stack:
        yield OpenFile([(medium, stack.enter_context(medium.open())) for medium in media])


class OpenFile:
    """The video and audio streams of a file, in one or two containers. Time starts at the first frame."""

    def __init__(self, opened: Sequence[tuple[Medium, InputContainer]]) -> None:
        self._video: tuple[Medium, InputContainer, VideoStream] | None = None
        self._audio: tuple[Medium, InputContainer, AudioStream] | None = None
        for medium, container in opened:
            video, audio = streams(container, medium.name)
            if video is not None:
                self._video = medium, container, video
            if audio is not None:
                self._audio = medium, container, audio
        self._video_origin = stream_start_seconds(self._video[2]) if self._video else 0.0
        self._audio_origin = stream_start_seconds(self._audio[2]) if self._audio else 0.0
        if self._video and self._audio and self._video[1] is self._audio[1]:
            self._audio_origin = self._video_origin  # one clock for both

    @property
    def _timed(self) -> tuple[Medium, InputContainer, VideoStream | AudioStream]:
        """The stream that determines the length."""
        timed = self._video if self._video is not None else self._audio
        assert timed is not None
        return timed

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return self._timed[0].name

    @property
    def video(self) -> VideoStream | None:
        """The video stream, if there is one."""
        return self._video[2] if self._video else None

    @property
    def has_audio(self) -> bool:
        """Whether there is an audio stream."""
        return self._audio is not None

    def duration_seconds(self) -> float:
        """Length of the video, or of the audio if there is no video; not positive if unknown."""
        return stream_duration_seconds(*self._timed)

    def frames_shown(self, times: Sequence[float]) -> Iterator[tuple[VideoFrame, int]]:
        """The frames displayed at ascending ``times``, one after the other, and at how many of them each is."""
        assert self._video is not None
        on_its_clock = [time + self._video_origin for time in times]
        return ((frame, count) for frame, _, count in frames_shown(*self._video, on_its_clock))

    def sound(self, start_seconds: float, sample_count: int, sample_rate_hz: int) -> NDArray[np.float32]:
        """``sample_count`` mono samples; zeros where there is no audio."""
        assert self._audio is not None
        return self._sounds([start_seconds], sample_count, sample_rate_hz)[0][0]

    def clips(self, starts: Sequence[float], spec: ClipSpec) -> list[Clip]:
        """Decode the windows that start at ``starts``."""
        period = self._loop_seconds(spec)
        count, shape = spec.frame_count, (spec.frame_height, spec.frame_width, 3)
        if self._video is not None:
            times = np.concatenate([spec.frame_times(start) for start in starts])
            frames, frame_seconds = self._pictures(times if period is None else times % period, shape)
        else:
            frames = np.zeros((len(starts) * count, *shape), np.uint8)
            frame_seconds = np.full(len(starts) * count, math.nan)
        clips = []
        sounds = self._waveforms([spec.audio_start_seconds(start) for start in starts], spec, period)
        for number, (start, (waveform, audio_start_seconds)) in enumerate(zip(starts, sounds, strict=True)):
            own = slice(number * count, (number + 1) * count)
            clips.append(
                Clip(
                    torch.from_numpy(frames[own]),
                    torch.from_numpy(waveform),
                    start,
                    torch.from_numpy(frame_seconds[own]),
                    audio_start_seconds,
                )
            )
        return clips

    def _pictures(
        self, times: NDArray[np.float64], shape: tuple[int, int, int]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        """The frames displayed at ``times``, in any order, and the start of each."""
        assert self._video is not None
        order = np.argsort(times, kind="stable")
        ascending = times[order] + self._video_origin
        frames, began = np.empty((len(times), *shape), np.uint8), np.empty(len(times))
        for run in self._runs(ascending):
            began[run] = read_frames(*self._video, ascending[run].tolist(), frames[run])
        began -= self._video_origin
        if len(times) > 1 and (np.diff(order) < 0).any():
            back = np.argsort(order)
            return frames[back], began[back]
        return frames, began

    def _runs(self, ascending: NDArray[np.float64]) -> list[slice]:
        """Runs of times to decode without seeking between them: a seek only pays if it leads to another keyframe."""
        assert self._video is not None
        stream = self._video[2]
        cuts = [0]
        for place in np.flatnonzero(np.diff(ascending) > _WORTH_A_SEEK_SECONDS).tolist():
            here, there = (int(ascending[i] / (stream.time_base or 1)) for i in (place, place + 1))
            index = stream.index_entries
            if not len(index) or index.search_timestamp(here) != index.search_timestamp(there):
                cuts.append(place + 1)
        return [slice(begin, end) for begin, end in zip(cuts, [*cuts[1:], len(ascending)], strict=True)]

    def _waveforms(
        self, starts: Sequence[float], spec: ClipSpec, period: float | None
    ) -> list[tuple[NDArray[np.float32], float]]:
        """Audio from each of ``starts`` on, and the time of its first sample; zeros and NaN without audio."""
        if self._audio is None:
            return [(np.zeros(spec.sample_count, np.float32), math.nan) for _ in starts]
        if period is None:
            return self._sounds(starts, spec.sample_count, spec.sample_rate_hz)
        [(once, _)] = self._sounds([0.0], max(1, round(period * spec.sample_rate_hz)), spec.sample_rate_hz)
        # Compute the position of every sample: repeating a rounded period would make audio drift from video.
        offsets, period_samples = np.arange(spec.sample_count), period * spec.sample_rate_hz
        places = [(start * spec.sample_rate_hz + offsets) % period_samples for start in starts]
        indices = [np.rint(place).astype(np.int64) % len(once) for place in places]
        return [(once[own], float(own[0]) / spec.sample_rate_hz) for own in indices]

    def _sounds(self, starts: Sequence[float], count: int, rate_hz: int) -> list[tuple[NDArray[np.float32], float]]:
        assert self._audio is not None
        sounds = read_sounds(*self._audio, [start + self._audio_origin for start in starts], count, rate_hz)
        return [(waveform, began - self._audio_origin) for waveform, began in sounds]

    def _loop_seconds(self, spec: ClipSpec) -> float | None:
        """Period of the loop, if the file must be looped; otherwise None."""
        if spec.short_files == "pad":
            return None
        seconds = self.duration_seconds()
        if seconds >= spec.length_seconds:
            return None
        if spec.short_files == "refuse" or seconds <= 0:
            raise MediaError(
                f"{self.name}: must last at least as long as a clip, {spec.length_seconds:g} s, got {seconds:.3f} s; "
                "short_files=pad or loop takes shorter files"
            )
        return seconds
