"""The contract of a clip, over every kind of file that can be made here and thousands of random windows.

For any file and any window: exactly T frames, those on show at the asked times, and exactly S samples, each in its
place, both from the file's first picture on; `Clip.frame_seconds` and `Clip.audio_start_seconds` tell the true times.

What containers and FFmpeg allow no better:

* Matroska and WebM round time stamps to 1 ms, MPEG-TS to 11 µs, MP4's edit lists (where compressed sound starts late)
  to 1 ms. Frames whose border is so near to an asked time may fall either way; sound may be off by as much.
* AVI holds no presentation times: there what plain decoding in order gives is the truth.
* An edit list that begins within a frame is moved to the next frame by FFmpeg, and the sound is then early by the
  rest of that frame.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
from av.codec.codec import Codec, UnknownCodecError
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from scipy.io import wavfile

from cmacc.clips.clip import Clip, ClipSpec, MediaError
from cmacc.clips.media import container, frames, sound
from cmacc.clips.media.decoding import decode_clip, decode_clips, probe

from ..conftest import CLICK_SECONDS, HEIGHT, WIDTH, Recipe, after_click, clicks, read_stamps
from .mutants import DAMAGES, mutants, write_sources

Media = Callable[[Recipe], Path]

WINDOWS_PER_FILE = 52
SECONDS = 2.6
FRAME_COUNT = 65  # of a file at the default 25 fps
MILLISECOND = 0.00105

NTSC = Fraction(30_000, 1001)
OPUS = {"audio_codec": "libopus", "audio_rate_hz": 48_000}
PCM = {"audio_codec": "pcm_s16le", "audio_rate_hz": 48_000}
MP2 = {"audio_codec": "mp2", "audio_rate_hz": 48_000}
# Uneven steps, then one frame for 2 s, then stamps 1 ms apart and, at the end, a slow rate.
UNEVEN = tuple(
    Fraction(int(milliseconds), 1000)
    for milliseconds in np.cumsum([0, *[13, 47, 21, 90, 33] * 4, 2000, *[1, 40, 1, 1, 25] * 3, *[150] * 4])
)
# A Matroska file may say twice that a frame begins at one time: the later one is on show.
EQUAL = tuple(Fraction(40 * (i - (i % 5 == 2)), 1000) for i in range(FRAME_COUNT))


def made(suffix: str = ".mp4", **changes: object) -> Recipe:
    """A short file with clicks."""
    recipe = Recipe(suffix, seconds=SECONDS, sound="clicks")
    return dataclasses.replace(recipe, **changes)  # type: ignore[arg-type]


def x264(params: str, **changes: object) -> Recipe:
    return made(video_options=(("x264-params", params),), **changes)


RECIPES = {
    "mp4 no B-frames, 8 kHz": made(b_frames=0, audio_rate_hz=8_000),
    "mp4 2 B-frames, stereo": made(channels=2),
    "mp4 3 B-frames in a pyramid, 5.1": x264(
        "b-pyramid=normal:ref=4:b-adapt=0", b_frames=3, channels=6, audio_rate_hz=48_000
    ),
    "mp4 7 B-frames in a pyramid, one group": x264("b-pyramid=normal:ref=6:b-adapt=0", b_frames=7, gop=250),
    "mp4 open groups": x264("open-gop=1:b-pyramid=normal:ref=4:b-adapt=0", b_frames=3, audio_rate_hz=22_050),
    "mkv open groups": x264("open-gop=1:b-adapt=0", suffix=".mkv", b_frames=2, **PCM),
    "ts open groups": x264("open-gop=1:b-pyramid=normal:ref=4:b-adapt=0", suffix=".ts", b_frames=3),
    "mp4 keyframes only, ntsc, 96 kHz": made(fps=NTSC, gop=1, b_frames=0, audio_rate_hz=96_000),
    "mp4 60 fps, 24 kHz": made(fps=Fraction(60), audio_rate_hz=24_000),
    "mp4 5 fps, 11.025 kHz": made(fps=Fraction(5), b_frames=0, audio_rate_hz=11_025),
    "mp4 fragmented": made(mux_options=(("movflags", "frag_keyframe+empty_moov"),)),
    "mp4 without edit list": made(mux_options=(("use_editlist", "0"),)),
    "mp4 negative composition offsets": made(mux_options=(("movflags", "negative_cts_offsets"),), b_frames=3),
    "mp4 cut by edit list": made(cut_seconds=Fraction(17, 25), audio_rate_hz=16_000),
    "mp4 cut by edit list at a keyframe": made(cut_seconds=Fraction(12, 25)),
    "mp4 cut by edit list, open groups": x264("open-gop=1:b-adapt=0", b_frames=3, cut_seconds=Fraction(17, 25)),
    "mp4 picture before zero": made(video_start=Fraction(-8, 25)),
    "mov sound before zero": made(".mov", audio_start=Fraction(-3, 10), **PCM),
    "mp4 picture late": made(video_start=Fraction(18, 25)),
    "mp4 sound late": made(audio_start=Fraction(1, 2)),
    "mov sound late": made(".mov", audio_start=Fraction(1, 2), **PCM),
    "mkv picture late": made(".mkv", video_start=Fraction(18, 25)),
    "mkv picture before zero": made(".mkv", video_start=Fraction(-8, 25), **PCM),
    "mkv sound late": made(".mkv", audio_start=Fraction(1, 2), **PCM),
    "ts picture late": made(".ts", video_start=Fraction(18, 25)),
    "ts sound late": made(".ts", audio_start=Fraction(1, 2), **MP2),
    "ts clock that wraps around": made(
        ".ts",
        video_start=Fraction(95_442),
        audio_start=Fraction(95_442),
        **MP2,  # 33 bits at 90 kHz end 1.72 s on
    ),
    "mp4 uneven": made(frame_times=UNEVEN, b_frames=0, sound_seconds=4.0),
    "mp4 uneven, B-frames": made(frame_times=UNEVEN, b_frames=3, sound_seconds=4.0),
    "mkv uneven, B-frames": made(".mkv", frame_times=UNEVEN, b_frames=2, sound_seconds=4.0, **PCM),
    "ts uneven": made(".ts", frame_times=UNEVEN, b_frames=0, sound_seconds=4.0, **MP2),
    "mkv equal stamps": made(".mkv", frame_times=EQUAL, video_codec="mjpeg", b_frames=0, **PCM),
    "mp4 hevc": made(video_codec="libx265", b_frames=3, video_options=(("x265-params", "open-gop=0"),)),
    "mp4 hevc open groups": made(video_codec="libx265", b_frames=4, video_options=(("x265-params", "open-gop=1"),)),
    "mkv hevc 10 bit": made(".mkv", video_codec="libx265", b_frames=4, pixel_format="yuv420p10le", **PCM),
    "ts hevc open groups": made(
        ".ts", video_codec="libx265", b_frames=4, video_options=(("x265-params", "open-gop=1"),)
    ),
    "webm vp8": made(".webm", video_codec="libvpx", video_options=(("deadline", "realtime"),), **OPUS),
    "webm vp9 hidden frames": made(
        ".webm",
        video_codec="libvpx-vp9",
        gop=30,
        video_options=(("deadline", "good"), ("cpu-used", "5"), ("lag-in-frames", "16"), ("auto-alt-ref", "1")),
        **OPUS,
    ),
    "mp4 vp9 odd size": made(
        video_codec="libvpx-vp9", stamp_size=(49, 65), video_options=(("deadline", "realtime"), ("cpu-used", "8"))
    ),
    "mkv av1": made(
        ".mkv",
        video_codec="libsvtav1",
        gop=20,
        video_options=(("preset", "10"), ("crf", "4"), ("svtav1-params", "lp=1")),
        **OPUS,
    ),
    "ts mpeg2": made(".ts", video_codec="mpeg2video", **MP2),
    "mpg mpeg2": made(".mpg", video_codec="mpeg2video", **MP2),
    "mkv mpeg4 B-frames, odd size": made(".mkv", video_codec="mpeg4", stamp_size=(49, 65), **PCM),
    "avi mpeg4 B-frames": made(".avi", video_codec="mpeg4", **PCM),
    "avi h264 B-frames": made(".avi", gop=20, **PCM),
    "avi mjpeg, 8-bit sound": made(".avi", video_codec="mjpeg", audio_codec="pcm_u8", audio_rate_hz=11_025, b_frames=0),
    "mkv 4:4:4 odd size, float sound": made(
        ".mkv", pixel_format="yuv444p", stamp_size=(47, 63), audio_codec="pcm_f32le", channels=2
    ),
    "mp4 10 bit": made(pixel_format="yuv420p10le"),
    "mov prores, 24-bit sound": made(
        ".mov", video_codec="prores", pixel_format="yuv422p10le", b_frames=0, audio_codec="pcm_s24le", channels=2
    ),
    "mkv gray ffv1, flac": made(".mkv", video_codec="ffv1", pixel_format="gray", b_frames=0, audio_codec="flac"),
    "mp4 gray": made(pixel_format="gray"),
    "mov rotated": made(".mov", rotation=90, **PCM),
    "mp4 picture only": made(audio_codec=None),
    "wav 8 bit": made(".wav", video_codec=None, audio_codec="pcm_u8", audio_rate_hz=16_000),
    "wav 24 bit 96 kHz 5.1": made(".wav", video_codec=None, audio_codec="pcm_s24le", audio_rate_hz=96_000, channels=6),
    "wav float 11.025 kHz": made(".wav", video_codec=None, audio_codec="pcm_f32le", audio_rate_hz=11_025, channels=2),
    "wav 32 bit 48 kHz": made(".wav", video_codec=None, audio_codec="pcm_s32le", audio_rate_hz=48_000),
    "flac 44.1 kHz 24 bit": made(".flac", video_codec=None, audio_codec="flac", sample_format="s32", channels=2),
    "ogg": made(".ogg", video_codec=None, **OPUS),
    "mp3": made(".mp3", video_codec=None, audio_codec="libmp3lame"),
    "mp3 at a rate that varies": made(
        ".mp3",
        video_codec=None,
        audio_codec="libmp3lame",
        channels=2,
        audio_options=(("flags", "qscale"), ("global_quality", "472")),
    ),
    "m4a": made(".m4a", video_codec=None, audio_rate_hz=22_050),
}


def _can_write(codec: str | None) -> bool:
    try:
        return codec is None or bool(Codec(codec, "w"))
    except UnknownCodecError:
        return False


def with_recipes(names: Sequence[str] = tuple(RECIPES)) -> pytest.MarkDecorator:
    """A test for each; those that this build of FFmpeg has no encoder for are skipped, H.264 is a must."""
    cases = []
    for name in names:
        recipe = RECIPES[name]
        missing = [codec for codec in (recipe.video_codec, recipe.audio_codec) if not _can_write(codec)]
        assert "libx264" not in missing
        cases.append(pytest.param(recipe, id=name, marks=[pytest.mark.skip(f"no encoder: {missing}")] * bool(missing)))
    return pytest.mark.parametrize("recipe", cases)


# ---- what is true of a file -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """What is known of a file from how it was made."""

    starts: NDArray[np.float64]  # of the frames, ascending seconds after the first picture
    numbers: list[int]  # stamped on them
    doubt: float  # seconds by which the container may misplace a frame
    sound_from: float  # seconds after the first picture
    sound_to: float
    sound_zero: float  # where the sound's own time zero is
    sound_tolerance: float  # seconds by which the container may misplace the sound
    noise: float  # how much a sample may be off


LOSSLESS = ("pcm", "flac")


@cache
def truth(recipe: Recipe, path: Path) -> Truth:
    first = recipe.cut_seconds  # content time of the first picture
    if recipe.suffix in (".mp4", ".mov"):  # what is shown before zero is cut, by an edit list
        first = max(first, -recipe.video_start)
    table = [(float(time - first), number) for number, time in enumerate(recipe.times()) if time >= first]
    if recipe.suffix == ".avi":
        table = [(begin, number) for begin, number, _ in plain_frames(path)]
    is_matroska = recipe.suffix in (".mkv", ".webm")
    # What our edit list cuts moves the pictures after it forward.
    shown_from = recipe.video_start + first - recipe.cut_seconds
    zero = float(recipe.audio_start - shown_from) if recipe.video_codec else 0.0
    begin = zero
    if recipe.suffix == ".mov" and recipe.audio_start < 0:
        begin = zero - float(recipe.audio_start)
    compressed = recipe.audio_codec is not None and not recipe.audio_codec.startswith(LOSSLESS)
    tolerance = MILLISECOND if is_matroska or (recipe.audio_start and compressed) else 0.0
    noise = 0.02 if recipe.audio_codec == "pcm_u8" else 0.3 if compressed else 0.03 if tolerance else 0.005
    return Truth(
        starts=np.array([start for start, _ in table]),
        numbers=[number for _, number in table],
        doubt=MILLISECOND if is_matroska else 2e-5,
        sound_from=begin,
        sound_to=zero + (recipe.sound_seconds or recipe.seconds),
        sound_zero=zero,
        sound_tolerance=tolerance,
        noise=noise,
    )


def plain_frames(path: Path) -> list[tuple[float, int, av.VideoFrame]]:
    """When each frame begins after the stream's start, its number and itself, decoded from the beginning to the end."""
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        found = list(container.decode(stream))
        start = float((stream.start_time or 0) * stream.time_base)
    numbers = [read_stamps(frame.to_ndarray(format="rgb24")[None])[0] for frame in found]
    # The order of frames is right; in AVI some of their times come swapped.
    return list(zip(sorted(frame.time - start for frame in found), numbers, found, strict=True))


def slot_middles(spec: ClipSpec, start: float) -> NDArray[np.float64]:
    """The clip's promise (see clip.py), written out again."""
    centre = start + max(spec.frame_count / spec.frame_rate_hz, spec.audio_seconds) / 2
    return centre + (np.arange(spec.frame_count) + 0.5 - spec.frame_count / 2) / spec.frame_rate_hz


def sound_begin(spec: ClipSpec, start: float) -> float:
    return start + max(spec.frame_count / spec.frame_rate_hz, spec.audio_seconds) / 2 - spec.audio_seconds / 2


def random_spec(rng: np.random.Generator, turned: bool = False) -> ClipSpec:
    height, width = (WIDTH, HEIGHT) if turned else (HEIGHT, WIDTH)
    return ClipSpec(
        frame_count=int(rng.integers(1, 21)),
        frame_rate_hz=float(rng.choice([rng.uniform(5, 60), rng.integers(5, 61)])),
        frame_height=height,
        frame_width=width,
        audio_seconds=float(rng.uniform(0.2, 1.5)),
        sample_rate_hz=int(rng.choice([8_000, 16_000, 22_050, 44_100])),
    )


# ---- what a clip must be --------------------------------------------------------------------------------------------


def check_frames(clip: Clip, middles: NDArray[np.float64], known: Truth, recipe: Recipe) -> None:
    """Exactly the frames on show at ``middles``, and when they began."""
    shown = clip.frames.numpy()
    began = clip.frame_seconds.numpy()
    if not recipe.video_codec:
        assert (shown == 0).all()
        assert np.isnan(began).all()
        return
    upright = np.rot90(shown, -(recipe.rotation or 0) // 90, axes=(1, 2))
    numbers = read_stamps(upright)
    places = [known.numbers.index(number) for number in numbers]
    for place, number, middle, start in zip(places, numbers, middles, began, strict=True):
        allowed = {
            known.numbers[max(0, int(np.searchsorted(known.starts, middle + shift, "right")) - 1)]
            for shift in (-known.doubt, 0, known.doubt)
        }
        assert number in allowed, f"at {middle}: {number}, not {allowed}"
        assert abs(start - known.starts[place]) <= known.doubt
        assert start <= middle + 1e-6 or place == 0


def sound_model(places: NDArray[np.float64], known: Truth) -> NDArray[np.float64]:
    """The clicks at ``places``, seconds after the first picture; silence outside the sound."""
    return clicks(places - known.sound_zero) * ((places >= known.sound_from) & (places < known.sound_to))


def check_sound(clip: Clip, wanted: float, spec: ClipSpec, known: Truth, recipe: Recipe) -> int:
    """Every click in its place and nothing else; return how many there were."""
    heard = clip.waveform.numpy().astype(np.float64)
    if not recipe.audio_codec:
        assert (heard == 0).all()
        assert math.isnan(clip.audio_start_seconds)
        return 0
    rate = spec.sample_rate_hz
    assert abs(clip.audio_start_seconds - wanted) <= 0.5 / recipe.audio_rate_hz + 1e-9
    places = clip.audio_start_seconds + np.arange(len(heard)) / rate
    model = sound_model(places, known)
    delay = 0.0
    if known.sound_tolerance:  # found to a sample, then by a straight line like all others
        lags = np.arange(-math.ceil(0.0012 * rate), math.ceil(0.0012 * rate) + 1)
        near = np.flatnonzero(model > 0.01)
        near = near[(near >= len(lags)) & (near < len(heard) - len(lags))]
        delay = float(lags[np.argmax(heard[near + lags[:, None]] @ model[near])]) / rate
        model = sound_model(places - delay, known)
    slope = model * after_click(places - delay - known.sound_zero) / CLICK_SECONDS**2
    if np.abs(model).max() < 0.4:  # no whole click
        assert np.abs(heard - model).max() <= max(known.noise, 0.1)
        return 0
    fit, *_ = np.linalg.lstsq(np.stack([model, slope], 1), heard, rcond=None)
    assert 0.75 < fit[0] < 1.1
    delay += float(fit[1] / fit[0])
    assert abs(delay) <= (known.sound_tolerance or (1 if known.noise == 0.3 else 0.15) / rate) + 1e-9
    assert np.abs(heard - model * fit[0] - slope * fit[1]).max() <= known.noise
    return int((model > 0.4).sum())


def check_clip(clip: Clip, start: float, spec: ClipSpec, known: Truth, recipe: Recipe) -> int:
    assert clip.start_seconds == start
    assert clip.frames.shape == (spec.frame_count, spec.frame_height, spec.frame_width, 3)
    assert clip.waveform.shape == (round(spec.audio_seconds * spec.sample_rate_hz),)
    check_frames(clip, slot_middles(spec, start), known, recipe)
    return check_sound(clip, sound_begin(spec, start), spec, known, recipe)


def assert_equal(one: Clip, other: Clip) -> None:
    np.testing.assert_array_equal(one.frames, other.frames)
    np.testing.assert_array_equal(one.waveform, other.waveform)
    np.testing.assert_array_equal(one.frame_seconds, other.frame_seconds)
    np.testing.assert_array_equal(one.audio_start_seconds, other.audio_start_seconds)


# ---- the contract ---------------------------------------------------------------------------------------------------


@with_recipes()
def test_random_windows_hold_what_was_on_show_and_what_was_to_hear(media: Media, recipe: Recipe) -> None:
    path = media(recipe)
    known = truth(recipe, path)
    end = max(known.sound_to, known.starts[-1] if recipe.video_codec else 0.0)
    rng = np.random.default_rng(0)
    clicks_heard = 0
    for _ in range(WINDOWS_PER_FILE // 4):
        spec = random_spec(rng, turned=recipe.rotation is not None)
        starts = [float(start) for start in rng.uniform(-0.7, end + 0.2, 4)]
        clips = decode_clips(path, starts, spec)
        for start, clip in zip(starts, clips, strict=True):
            clicks_heard += check_clip(clip, start, spec, known, recipe)
        again = int(rng.integers(4))
        assert_equal(decode_clip(path, starts[again], spec), clips[again])
    assert clicks_heard > 200 or not recipe.audio_codec


def test_single_samples_are_given_as_they_are(media: Media) -> None:
    recipe = made(".wav", video_codec=None, audio_codec="pcm_s16le", audio_rate_hz=16_000)
    path = media(recipe)
    whole = clicks(np.arange(round(SECONDS * 16_000)) / 16_000).astype(np.float32)
    rng = np.random.default_rng(0)
    for begin in rng.integers(-4_000, 40_000, 20):
        spec = ClipSpec(1, 5.0, 8, 8, float(rng.integers(3_200, 20_000) / 16_000), 16_000)
        heard = decode_clip(path, begin / 16_000, spec).waveform.numpy()
        wanted = np.zeros(spec.sample_count, np.float32)
        inside = np.arange(spec.sample_count) + begin
        kept = (inside >= 0) & (inside < len(whole))
        wanted[kept] = whole[inside[kept]]
        np.testing.assert_allclose(heard, wanted, atol=1.01 / 32_768)


@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 44_100])
def test_outside_loud_sound_is_silence_to_the_last_sample(media: Media, rate_hz: int) -> None:
    recipe = Recipe(
        ".wav", seconds=0.57, sound="chirp", video_codec=None, audio_codec="pcm_s16le", audio_rate_hz=48_000
    )
    path = media(recipe)
    for start in (-0.3, -0.31234, 0.1, 0.12345):
        clip = decode_clip(path, start, ClipSpec(1, 5.0, 8, 8, 0.6, rate_hz))
        places = clip.audio_start_seconds + np.arange(round(0.6 * rate_hz)) / rate_hz
        outside = (places < -1 / rate_hz) | (places > 0.57 + 1 / rate_hz)
        assert outside.any()
        heard = clip.waveform.numpy()
        assert (heard[outside] == 0).all()
        assert np.abs(heard[~outside]).max() > 0.45


# ---- windows of one file that share what is read ---------------------------------------------------------------------

VORBIS = {"audio_codec": "vorbis", "audio_rate_hz": 44_100, "channels": 2, "audio_options": (("strict", "-2"),)}
OVERLAPPING = {
    "ogg vorbis": made(".ogg", video_codec=None, **VORBIS),
    "webm vorbis": made(".webm", video_codec="libvpx", video_options=(("deadline", "realtime"),), **VORBIS),
    "mka ac3": made(".mka", video_codec=None, audio_codec="ac3", audio_rate_hz=48_000),
    "mka aac": made(".mka", video_codec=None, audio_rate_hz=48_000),
    "ogg": RECIPES["ogg"],
    "mp3": RECIPES["mp3"],
    "mp3 at a rate that varies": RECIPES["mp3 at a rate that varies"],
    "m4a": RECIPES["m4a"],
    "flac": RECIPES["flac 44.1 kHz 24 bit"],
    "wav": RECIPES["wav 32 bit 48 kHz"],
    "mp4 sound late": RECIPES["mp4 sound late"],
    "webm vp8": RECIPES["webm vp8"],
    "ts mpeg2": RECIPES["ts mpeg2"],
    "mpg mpeg2": RECIPES["mpg mpeg2"],
}


@pytest.mark.parametrize("recipe", OVERLAPPING.values(), ids=OVERLAPPING.keys())
def test_overlapping_windows_are_those_decoded_alone(media: Media, recipe: Recipe) -> None:
    path = media(recipe)
    for sample_rate_hz, hop in ((16_000, 0.3123), (recipe.audio_rate_hz, 0.45)):
        spec = ClipSpec(2, 10.0, HEIGHT, WIDTH, 0.5, sample_rate_hz)
        starts = np.arange(-0.7, SECONDS + 0.3, hop).tolist()
        starts += [starts[4], 1.7, 0.3]  # twice, and not in order
        for start, clip in zip(starts, decode_clips(path, starts, spec), strict=True):
            assert_equal(clip, decode_clip(path, start, spec))
        apart = [2.0, 0.1]  # with a gap to skip
        for start, clip in zip(apart, decode_clips(path, apart, spec), strict=True):
            assert_equal(clip, decode_clip(path, start, spec))


@pytest.mark.parametrize(
    ("recipe", "is_decoded_once"),
    [
        (OVERLAPPING["m4a"], True),
        (OVERLAPPING["mp3"], True),
        (OVERLAPPING["ogg vorbis"], True),
        (OVERLAPPING["flac"], True),
        (OVERLAPPING["ogg"], False),  # Opus
        (OVERLAPPING["mka ac3"], False),
    ],
)
def test_a_packet_is_decoded_once_where_that_is_exact(media: Media, recipe: Recipe, is_decoded_once: bool) -> None:
    with av.open(str(media(recipe))) as file:
        stream = file.streams.audio[0]
        assert stream.time_base is not None
        packets = sound._Packets()
        first = {frame.pts: frame for frame in packets.start(file, stream, 0)}
        second = {frame.pts: frame for frame in packets.frames(int(1 / stream.time_base))}
        assert 0 < len(second) < 0.8 * len(first)
        assert all((first[pts] is frame) == is_decoded_once for pts, frame in second.items())
        third = list(packets.frames(int(2 / stream.time_base)))
        assert 0 < len(third) < len(second)
        assert len(packets._kept) <= len(third) + 3  # what no later window needs is given up


def test_a_file_that_cannot_seek_is_read_once_for_all_windows(media: Media, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = media(RECIPES["ogg"]), []
    really = container.Medium.open

    def counted(medium: container.Medium) -> object:
        opened.append(medium.name)
        return really(medium)

    monkeypatch.setattr(container.Medium, "open", counted)
    decode_clips(path, np.arange(0, 2, 0.1).tolist(), ClipSpec(1, 10.0, 8, 8, 0.3))
    assert opened == [str(path)] * 2


# ---- skipping what is not on show -----------------------------------------------------------------------------------

SKIPPING = tuple(name for name, recipe in RECIPES.items() if recipe.video_codec and recipe.rotation is None)
# What nothing refers to is skipped only where there is such a thing, and where stamps say what is on show.
WITHOUT_SKIPPING = (
    "keyframes",
    "no B-frames",
    "11.025",
    "uneven",
    "equal",
    "vp8",
    "vp9",
    "av1",
    "avi",
    "prores",
    "ffv1",
)


@with_recipes(SKIPPING)
def test_skipping_changes_no_pixel(media: Media, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    path = media(dataclasses.replace(recipe, audio_codec=None))
    found = plain_frames(path)
    scaler = VideoReformatter()
    pictures = [frames._scaled(scaler, frame, HEIGHT, WIDTH) for _, _, frame in found]
    starts = np.array([start for start, _, _ in found])
    skipped = []
    plain_is_on_show = frames._is_on_show

    def is_on_show(*about: object) -> bool:
        on_show = plain_is_on_show(*about)  # type: ignore[arg-type]
        skipped.append(not on_show)
        return on_show

    monkeypatch.setattr(frames, "_is_on_show", is_on_show)
    rng = np.random.default_rng(1)
    for _ in range(12):
        spec = ClipSpec(int(rng.integers(1, 13)), float(rng.uniform(2, 30)), HEIGHT, WIDTH, 0.2, 8_000)
        begin = float(rng.uniform(-0.3, starts[-1]))
        clip = decode_clip(path, begin, spec)
        for shown, began in zip(clip.frames.numpy(), clip.frame_seconds.numpy(), strict=True):
            place = int(np.abs(starts - began).argmin())
            near = [number for number in range(len(starts)) if abs(starts[number] - starts[place]) < 1e-9]
            assert any((shown == pictures[number]).all() for number in near), f"{begin}: at {began}"
    assert any(skipped) or recipe.suffix == ".avi"


@pytest.mark.parametrize("name", ["ts open groups", "ts hevc open groups", "ts mpeg2", "ts clock that wraps around"])
def test_sought_without_an_index_far_from_the_beginning(media: Media, name: str) -> None:
    recipe = dataclasses.replace(RECIPES[name], seconds=8.0, sound="chirp", gop=25)
    path = media(recipe)
    found = plain_frames(path)
    pictures = [frames._scaled(VideoReformatter(), frame, HEIGHT, WIDTH) for _, _, frame in found]
    spec = ClipSpec(6, 12.5, HEIGHT, WIDTH, 0.3, 16_000)
    for start in np.random.default_rng(0).uniform(2.5, 7.5, 12):
        clip = decode_clip(path, start, spec)
        for shown, middle in zip(clip.frames.numpy(), slot_middles(spec, start), strict=True):
            assert (shown == pictures[min(199, math.floor(25 * middle))]).all()


@pytest.mark.parametrize("video_codec", ["mpeg4", "libx264"])
def test_index_that_calls_every_frame_a_keyframe(media: Media, tmp_path: Path, video_codec: str) -> None:
    data = bytearray(media(made(".avi", video_codec=video_codec, audio_codec=None, b_frames=0, gop=20)).read_bytes())
    index = data.rindex(b"idx1")
    for place in range(index + 12, len(data) - 3, 16):
        data[place] |= 0x10
    path = tmp_path / "lies.avi"
    path.write_bytes(data)
    found = plain_frames(path)
    pictures = [frames._scaled(VideoReformatter(), frame, HEIGHT, WIDTH) for _, _, frame in found]
    spec = ClipSpec(4, 25.0, HEIGHT, WIDTH, 0.2, 16_000)
    for start in np.arange(0.5, 2.3, 0.2):
        clip = decode_clip(path, float(start), spec)
        for shown, began in zip(clip.frames.numpy(), clip.frame_seconds.numpy(), strict=True):
            assert (shown == pictures[round(25 * (began - found[0][0]))]).all()


# ---- files shorter than the window ----------------------------------------------------------------------------------

SHORT = {
    "sound as long": Recipe(seconds=0.52, sound="clicks", audio_codec="pcm_s16le", suffix=".mov"),
    "sound longer": Recipe(seconds=0.52, sound_seconds=0.9, sound="clicks", audio_codec="pcm_s16le", suffix=".mov"),
    "sound shorter": Recipe(seconds=0.52, sound_seconds=0.3, sound="clicks", audio_codec="pcm_s16le", suffix=".mov"),
    "uneven length, B-frames": Recipe(
        fps=NTSC, seconds=0.4, gop=5, sound="clicks", audio_codec="pcm_s16le", audio_rate_hz=22_050, suffix=".mov"
    ),
    "picture only": Recipe(seconds=0.52, audio_codec=None),
    "one picture": Recipe(seconds=0.04, sound_seconds=0.08, sound="clicks", audio_codec="pcm_s16le", suffix=".mov"),
    "sound only": Recipe(
        ".wav", seconds=0.37, sound="clicks", video_codec=None, audio_codec="pcm_s16le", audio_rate_hz=22_050
    ),
}


@pytest.mark.parametrize("recipe", SHORT.values(), ids=SHORT.keys())
@pytest.mark.parametrize("rate_hz", [16_000, 44_100])
def test_looped_file_repeats_picture_and_sound_together(media: Media, recipe: Recipe, rate_hz: int) -> None:
    path = media(recipe)
    known = truth(recipe, path)
    period = probe(path).duration_seconds
    length = len(recipe.times()) / float(recipe.fps) if recipe.video_codec else recipe.seconds
    assert abs(period - length) <= 0.0005  # .mov states whole milliseconds
    rng = np.random.default_rng(0)
    for start in rng.uniform(-3, 5, 12):
        spec = ClipSpec(
            int(rng.integers(1, 21)), float(rng.uniform(8, 30)), HEIGHT, WIDTH, 1.5, rate_hz, short_files="loop"
        )
        clip = decode_clip(path, start, spec)
        assert clip.frames.shape == (spec.frame_count, HEIGHT, WIDTH, 3)
        assert clip.waveform.shape == (round(1.5 * rate_hz),)
        check_frames(clip, slot_middles(spec, start) % period, known, recipe)
        if not recipe.audio_codec:
            assert (clip.waveform == 0).all()
            continue
        content = (sound_begin(spec, start) + np.arange(spec.sample_count) / rate_hz) % period
        assert abs((clip.audio_start_seconds - content[0] + period / 2) % period - period / 2) <= 0.51 / rate_hz
        # Half a sample on the way in and half of one on the way out; nothing is asked at the seam.
        off = 0.5 / rate_hz + 0.5 / recipe.audio_rate_hz
        away = (content > 0.001) & (content < period - 0.001) & (np.abs(content - known.sound_to) > 0.001)
        models = np.stack([sound_model(content + shift, known) for shift in np.linspace(-off, off, 9)])
        heard = clip.waveform.numpy()
        assert (heard <= models.max(0) + 0.02)[away].all()
        assert (heard >= models.min(0) - 0.02)[away].all()


@pytest.mark.parametrize("recipe", SHORT.values(), ids=SHORT.keys())
def test_padded_file_holds_its_ends(media: Media, recipe: Recipe) -> None:
    path = media(recipe)
    known = truth(recipe, path)
    rng = np.random.default_rng(0)
    for start in rng.uniform(-2, 2, 12):
        spec = random_spec(rng)
        check_clip(decode_clip(path, start, spec), start, spec, known, recipe)


@pytest.mark.parametrize("recipe", SHORT.values(), ids=SHORT.keys())
def test_refused_file_says_how_long_it_must_be(media: Media, recipe: Recipe) -> None:
    path = media(recipe)
    with pytest.raises(MediaError, match=f"{path.name}: must last at least as long as a clip, 1.5 s, got 0.*loop"):
        decode_clip(path, 0.0, ClipSpec(8, 8.0, HEIGHT, WIDTH, 1.5, 16_000, short_files="refuse"))


def test_short_is_what_is_shorter_than_the_window(media: Media) -> None:
    path = media(SHORT["sound as long"])
    spec = ClipSpec(1, 10.0, HEIGHT, WIDTH, 0.5199, 16_000, short_files="refuse")
    decode_clip(path, 0.0, spec)
    with pytest.raises(MediaError, match="must last at least as long as a clip"):
        decode_clip(path, 0.0, dataclasses.replace(spec, audio_seconds=0.5201))


@pytest.mark.parametrize("short_files", ["loop", "refuse"])
def test_long_enough_file_is_the_same_under_any_policy(media: Media, short_files: str) -> None:
    path = media(RECIPES["mp4 2 B-frames, stereo"])
    spec = ClipSpec(8, 12.0, HEIGHT, WIDTH, 1.0, 16_000)
    other = dataclasses.replace(spec, short_files=short_files)  # type: ignore[arg-type]
    assert_equal(decode_clip(path, 2.0, spec), decode_clip(path, 2.0, other))


# ---- damaged files (see mutants.py) ----------------------------------------------------------------------------------


def test_every_mutant_differs_and_a_seed_gives_the_same_ones(tmp_path: Path) -> None:
    sources = write_sources(tmp_path / "sources")
    assert {path.suffix for path in sources} >= {".mp4", ".mkv", ".webm", ".avi", ".ts", ".mov", ".wav", ".flac"}
    assert max(path.stat().st_size for path in sources) < 60_000
    contents = [path.read_bytes() for path in mutants(3, 90, tmp_path / "one", sources)]
    assert contents == [path.read_bytes() for path in mutants(3, 90, tmp_path / "two", sources)]
    assert contents != [path.read_bytes() for path in mutants(4, 90, tmp_path / "three", sources)]
    wholes = [path.read_bytes() for path in sources]
    changed = [content != wholes[number % len(wholes)] for number, content in enumerate(contents)]
    assert sum(changed) > 75  # a zeroed block may have been zero before
    kinds = {path.stem.split("_")[1] for path in (tmp_path / "one").iterdir()}
    assert kinds == set(DAMAGES)


# ---- memory ---------------------------------------------------------------------------------------------------------


# ---- what damage may claim ------------------------------------------------------------------------------------------


def test_samples_beyond_full_scale_are_limited(tmp_path: Path) -> None:
    """A damaged file gave 22.3, and float files may hold anything."""
    sound = np.tile(np.array([0.5, 22.3, -3.0, np.nan, np.inf, -np.inf, 0.25, 0.0], np.float32), 1_000)
    wavfile.write(tmp_path / "a.wav", 8_000, sound)
    spec = ClipSpec(audio_seconds=0.8, sample_rate_hz=8_000)
    heard = decode_clip(tmp_path / "a.wav", 0.0, spec).waveform.numpy()[:8]
    np.testing.assert_allclose(heard[[0, 1, 2, 6, 7]], [0.5, 1.0, -1.0, 0.25, 0.0])
    assert np.isfinite(heard).all()
    assert np.abs(heard).max() <= 1


def test_absurd_sizes_and_lengths_are_refused(media: Media, monkeypatch: pytest.MonkeyPatch) -> None:
    path = media(made())
    monkeypatch.setattr(container, "MOST_PIXELS", 64 * 48 - 1)
    for read in (probe, lambda p: decode_clip(p, 0.0, ClipSpec())):
        with pytest.raises(MediaError, match="must have at most 3071 pixels, got 64 x 48: damaged"):
            read(path)
    monkeypatch.undo()
    monkeypatch.setattr("cmacc.clips.media.decoding.LONGEST_SECONDS", 0.5)
    with pytest.raises(MediaError, match=r"must last at most 0\.5 s, got .* s: damaged"):
        probe(path)


def resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says so simply how much memory is in use")
def test_memory_stays_as_it_is_over_many_decodes(media: Media) -> None:
    names = ("mp4 open groups", "mkv av1", "webm vp8", "avi mpeg4 B-frames", "ts mpeg2", "mov rotated", "ogg", "mp3")
    paths = [media(RECIPES[name]) for name in names if _can_write(RECIPES[name].video_codec)]
    spec = ClipSpec(2, 10.0, 24, 32, 0.2, 8_000)
    rng = np.random.default_rng(0)
    before = 0
    for count in range(2_500):
        if count == 300:
            before = resident_pages()
        decode_clip(paths[count % len(paths)], float(rng.uniform(0, 2)), spec)
    assert resident_pages() < 1.05 * before
