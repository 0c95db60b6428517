"""Write films that every browser plays: MP4 with H.264 (yuv420p) and AAC (mono, 48 kHz).

* The index stands before the data (``faststart``), so that a player can begin before it has the whole file.
* The same input gives the same bytes: encoders run on one thread, and no dates are written.
* A keyframe every two seconds lets a reader jump in a film.
"""

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain, repeat
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from av.audio.stream import AudioStream
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from cmacc.clips.clip import MediaError
from cmacc.clips.media.container import LONGEST_SECONDS
from cmacc.clips.media.decoding import OpenFile, open_source
from cmacc.clips.media.frames import even_size, upright
from cmacc.clips.storage import PackedSample

FILM_SOUND_RATE_HZ = 48_000
"""Sample rate of the sound of films."""
_SOUND_BITS_PER_SECOND = 96_000
_KEYFRAME_SECONDS = 2
_CHUNK_SECONDS = 60  # of sound in memory; whole seconds, so that chunks join without a seam at any sample rate
_FRAME_RATES_HZ = (5.0, 30.0)  # slower ones would let the last picture stay for long, faster ones show no more
_FINEST_RATE = 1001  # denominator of a frame rate, as in 30000/1001
# On processors with AVX-512, x264 reads memory that it has not written where it weighs blocks by how much later
# pictures use them: a film of 48 px then had other bytes in one of four runs. Without, films of real clips are 10 to
# 20 % larger, and a little nearer.
_X264 = "mbtree=0"
_MUXER = {
    "movflags": "+faststart",
    "fflags": "+bitexact",  # no dates and versions
    "max_interleave_delta": "0",  # wait for pictures, however much sound was given before them
}


class FilmWriter:
    """Encodes frames and sound into one .mp4 file; a context manager, which completes the file.

    Parameters
    ----------
    path
        File to write, under any name.
    frame_rate_hz
        Frames per second.
    short_side_pixels
        Short side of the picture; smaller ones keep their size. None: the size of the first frame.
    crf
        Constant rate factor of x264, 0 to 51; lower is better and larger.
    pixel_aspect
        Width over height of a pixel, if it is not square, as on a DVD.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "film.mp4"
    ...     with FilmWriter(path, frame_rate_hz=10.0) as film:
    ...         film.add([VideoFrame(96, 64, "rgb24") for _ in range(10)], np.zeros(48_000, np.float32))
    ...     path.read_bytes()[4:8]
    b'ftyp'
    """

    def __init__(
        self,
        path: Path,
        *,
        frame_rate_hz: Fraction | float,
        short_side_pixels: int | None = None,
        crf: int = 23,
        pixel_aspect: Fraction | None = None,
    ) -> None:
        self._rate = Fraction(frame_rate_hz).limit_denominator(_FINEST_RATE)
        self._short_side, self._crf, self._pixel_aspect = short_side_pixels, crf, pixel_aspect
        self._scaler = VideoReformatter()
        self._frames = self._samples = 0
        self._video: VideoStream | None = None
        self._audio: AudioStream | None = None
        self._file = av.open(str(path), "w", format="mp4", options=_MUXER)

    def add(self, frames: Iterable[VideoFrame], waveform: NDArray[np.float32] | None) -> None:
        """Add pictures and their sound. The first call decides whether the film has either.

        Parameters
        ----------
        frames
            Frames in any format, shown for one period of the frame rate each; none for sound alone.
        waveform
            ``(samples,)`` mono in [-1, 1] at `FILM_SOUND_RATE_HZ`; None for pictures alone.
        """
        remaining = iter(frames)
        first = next(remaining, None)
        if not (self._frames or self._samples):
            self._begin(first, waveform)
        if self._audio is not None and waveform is not None:
            sound = av.AudioFrame.from_ndarray(np.ascontiguousarray(waveform[None]), format="fltp", layout="mono")
            sound.sample_rate, sound.time_base = FILM_SOUND_RATE_HZ, Fraction(1, FILM_SOUND_RATE_HZ)
            sound.pts = self._samples
            self._samples += len(waveform)
            self._file.mux(self._audio.encode(sound))
        if self._video is not None and first is not None:
            for frame in chain([first], remaining):
                self._add_frame(self._video, frame)

    def _begin(self, first: VideoFrame | None, waveform: NDArray[np.float32] | None) -> None:
        if first is not None:
            options = {"preset": "veryfast", "crf": str(self._crf), "x264-params": _X264}
            self._video = video = self._file.add_stream("libx264", rate=self._rate, options=options)
            short_side = self._short_side or min(first.height, first.width)
            video.height, video.width = even_size(first.height, first.width, short_side)
            video.pix_fmt = "yuv420p"
            codec = video.codec_context
            codec.time_base = 1 / self._rate
            codec.thread_count = 1
            codec.gop_size = max(1, round(_KEYFRAME_SECONDS * self._rate))
            if self._pixel_aspect is not None:
                codec.sample_aspect_ratio = self._pixel_aspect
            # Unless it is stated, players guess the colour matrix from the size.
            codec.colorspace, codec.color_range = Colorspace.ITU601, ColorRange.MPEG
        if waveform is not None:
            self._audio = self._file.add_stream(
                "aac", rate=FILM_SOUND_RATE_HZ, layout="mono", bit_rate=_SOUND_BITS_PER_SECOND
            )

    def _add_frame(self, video: VideoStream, frame: VideoFrame) -> None:
        picture = self._scaler.reformat(
            frame,
            video.width,
            video.height,
            "yuv420p",
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=ColorRange.MPEG,
            interpolation="AREA" if video.width < frame.width else "BILINEAR",
            threads=1,
        )
        picture.pts, picture.time_base = self._frames, 1 / self._rate
        picture.pict_type = PictureType.NONE  # do not copy the original's keyframes
        self._frames += 1
        self._file.mux(video.encode(picture))

    def __enter__(self) -> "FilmWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:  # closed, whatever happens
            if kind is None:
                for stream in (self._video, self._audio):
                    if stream is not None:
                        self._file.mux(stream.encode(None))


def encode_part(
    source: Path | str | PackedSample,
    start_seconds: float,
    end_seconds: float,
    *,
    short_side_pixels: int | None = 480,
    frame_rate_hz: float | None = None,
) -> bytes:
    """A part of a file as an .mp4 that every browser plays, with the index in front.

    The part is cut to the ends of the file. A silent video has no audio stream, a file without video no video stream.
    Memory holds a minute of sound, and one frame at a time.

    Parameters
    ----------
    source
        A file, or a sample of a packed shard (``record.source``).
    start_seconds, end_seconds
        The half-open part. Time starts at the first frame (or at the first audio sample, without video).
    short_side_pixels
        Short side of the picture; smaller ones keep their size. None: the sound alone.
    frame_rate_hz
        Frames per second. Default: those of the file, but at least 5 and at most 30. Each frame is the one on display
        in the middle of its slot, as in a `Clip`.

    Returns
    -------
    bytes
        The same for the same input, on one machine.

    Raises
    ------
    MediaError
        The file is missing, does not decode, or lies outside the part; or the sound alone is wanted and there is none.
    ValueError
        A number is outside its range.

    Examples
    --------
    >>> import tempfile
    >>> from cmacc.clips.synthetic import WorldConfig, write_clip
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_clip(WorldConfig(frame_size=32), 0, Path(folder) / "clip.mp4")
    ...     film = encode_part(Path(folder) / "clip.mp4", 0.5, 1.5, short_side_pixels=32)
    >>> film[4:8]
    b'ftyp'
    """
    if not start_seconds < end_seconds or not math.isfinite(end_seconds - start_seconds):
        raise ValueError(f"encode_part: end_seconds must be after start_seconds, got {start_seconds} to {end_seconds}")
    if short_side_pixels is not None and short_side_pixels < 2:
        raise ValueError(f"encode_part: short_side_pixels must be at least 2, got {short_side_pixels}")
    if frame_rate_hz is not None and not 1 <= frame_rate_hz <= 240:
        raise ValueError(f"encode_part: frame_rate_hz must be in [1, 240], got {frame_rate_hz}")
    with tempfile.TemporaryDirectory() as folder, open_source(source) as file:
        start, end = _within(file, start_seconds, end_seconds)
        if short_side_pixels is None and not file.has_audio:
            raise MediaError(f"{file.name}: has no sound")
        video = file.video if short_side_pixels is not None else None
        rate = _rate(video, frame_rate_hz)
        out = Path(folder) / "part.mp4"  # a file, because the index is moved to its front at the end
        aspect = video.sample_aspect_ratio if video is not None else None
        with FilmWriter(out, frame_rate_hz=rate, short_side_pixels=short_side_pixels, pixel_aspect=aspect) as film:
            for frames, waveform in _chunks(file, start, end, rate, video is not None):
                film.add(frames, waveform)
        return out.read_bytes()


def _within(file: OpenFile, start: float, end: float) -> tuple[float, float]:
    """The part, cut to the ends of the file."""
    length = file.duration_seconds()
    if not 0 < length <= LONGEST_SECONDS:
        raise MediaError(f"{file.name}: the file states no duration and holds no time stamps")
    if end <= 0 or start >= length:
        raise MediaError(f"{file.name}: a part must lie within its {length:.3f} s, got {start:.3f} to {end:.3f} s")
    return max(start, 0.0), min(end, length)


def _rate(video: VideoStream | None, wanted_hz: float | None) -> Fraction:
    own = (video.average_rate or video.guessed_rate) if video is not None else None
    slowest, fastest = _FRAME_RATES_HZ
    return Fraction(wanted_hz or min(max(slowest, float(own or 25)), fastest)).limit_denominator(_FINEST_RATE)


def _chunks(
    file: OpenFile, start: float, end: float, rate: Fraction, has_picture: bool
) -> Iterator[tuple[Iterator[VideoFrame], NDArray[np.float32] | None]]:
    """Frames and sound of a minute each. The sound is read first: the frames follow only as they are asked for."""
    times = start + (np.arange(max(1, round((end - start) * rate))) + 0.5) / float(rate)
    for number in range(math.ceil((end - start) / _CHUNK_SECONDS)):
        begin = start + number * _CHUNK_SECONDS
        seconds = min(end - begin, _CHUNK_SECONDS)
        samples = max(1, round(seconds * FILM_SOUND_RATE_HZ))
        waveform = file.sound(begin, samples, FILM_SOUND_RATE_HZ) if file.has_audio else None
        own = times[(times - start) // _CHUNK_SECONDS == number] if has_picture else times[:0]
        yield _upright_frames(file, own.tolist()), waveform


def _upright_frames(file: OpenFile, times: Sequence[float]) -> Iterator[VideoFrame]:
    for frame, count in file.frames_shown(times) if times else ():
        yield from repeat(upright(frame), count)
