"""Decode the audio of a clip: exactly the requested samples, mono, at the requested rate.

The position of audio is determined by counting samples from the first decoded frame, not from the time stamp of each
frame: Matroska rounds time stamps to 1 ms and AVI to a whole frame, which would cause clicks at frame borders. Only
jumps of more than ``_AUDIO_JUMP_SECONDS`` are accepted.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import av
import numpy as np
import soxr
from av.audio.codeccontext import AudioCodecContext
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from numpy.typing import NDArray

from cmacc.clips.clip import MediaError
from cmacc.clips.media.container import Medium, can_seek, frames_from

_AUDIO_JUMP_SECONDS = 0.05
# After a seek, AAC and Vorbis need one or two frames before their output is correct.
_AUDIO_RUN_IN_SECONDS = 0.15
# The data of an MP3 frame may start in earlier frames (the bit reservoir, up to 511 bytes, a quarter of a second at low
# bit rates). Without them, it decodes to silence.
_MP3_RUN_IN_SECONDS = 0.4
# Beyond this margin, the effect of cut samples on the resampled audio is below 1e-5 of full scale.
_RESAMPLE_MARGIN_SECONDS = 0.02
# Decoders that remember less than the run-in. Others must begin again for each window if it is to have the same
# samples as alone: Opus predicts a frame's loudness from the last ones, MP2 and AC-3 add noise.
_FORGETFUL = ("alac", "flac", "mp3float", "pcm_", "vorbis")


def read_sounds(
    medium: Medium,
    container: InputContainer,
    stream: AudioStream,
    starts: Sequence[float],
    sample_count: int,
    sample_rate_hz: int,
) -> list[tuple[NDArray[np.float32], float]]:
    """Decode ``sample_count`` mono samples from each of ``starts`` on; zeros where the stream has no samples.

    Windows that overlap or meet are read in one pass. Each has the samples that it would have alone.

    Parameters
    ----------
    medium, container, stream
        The open file.
    starts
        Starts on the stream's clock in seconds, in any order.
    sample_count, sample_rate_hz
        Number of samples of each window, and their rate.

    Returns
    -------
    list of (waveform, seconds)
        In the order of ``starts``: ``(sample_count,)`` in [-1, 1], the mean of all channels; and the time of the first
        sample, which is rounded to a sample of the source, at most half a sample from the start.

    Raises
    ------
    MediaError
        The sample rate changes within the stream.
    """
    assert stream.time_base is not None
    rate = stream.codec_context.sample_rate
    divisor = math.gcd(sample_rate_hz, rate)
    up, down = sample_rate_hz // divisor, rate // divisor
    # A margin of whole resampling periods on both sides keeps edge effects of the filter out of the clip.
    periods = math.ceil(_RESAMPLE_MARGIN_SECONDS * sample_rate_hz / up) if up != down else 0
    native_count = math.ceil(sample_count / up) * down + 2 * periods * down
    run_in_seconds = _MP3_RUN_IN_SECONDS if stream.codec_context.name.startswith("mp3") else _AUDIO_RUN_IN_SECONDS
    sounds: list[tuple[NDArray[np.float32], float]] = [(np.empty(0, np.float32), 0.0)] * len(starts)
    packets = _Packets()
    one_pass: Iterator[AudioFrame]  # kept, since it may keep the file of the packets open
    read_to: int | None = None
    for place in sorted(range(len(starts)), key=starts.__getitem__):
        begin = round(starts[place] * rate)
        first = begin - periods * down  # index of the first native sample, relative to time zero
        tick = math.floor((first / rate - run_in_seconds) / stream.time_base)

        if read_to is None or (can_seek(container, stream) and first - run_in_seconds * rate > read_to):
            decode = partial(packets.start, begin=tick)
            one_pass = frames_from(medium, container, stream, first / rate, decode, run_in_seconds)
            heard = _native(medium, stream, one_pass, first, native_count)
        else:
            heard = _native(medium, stream, packets.frames(tick), first, native_count)
        read_to = first + native_count
        native = heard.samples
        _limit(native)
        if up != down:
            native = soxr.resample(native, rate, sample_rate_hz)
            _limit(native)
            # Remove the ringing of the filter before and after the audio.
            native[: heard.begin * up // down] = 0
            native[math.ceil(heard.end * up / down) :] = 0
        sounds[place] = native[periods * up : periods * up + sample_count].copy(), begin / rate
    return sounds


class _Native(NamedTuple):
    """Samples at the source's rate; between ``begin`` and ``end`` the stream has some."""

    samples: NDArray[np.float32]
    begin: int
    end: int


def _native(medium: Medium, stream: AudioStream, frames: Iterable[AudioFrame], first: int, count: int) -> _Native:
    """The samples ``first`` to ``first + count`` of the stream, counted from time zero."""
    assert stream.time_base is not None
    rate = stream.codec_context.sample_rate
    native = np.zeros(count, np.float32)
    samples_per_tick = float(stream.time_base * rate)
    position: int | None = None
    heard_from, heard_to = count, 0
    for frame in frames:
        if frame.sample_rate != rate:
            raise MediaError(f"{medium.name}: the sound's rate changes from {rate} to {frame.sample_rate} Hz")
        stamped = round(frame.pts * samples_per_tick) if frame.pts is not None else position or 0
        if position is None or abs(stamped - position) > _AUDIO_JUMP_SECONDS * rate:
            position = stamped
        kept_from, kept_to = max(position, first), min(position + frame.samples, first + count)
        if kept_from < kept_to:
            native[kept_from - first : kept_to - first] = mono(frame)[kept_from - position : kept_to - position]
            heard_from, heard_to = min(heard_from, kept_from - first), max(heard_to, kept_to - first)
        position += frame.samples
        if position >= first + count:
            break
    return _Native(native, heard_from, heard_to)


class _Packets:
    """One pass through the packets of a stream, for windows in ascending order.

    Packets are kept as long as a later window may need them, so memory is bounded by the length of a window.
    """

    def start(self, container: InputContainer, stream: AudioStream, begin: int) -> Iterator[AudioFrame]:
        """Begin a pass at the current position of the container; then as `frames`."""
        self._codec = stream.codec_context
        self._ahead = container.demux(stream)
        self._kept: deque[Packet[AudioStream]] = deque()
        self._decoded: deque[list[AudioFrame] | None] = deque()  # frames of the kept packets, where they are shared
        return self.frames(begin)

    def frames(self, begin: int) -> Iterator[AudioFrame]:
        """Decode from the last packet that starts at or before the tick ``begin``, or from the first one.

        The time stamp of the first frame determines the position of the audio. So it must not depend on what was read
        before: neither on where a seek lands, nor on earlier windows, nor on whether the decoder is new. (The first
        packet of a new decoder, whichever it is, loses the encoder delay, and Matroska then rounds the time stamp to
        another millisecond.)
        """
        while self._has(1) and all(_starts_by(packet, begin) for packet in (self._kept[0], self._kept[1])):
            self._kept.popleft()
            self._decoded.popleft()
        are_shared = _is_forgetful(self._codec)
        place = 0
        while self._has(place):
            frames = self._decoded[place]
            if frames is None:
                if place == 0:
                    self._codec.flush_buffers()
                # Not `packet.decode()`: where the file is read again from its start, it may be closed by now.
                frames = self._codec.decode(self._kept[place])
                if are_shared:
                    self._decoded[place] = frames
            if place or self._codec.name != "vorbis":  # which gives nothing for its first packet after a flush
                yield from frames
            place += 1

    def _has(self, place: int) -> bool:
        """Whether there is a kept packet at ``place``, read now if need be."""
        while place >= len(self._kept):
            packet = next(self._ahead, None)
            if packet is None:
                return False
            if not self._codec.is_open:
                with suppress(av.FFmpegError):
                    packet.decode()
                self._codec.flush_buffers()
            self._kept.append(packet)
            self._decoded.append(None)
        return True


def _starts_by(packet: Any, tick: int) -> bool:  # a `Packet`, which is only generic in PyAV's stubs
    return bool(packet.size) and packet.pts is not None and packet.pts <= tick


def _is_forgetful(codec: AudioCodecContext) -> bool:
    """Whether a packet decodes to the same samples after a run-in as after all packets before it."""
    return codec.profile == "LC" if codec.name == "aac" else codec.name.startswith(_FORGETFUL)


def _limit(sound: NDArray[np.float32]) -> None:
    """Clip to [-1, 1] in place: lossy and floating-point audio may exceed it, and damaged files may contain NaN."""
    if not -1 <= sound.min() <= sound.max() <= 1:
        np.nan_to_num(sound, copy=False, nan=0.0, posinf=1.0, neginf=-1.0)
        np.clip(sound, -1, 1, out=sound)


def mono(frame: AudioFrame) -> NDArray[np.float32]:
    """Mean of the channels as float in [-1, 1], ``(samples,)``."""
    if frame.format.name == "fltp":  # the output of most decoders; PyAV's conversion takes four times as long per frame
        channels = [np.frombuffer(memoryview(plane), np.float32, frame.samples) for plane in frame.planes]
        return channels[0] if len(channels) == 1 else np.asarray(np.add.reduce(channels) / np.float32(len(channels)))
    if frame.format.name in ("s16", "s16p") and len(frame.layout.channels) == 1:  # the format of packed audio
        return np.frombuffer(memoryview(frame.planes[0]), np.int16, frame.samples) * np.float32(1 / 32_768)
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
