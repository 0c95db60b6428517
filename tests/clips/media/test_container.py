"""Which streams are read, how long they are, and reading where a container cannot seek, as in FFmpeg's players.

The files are made here, each of a kind that people have and that was once misread.
"""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from numpy.typing import NDArray
from PIL import Image

from cmacc.clips.clip import ClipSpec
from cmacc.clips.media.container import Medium, streams
from cmacc.clips.media.decoding import decode_clip, probe
from cmacc.clips.media.sound import mono
from cmacc.clips.packing.transcode import PackSettings, transcode

from ..conftest import HEIGHT, WIDTH, chirp, read_stamps, stamp

FPS, RATE = 25, 48_000


class Pipe:
    """Takes what is written and cannot go back, so that headers are never completed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def write(self, data: bytes) -> int:
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()


def tone(hz: float, seconds: float) -> NDArray[np.float64]:
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE)) / RATE)


def write(
    path: Path,
    seconds: float | None,
    sounds: Sequence[NDArray[np.float64]] = (),
    *,
    codecs: tuple[str, str] = ("libx264", "aac"),
    marks: Sequence[Disposition] = (),
    cover: bool = False,
    pipe: bool = False,
    container_format: str | None = None,
    audio_options: dict[str, str] | None = None,
) -> Path:
    """A file of stamped pictures (none for None), of sounds with their dispositions, and maybe of a cover picture."""
    target = Pipe(path) if pipe else str(path)
    packets = []
    with av.open(target, "w", format=container_format) as container:
        jpeg = io.BytesIO()
        Image.new("RGB", (32, 32), "red").save(jpeg, "JPEG")
        if cover and path.suffix == ".mka":  # Matroska keeps covers as attached files
            container.add_attachment("cover.jpg", "image/jpeg", jpeg.getvalue())
        elif cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 32, 32, "yuvj420p"
            picture.disposition = Disposition.attached_pic
        if seconds is not None:
            video = container.add_stream(codecs[0], rate=FPS)
            video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            video.codec_context.thread_count = 1
            for number in range(round(seconds * FPS)):
                frame = av.VideoFrame.from_ndarray(stamp(number), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, FPS)
                packets += video.encode(frame)
            packets += video.encode(None)
        for place, sound in enumerate(sounds):
            audio = container.add_stream(codecs[1], rate=RATE, layout="mono")
            audio.codec_context.options = audio_options or {}
            if place < len(marks):
                audio.disposition = marks[place]
            whole = av.AudioFrame.from_ndarray(sound.astype(np.float32)[None], format="fltp", layout="mono")
            whole.sample_rate, whole.pts, whole.time_base = RATE, 0, Fraction(1, RATE)
            for part in av.AudioResampler(audio.codec_context.format, "mono", RATE).resample(whole):
                packets += audio.encode(part)
            packets += audio.encode(None)
        if cover and path.suffix != ".mka":
            packet = av.Packet(jpeg.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = picture, 0, 0, Fraction(1, 1)
            container.start_encoding()
            container.mux(packet)
        container.mux(sorted(packets, key=lambda packet: (packet.dts or 0) * (packet.time_base or 0)))
    if isinstance(target, Pipe):
        target.close()
    return path


def heard_hz(path: Path) -> float:
    """The strongest frequency of the sound, which is a tone."""
    wave = decode_clip(path, 0.2, ClipSpec(1, 5.0, 8, 8, 0.5, 8_000)).waveform.numpy()
    return float(np.abs(np.fft.rfft(wave * np.hanning(len(wave)))).argmax() * 8_000 / len(wave))


# ---- which streams --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "container_format", "codec"),
    [(".m4a", "mp4", "aac"), (".mp3", "mp3", "libmp3lame"), (".flac", "flac", "flac"), (".mka", "matroska", "aac")],
)
def test_a_cover_is_no_video(tmp_path: Path, suffix: str, container_format: str, codec: str) -> None:
    path = tmp_path / f"a{suffix}"
    write(path, None, [tone(440, 1.0)], codecs=("", codec), cover=True, container_format=container_format)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    info = probe(path)
    assert (info.width, info.fps, info.has_audio) == (0, 0.0, True)
    assert info.duration_seconds == pytest.approx(1.0, abs=0.06)
    assert (decode_clip(path, 0.0, ClipSpec(1, 5.0, 8, 8, 0.5)).frames == 0).all()


def test_a_cover_before_the_video_is_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", 1.0, [tone(440, 1.0)], cover=True)
    assert (probe(path).width, probe(path).fps) == (WIDTH, 25.0)
    assert read_stamps(decode_clip(path, 0.0, ClipSpec(2, 12.5, HEIGHT, WIDTH, 0.16)).frames.numpy()) == [1, 3]


NONE, DEFAULT = Disposition(0), Disposition.default


@pytest.mark.parametrize(
    ("suffix", "marks", "chosen"),
    [
        (".mp4", (NONE, DEFAULT), 1),
        (".mp4", (DEFAULT, NONE), 0),
        (".mp4", (NONE, Disposition.dub, DEFAULT), 2),
        (".mkv", (NONE, DEFAULT), 1),
        (".mkv", (Disposition.dub, NONE), 1),
        (".mkv", (Disposition.comment, NONE), 1),
        (".mkv", (Disposition.hearing_impaired, NONE), 1),
        (".mkv", (Disposition.visual_impaired, Disposition.dub, DEFAULT), 2),
        (".mkv", (Disposition.dub, DEFAULT | Disposition.dub), 1),
    ],
)
def test_the_stream_that_players_choose(
    tmp_path: Path, suffix: str, marks: tuple[Disposition, ...], chosen: int
) -> None:
    hz = (440.0, 880.0, 1_760.0)
    path = write(tmp_path / f"a{suffix}", 0.8, [tone(hz[i], 0.8) for i in range(len(marks))], marks=marks)
    assert heard_hz(path) == pytest.approx(hz[chosen], abs=4)
    if chosen == 2:  # the same choice where it is packed
        transcode(path, 0.0, 0.8, PackSettings(), tmp_path / "packed")
        assert heard_hz(tmp_path / "packed.flac") == pytest.approx(hz[chosen], abs=4)


# ---- how long -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(0.8, 2.0), (2.0, 0.8)])
@pytest.mark.parametrize("pipe", [False, True])
@pytest.mark.parametrize(
    ("suffix", "container_format", "codecs"),
    [
        (".mkv", "matroska", ("libx264", "aac")),
        (".webm", "webm", ("libvpx", "libopus")),
        (".flv", "flv", ("flv", "libmp3lame")),
        (".avi", "avi", ("mpeg4", "libmp3lame")),
        (".mts", "mpegts", ("libx264", "ac3")),
        (".vob", "vob", ("mpeg2video", "ac3")),
    ],
)
def test_the_length_is_the_pictures_own(
    tmp_path: Path,
    lengths: tuple[float, float],
    pipe: bool,
    suffix: str,
    container_format: str,
    codecs: tuple[str, str],
) -> None:
    path = write(
        tmp_path / f"a{suffix}",
        lengths[0],
        [tone(440, lengths[1])],
        codecs=codecs,
        pipe=pipe,
        container_format=container_format,
    )
    info = probe(path)
    assert info.duration_seconds == pytest.approx(lengths[0], abs=0.041)  # AVI repeats a frame where encoders delay
    assert (info.fps, info.has_audio) == (25.0, True)


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [(".aac", "aac", {}), (".ac3", "ac3", {}), (".mp3", "libmp3lame", {"flags": "qscale", "global_quality": "472"})],
)
def test_bare_audio_of_uneven_bit_rate_is_as_long_as_its_packets(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str]
) -> None:
    """FFmpeg guesses from the first packets' bit rate."""
    sound = np.concatenate([tone(440, 2.0), np.random.default_rng(0).normal(0, 0.2, RATE)])
    path = write(
        tmp_path / f"a{suffix}", None, [sound], codecs=("", codec), pipe=True,
        container_format={".aac": "adts"}.get(suffix, suffix[1:]), audio_options=options,
    )  # fmt: skip
    assert probe(path).duration_seconds == pytest.approx(3.0, abs=0.06)


# ---- where a container cannot seek ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "container_format", "codecs", "pipe"),
    [
        (".flv", "flv", ("flv", "libmp3lame"), False),
        (".flv", "flv", ("flv", "libmp3lame"), True),
        (".mkv", "matroska", ("libx264", "ac3"), True),
        (".vob", "vob", ("mpeg2video", "ac3"), False),
        (".aac", "adts", (None, "aac"), False),
        (".ac3", "ac3", (None, "ac3"), False),
        (".mp3", "mp3", (None, "libmp3lame"), True),
    ],
)
def test_a_later_window_equals_decoding_from_the_beginning(
    tmp_path: Path, suffix: str, container_format: str, codecs: tuple[str | None, str], pipe: bool
) -> None:
    seconds = 4.0
    path = write(
        tmp_path / f"a{suffix}",
        None if codecs[0] is None else seconds,
        [chirp(np.arange(round(seconds * RATE)) / RATE)],
        codecs=(codecs[0] or "", codecs[1]),
        pipe=pipe,
        container_format=container_format,
        audio_options={"flags": "qscale", "global_quality": "472"} if codecs[1] == "libmp3lame" and pipe else None,
    )
    with Medium.file(path).open() as container:
        video, audio = streams(container, path.name)
        assert audio is not None
        blocks = list(container.decode(audio))
        begin = float((video or audio).start_time or 0) * float((video or audio).time_base or 0)
    whole, first = np.concatenate([mono(block) for block in blocks]), blocks[0].time or 0.0
    for start in (0.5, 1.7, 3.1):
        clip = decode_clip(path, start, ClipSpec(4, 12.5, HEIGHT, WIDTH, 0.5, RATE))
        if video is not None:
            middles = ClipSpec(4, 12.5, audio_seconds=0.5).frame_times(start)
            assert read_stamps(clip.frames.numpy()) == [int(25 * middle) for middle in middles]
        place = round((start + begin - first) * RATE)
        shifts = range(-48, 49)  # time stamps may be rounded to whole milliseconds
        errors = [np.abs(clip.waveform.numpy() - whole[place + s : place + s + RATE // 2]).max() for s in shifts]
        assert min(errors) < 0.01
