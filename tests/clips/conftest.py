"""Small media files whose every frame and sample says what time it is."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pytest
from numpy.typing import NDArray

BITS = 12  # 4 x 3 blocks of black or white: the frame's own number
WIDTH, HEIGHT = 64, 48
START_HZ, SWEEP_HZ_PER_SECOND = 300.0, 500.0
# Of the clicks: about 10 a second at intervals that never repeat, so that a shift by any number of them shows.
CLICK_TIMES = 0.055 + 0.1 * np.arange(60) + 0.04 * (np.arange(60) * 0.618034 % 1)
CLICK_SECONDS = 0.0002  # standard deviation: nothing above 3 kHz, which 8 kHz sound still holds
# The channels differ, their mean is the sound: a reader that takes one of them is caught. The low-frequency channel of
# 5.1, which lossy encoders filter, is silent.
CHANNEL_SHARES = {1: (1.0,), 2: (1.4, 0.6), 6: (1.9, 0.5, 1.5, 0.0, 1.3, 0.8)}


def chirp(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sound of every file as a function of time: its frequency tells the time, and it is known at any rate."""
    return 0.5 * np.sin(2 * np.pi * (START_HZ + SWEEP_HZ_PER_SECOND / 2 * seconds) * seconds)


def after_click(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """How long after the nearest click each time is."""
    between = (CLICK_TIMES[1:] + CLICK_TIMES[:-1]) / 2
    return seconds - CLICK_TIMES[np.searchsorted(between, seconds)]


def clicks(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Short band-limited clicks as a function of time: their place can be read from a small part of the sound."""
    after = after_click(seconds) / CLICK_SECONDS
    sound = np.zeros(len(seconds))
    near = np.abs(after) < 8
    sound[near] = 0.5 * np.exp(-(after[near] ** 2) / 2)
    return sound


def stamp(number: int, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """A picture (height, width, 3) that holds ``number`` in twelve bits; blocks survive H.264 and scaling."""
    bits = ((number >> np.arange(BITS)) & 1).reshape(3, 4)
    rows, columns = np.arange(height) * 3 // height, np.arange(width) * 4 // width
    picture = (bits[rows[:, None], columns] * 200 + 25).astype(np.uint8)
    return np.repeat(picture[..., None], 3, axis=2)


def read_stamps(frames: NDArray[np.uint8]) -> list[int]:
    """The numbers in frames (T, height, width, 3) of any size."""
    height, width = frames.shape[1:3]
    rows, columns = (np.arange(3) * 2 + 1) * height // 6, (np.arange(4) * 2 + 1) * width // 8
    bits = frames[:, rows[:, None], columns, 1].reshape(len(frames), BITS) > 128
    return [int(number) for number in bits @ (1 << np.arange(BITS))]


@dataclass(frozen=True)
class Recipe:
    """What to put in a file; codec None skips the stream."""

    suffix: str = ".mp4"
    fps: Fraction = Fraction(25)
    seconds: float = 4.0
    gop: int = 12
    b_frames: int = 2
    video_codec: str | None = "libx264"
    audio_codec: str | None = "aac"
    audio_rate_hz: int = 44_100
    channels: int = 1
    video_start: Fraction = Fraction(0)  # place of the first frame on the file's clock, seconds
    audio_start: Fraction = Fraction(0)
    frame_times: tuple[Fraction, ...] | None = None  # for a rate that varies; equal ones need a codec without B-frames
    rotation: int | None = None
    size: tuple[int, int] | None = None  # height, width of a plain gradient instead of the stamps
    stamp_size: tuple[int, int] = (HEIGHT, WIDTH)
    pixel_format: str | None = None
    video_options: tuple[tuple[str, str], ...] = ()  # of the encoder; x264-params and x265-params are added to ours
    mux_options: tuple[tuple[str, str], ...] = ()
    cut_seconds: Fraction = Fraction(0)  # the video's edit list (one is in every .mp4) skips so much
    sound: Literal["chirp", "clicks"] = "chirp"
    sound_seconds: float | None = None  # where not as long as the picture
    sample_format: str | None = None
    audio_options: tuple[tuple[str, str], ...] = ()

    def picture(self, number: int) -> NDArray[np.uint8]:
        """Frame ``number``."""
        if self.size is None:
            return stamp(number, *self.stamp_size)
        height, width = self.size
        red = np.broadcast_to(np.linspace(20, 220, width), (height, width))
        green = np.broadcast_to(np.linspace(20, 220, height)[:, None], (height, width))
        return np.stack([red, green, np.full((height, width), 128.0)], 2).astype(np.uint8)

    def times(self) -> list[Fraction]:
        """When each frame begins, from the first on."""
        return list(self.frame_times or [i / self.fps for i in range(round(self.seconds * self.fps))])


@contextmanager
def _scheduling_kept() -> Iterator[None]:
    """For root, SVT-AV1 puts the thread that opens it under real-time scheduling, and so all that the thread starts.

    Two processes of four that train on two cores then starved everything else on the machine.
    """
    if sys.platform != "linux":
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def write_media(recipe: Recipe, path: Path) -> Path:
    """Encode the file; packets are interleaved by time, as cameras and FFmpeg do it."""
    packets = []
    with _scheduling_kept(), av.open(str(path), "w", options=dict(recipe.mux_options)) as container:
        if recipe.video_codec:
            video = container.add_stream(recipe.video_codec, rate=recipe.fps)
            height, width = recipe.size or recipe.stamp_size
            video.width, video.height = width, height
            video.pix_fmt = recipe.pixel_format or ("yuvj420p" if recipe.video_codec == "mjpeg" else "yuv420p")
            video.codec_context.thread_count = 1
            video.codec_context.gop_size = recipe.gop
            if recipe.video_codec in ("libx264", "libx265", "mpeg4", "mpeg2video"):
                video.codec_context.max_b_frames = recipe.b_frames
            given = dict(recipe.video_options)
            if recipe.video_codec in ("libx264", "libx265"):
                params = f"keyint={recipe.gop}:min-keyint={recipe.gop}:scenecut=0:bframes={recipe.b_frames}"
                name = recipe.video_codec[3:] + "-params"
                if recipe.video_codec == "libx265":
                    params += ":log-level=none:pools=none:frame-threads=1"
                given[name] = f"{params}:{given[name]}" if name in given else params
                given = {"preset": "ultrafast", "crf": "18"} | given
            elif recipe.video_codec in ("mpeg4", "mpeg2video"):
                video.codec_context.bit_rate = 2_000_000
            video.codec_context.options = given
            if recipe.frame_times:
                video.codec_context.time_base = Fraction(1, 1000)
            if recipe.rotation is not None:
                video.set_display_rotation(recipe.rotation)
            base = video.codec_context.time_base or 1 / recipe.fps
            has_equal_times = len(set(recipe.times())) < len(recipe.times())
            for number, time in enumerate(recipe.times()):
                frame = av.VideoFrame.from_ndarray(recipe.picture(number), format="rgb24")
                frame.pts, frame.time_base = round((time + recipe.video_start) / base), base
                if has_equal_times:
                    frame.pts = number
                packets += video.encode(frame)
            packets += video.encode(None)
            if has_equal_times:  # encoders refuse them
                for packet, time in zip(packets, recipe.times(), strict=True):
                    packet.pts = packet.dts = round((time + recipe.video_start) / base)
        if recipe.audio_codec:
            rate = recipe.audio_rate_hz
            layout = {1: "mono", 2: "stereo", 6: "5.1"}[recipe.channels]
            audio = container.add_stream(recipe.audio_codec, rate=rate, layout=layout)
            audio.codec_context.options = dict(recipe.audio_options)
            if recipe.sample_format:
                audio.codec_context.format = recipe.sample_format
            if not recipe.audio_codec.startswith(("pcm", "flac")):
                audio.codec_context.bit_rate = (160_000 if rate > 32_000 else 64_000) * max(1, recipe.channels // 2)
            places = np.arange(round((recipe.sound_seconds or recipe.seconds) * rate)) / rate
            sound = chirp(places) if recipe.sound == "chirp" else clicks(places)
            samples = (np.array(CHANNEL_SHARES[recipe.channels])[:, None] * sound).astype(np.float32)
            resampler = av.AudioResampler(format=audio.codec_context.format, layout=layout, rate=rate)
            whole = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
            whole.sample_rate, whole.pts, whole.time_base = rate, round(recipe.audio_start * rate), Fraction(1, rate)
            for frame in resampler.resample(whole):
                packets += audio.encode(frame)
            packets += audio.encode(None)
        container.mux(sorted(packets, key=lambda packet: (packet.dts or 0) * (packet.time_base or 0)))
    if recipe.cut_seconds:
        _cut_by_edit_list(path, recipe.cut_seconds)
    return path


def _cut_by_edit_list(path: Path, seconds: Fraction) -> None:
    """Let the one entry of the first track's edit list begin so much later and be so much shorter."""
    data = bytearray(path.read_bytes())

    def number(place: int) -> int:
        return int.from_bytes(data[place : place + 4], "big")

    movie_rate = number(data.index(b"mvhd") + 16)
    track = data.index(b"trak")
    entry, media_rate = data.index(b"elst", track) + 12, number(data.index(b"mdhd", track) + 16)
    assert number(entry - 4) == 1
    data[entry : entry + 4] = (number(entry) - round(seconds * movie_rate)).to_bytes(4, "big")
    data[entry + 4 : entry + 8] = (number(entry + 4) + round(seconds * media_rate)).to_bytes(4, "big")
    path.write_bytes(data)


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """Give the path of a recipe's file; equal recipes share one file, which no test may change."""
    folder = tmp_path_factory.mktemp("media")
    made: dict[Recipe, Path] = {}

    def make(recipe: Recipe) -> Path:
        if recipe not in made:
            made[recipe] = write_media(recipe, folder / f"{len(made)}{recipe.suffix}")
        return made[recipe]

    return make
