"""Decode the audio of a clip: exactly the requested samples, mono, at the requested rate.

The position of audio is determined by counting samples from the first decoded frame, not from the time stamp of each
frame: Matroska rounds time stamps to 1 ms and AVI to a whole frame, which would cause clicks at frame borders. Only
jumps of more than ``_AUDIO_JUMP_SECONDS`` are accepted.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import av
import numpy as np
import soxr
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from numpy.typing import NDArray

from cmacc.clips.clip import MediaError
from cmacc.clips.media.container import Medium, frames_from

_AUDIO_JUMP_SECONDS = 0.05
# After a seek, AAC and Vorbis need one or two frames before their output is correct.
_AUDIO_RUN_IN_SECONDS = 0.15
# The data of an MP3 frame may start in earlier frames (the bit reservoir, up to 511 bytes, a quarter of a second at low
# bit rates). Without them, it decodes to silence.
_MP3_RUN_IN_SECONDS = 0.4
# Beyond this margin, the effect of cut samples on the resampled audio is below 1e-5 of full scale.
_RESAMPLE_MARGIN_SECONDS = 0.02


def read_sound(
    medium: Medium,
    container: InputContainer,
    stream: AudioStream,
    start_seconds: float,
    sample_count: int,
    sample_rate_hz: int,
) -> tuple[NDArray[np.float32], float]:
    """Decode ``sample_count`` mono samples from ``start_seconds`` on; zeros where the stream has no samples.

    Parameters
    ----------
    medium, container, stream
        The open file.
    start_seconds
        Start on the stream's clock.
    sample_count, sample_rate_hz
        Number of samples, and their rate.

    Returns
    -------
    ``(sample_count,)`` in [-1, 1], the mean of all channels; and the time of the first sample, which is rounded to a
    sample of the source, at most half a sample from ``start_seconds``.

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
    native = np.zeros(math.ceil(sample_count / up) * down + 2 * periods * down, np.float32)
    begin = round(start_seconds * rate)
    first = begin - periods * down  # index of native[0], relative to time zero
    samples_per_tick = float(stream.time_base * rate)
    position: int | None = None
    heard_from, heard_to = len(native), 0
    run_in_seconds = _MP3_RUN_IN_SECONDS if stream.codec_context.name.startswith("mp3") else _AUDIO_RUN_IN_SECONDS
    decoded = partial(_decoded, begin=math.floor((first / rate - run_in_seconds) / stream.time_base))
    for frame in frames_from(medium, container, stream, first / rate, decoded, run_in_seconds):
        if frame.sample_rate != rate:
            raise MediaError(f"{medium.name}: the sound's rate changes from {rate} to {frame.sample_rate} Hz")
        stamped = round(frame.pts * samples_per_tick) if frame.pts is not None else position or 0
        if position is None or abs(stamped - position) > _AUDIO_JUMP_SECONDS * rate:
            position = stamped
        kept_from, kept_to = max(position, first), min(position + frame.samples, first + len(native))
        if kept_from < kept_to:
            native[kept_from - first : kept_to - first] = mono(frame)[kept_from - position : kept_to - position]
            heard_from, heard_to = min(heard_from, kept_from - first), max(heard_to, kept_to - first)
        position += frame.samples
        if position >= first + len(native):
            break
    _limit(native)
    if up != down:
        native = soxr.resample(native, rate, sample_rate_hz)
        _limit(native)
        # Remove the ringing of the filter before and after the audio.
        native[: heard_from * up // down] = 0
        native[math.ceil(heard_to * up / down) :] = 0
    return native[periods * up : periods * up + sample_count].copy(), begin / rate


def _decoded(container: InputContainer, stream: AudioStream, begin: int) -> Iterator[AudioFrame]:
    """Decode from the last packet that starts at or before the tick ``begin``, or from the current position.

    The time stamp of the first frame determines the position of the audio. So it must not depend on what was read
    before: neither on where a seek lands, nor on whether the decoder is new. (The first packet of a new decoder,
    whichever it is, loses the encoder delay, and Matroska then rounds the time stamp to another millisecond.)
    """
    codec = stream.codec_context
    before: Packet[AudioStream] | None = None
    started = False
    for packet in container.demux(stream):
        if not codec.is_open:
            with suppress(av.FFmpegError):
                packet.decode()
            codec.flush_buffers()
        if not started:
            if packet.size and packet.pts is not None and packet.pts <= begin:
                before = packet
                continue
            started = True
            if before is not None:
                yield from before.decode()
        yield from packet.decode()


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
