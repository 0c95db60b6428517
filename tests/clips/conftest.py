"""Small media files whose every frame and sample says what time it is."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

BITS = 12  # 4 x 3 blocks of black or white: the frame's own number
WIDTH, HEIGHT = 64, 48
START_HZ, SWEEP_HZ_PER_SECOND = 300.0, 500.0


def chirp(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sound of every file as a function of time: its frequency tells the time, and it is known at any rate."""
    return 0.5 * np.sin(2 * np.pi * (START_HZ + SWEEP_HZ_PER_SECOND / 2 * seconds) * seconds)


def stamp(number: int) -> NDArray[np.uint8]:
    """A picture (48, 64, 3) that holds ``number`` in twelve bits; blocks survive H.264 and scaling."""
    bits = (number >> np.arange(BITS)) & 1
    picture = np.kron(bits.reshape(3, 4), np.ones((16, 16))) * 200 + 25
    return np.repeat(picture.astype(np.uint8)[..., None], 3, axis=2)


def read_stamps(frames: NDArray[np.uint8]) -> list[int]:
    """The numbers in frames (T, height, width, 3) of any size."""
    height, width = frames.shape[1:3]
    rows, columns = (np.arange(3) * 2 + 1) * height // 6, (np.arange(4) * 2 + 1) * width // 8
    bits = frames[:, rows[:, None], columns, 1].reshape(len(frames), BITS) > 128
    return [int(number) for number in bits @ (1 << np.arange(BITS))]


@dataclass(frozen=True)
class Recipe:
    """What to put in a file; codec None leaves the stream out."""

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
    frame_times: tuple[Fraction, ...] | None = None  # for a rate that varies
    rotation: int | None = None
    size: tuple[int, int] | None = None  # height, width of a plain gradient instead of the stamps

    def picture(self, number: int) -> NDArray[np.uint8]:
        """Frame ``number``."""
        if self.size is None:
            return stamp(number)
        height, width = self.size
        red = np.broadcast_to(np.linspace(20, 220, width), (height, width))
        green = np.broadcast_to(np.linspace(20, 220, height)[:, None], (height, width))
        return np.stack([red, green, np.full((height, width), 128.0)], 2).astype(np.uint8)

    def times(self) -> list[Fraction]:
        """When each frame begins, from the first on."""
        return list(self.frame_times or [i / self.fps for i in range(round(self.seconds * self.fps))])


def write_media(recipe: Recipe, path: Path) -> Path:
    """Encode the file; packets are interleaved by time, as cameras and FFmpeg do it."""
    packets = []
    with av.open(str(path), "w") as container:
        if recipe.video_codec:
            video = container.add_stream(recipe.video_codec, rate=recipe.fps)
            height, width = recipe.size or (HEIGHT, WIDTH)
            video.width, video.height = width, height
            video.pix_fmt = "yuvj420p" if recipe.video_codec == "mjpeg" else "yuv420p"
            video.codec_context.thread_count = 1
            video.codec_context.gop_size = recipe.gop
            if recipe.video_codec not in ("mjpeg", "libvpx"):
                video.codec_context.max_b_frames = recipe.b_frames
            if recipe.video_codec == "libx264":
                video.codec_context.options = {
                    "preset": "ultrafast",
                    "crf": "18",
                    "x264-params": f"keyint={recipe.gop}:min-keyint={recipe.gop}:scenecut=0:bframes={recipe.b_frames}",
                }
            elif recipe.video_codec == "mpeg4":
                video.codec_context.bit_rate = 2_000_000
            if recipe.frame_times:
                video.codec_context.time_base = Fraction(1, 1000)
            if recipe.rotation is not None:
                video.set_display_rotation(recipe.rotation)
            base = video.codec_context.time_base or 1 / recipe.fps
            for number, time in enumerate(recipe.times()):
                frame = av.VideoFrame.from_ndarray(recipe.picture(number), format="rgb24")
                frame.pts, frame.time_base = round((time + recipe.video_start) / base), base
                packets += video.encode(frame)
            packets += video.encode(None)
        if recipe.audio_codec:
            rate = recipe.audio_rate_hz
            layout = {1: "mono", 2: "stereo"}[recipe.channels]
            audio = container.add_stream(recipe.audio_codec, rate=rate, layout=layout)
            if not recipe.audio_codec.startswith(("pcm", "flac")):
                audio.codec_context.bit_rate = 160_000 if rate > 32_000 else 64_000
            sound = chirp(np.arange(round(recipe.seconds * rate)) / rate)
            # The two channels differ, their mean is the chirp: a reader that takes one of them is caught.
            shares = np.array([1.0]) if recipe.channels == 1 else np.array([1.4, 0.6])
            samples = (shares[:, None] * sound).astype(np.float32)
            resampler = av.AudioResampler(format=audio.codec_context.format, layout=layout, rate=rate)
            whole = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
            whole.sample_rate, whole.pts, whole.time_base = rate, round(recipe.audio_start * rate), Fraction(1, rate)
            for frame in resampler.resample(whole):
                packets += audio.encode(frame)
            packets += audio.encode(None)
        container.mux(sorted(packets, key=lambda packet: (packet.dts or 0) * (packet.time_base or 0)))
    return path


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
