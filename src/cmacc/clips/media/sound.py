"""The sound's half of a clip: exactly the asked samples, mono, at the asked rate.

Sound is placed by counting samples from the first decoded frame, not by each frame's time stamp: Matroska rounds stamps
to 1 ms and AVI to a whole frame, and placing by them would click at every frame border. Only a jump of more than
``_AUDIO_JUMP_SECONDS`` is believed.
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
# AAC and Vorbis need a frame or two of run-in before what they give after a seek is right.
_AUDIO_RUN_IN_SECONDS = 0.15
# A frame of MP3 may begin in the bytes of those before it (the bit reservoir, up to 511 bytes, a quarter of a second at
# low bit rates): without them it decodes to silence.
_MP3_RUN_IN_SECONDS = 0.4
# Beyond it the resampler's answer no longer depends on what was cut off: below 1e-5 of full scale.
_RESAMPLE_MARGIN_SECONDS = 0.02


def read_sound(
    medium: Medium,
    container: InputContainer,
    stream: AudioStream,
    start_seconds: float,
    sample_count: int,
    sample_rate_hz: int,
) -> tuple[NDArray[np.float32], float]:
    """Decode ``sample_count`` mono samples from ``start_seconds`` on; zeros where the stream has none.

    Parameters
    ----------
    medium, container, stream
        The open file.
    start_seconds
        On the stream's own clock.
    sample_count, sample_rate_hz
        What is asked for.

    Returns
    -------
    ``(sample_count,)`` in [-1, 1], the mean of all channels; and the time of the first of them, which is that of a
    whole sample of the source: at most half of one from ``start_seconds``.

    Raises
    ------
    MediaError
        The stream's rate changes on the way.
    """
    assert stream.time_base is not None
    rate = stream.codec_context.sample_rate
    divisor = math.gcd(sample_rate_hz, rate)
    up, down = sample_rate_hz // divisor, rate // divisor
    # A margin of whole resampling periods on both sides keeps the filter's edges out of the clip.
    periods = math.ceil(_RESAMPLE_MARGIN_SECONDS * sample_rate_hz / up) if up != down else 0
    native = np.zeros(math.ceil(sample_count / up) * down + 2 * periods * down, np.float32)
    begin = round(start_seconds * rate)
    first = begin - periods * down  # index of native[0], counted from the clock's zero
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
        # The filter rings before the sound and after it, where there is nothing to hear.
        native[: heard_from * up // down] = 0
        native[math.ceil(heard_to * up / down) :] = 0
    return native[periods * up : periods * up + sample_count].copy(), begin / rate


def _decoded(container: InputContainer, stream: AudioStream, begin: int) -> Iterator[AudioFrame]:
    """Decode from the last packet on that begins at or before the tick ``begin``, else from where the container stands.

    The sound is placed by the stamp of its first frame, which must depend on neither of two things that what was read
    before changes: where a seek lands, and whether the decoder is new (the first packet that a new one gets, whichever
    it is, loses the encoder's delay; Matroska then rounds the stamp to another millisecond).
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
    """Cut to [-1, 1] in place: lossy and floating-point sound may be beyond it, and in damaged files be no number."""
    if not -1 <= sound.min() <= sound.max() <= 1:
        np.nan_to_num(sound, copy=False, nan=0.0, posinf=1.0, neginf=-1.0)
        np.clip(sound, -1, 1, out=sound)


def mono(frame: AudioFrame) -> NDArray[np.float32]:
    """Mean of the channels as float in [-1, 1], ``(samples,)``."""
    if frame.format.name == "fltp":  # what most decoders give; per frame, PyAV's own way costs four times as much
        channels = [np.frombuffer(memoryview(plane), np.float32, frame.samples) for plane in frame.planes]
        return channels[0] if len(channels) == 1 else np.asarray(np.add.reduce(channels) / np.float32(len(channels)))
    if frame.format.name in ("s16", "s16p") and len(frame.layout.channels) == 1:  # what packed sound gives
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
