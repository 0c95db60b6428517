"""Decoding against files that say themselves what time it is, and against plain sequential decoding."""

import math
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from scipy import signal

from cmacc.clips.clip import ClipSpec, MediaError
from cmacc.clips.media import frames, sound
from cmacc.clips.media.decoding import decode_clip, probe

from ..conftest import HEIGHT, WIDTH, Recipe, chirp, read_stamps

Media = Callable[[Recipe], Path]

SPEC = ClipSpec(
    frame_count=8, frame_rate_hz=12.0, frame_height=HEIGHT, frame_width=WIDTH, audio_seconds=0.8, sample_rate_hz=16_000
)
NTSC = Fraction(30_000, 1001)
RECIPES = {
    "mp4 10 fps aac 44.1k stereo": Recipe(fps=Fraction(10), audio_rate_hz=44_100, channels=2),
    "mp4 29.97 fps gop 250 aac 22.05k": Recipe(fps=NTSC, gop=250, b_frames=3, audio_rate_hz=22_050),
    "mp4 30 fps gop 1 aac 8k": Recipe(fps=Fraction(30), gop=1, b_frames=0, audio_rate_hz=8_000),
    "mkv 25 fps gop 1 aac 48k": Recipe(".mkv", gop=1, b_frames=0, audio_rate_hz=48_000),
    "mkv 30 fps gop 250 pcm 8k": Recipe(
        ".mkv", fps=Fraction(30), gop=250, audio_codec="pcm_s16le", audio_rate_hz=8_000
    ),
    "mkv 29.97 fps opus stereo": Recipe(".mkv", fps=NTSC, audio_codec="libopus", audio_rate_hz=48_000, channels=2),
    "webm vp8 opus": Recipe(".webm", video_codec="libvpx", b_frames=0, audio_codec="libopus", audio_rate_hz=48_000),
    "avi mpeg4 mp3 44.1k stereo": Recipe(".avi", video_codec="mpeg4", b_frames=0, audio_codec="libmp3lame", channels=2),
    "avi mpeg4 B-frames pcm 48k": Recipe(".avi", video_codec="mpeg4", audio_codec="pcm_s16le", audio_rate_hz=48_000),
    "avi mjpeg 29.97 pcm 22.05k": Recipe(
        ".avi", fps=NTSC, video_codec="mjpeg", audio_codec="pcm_s16le", audio_rate_hz=22_050, channels=2
    ),
    "mov 30 fps pcm stereo": Recipe(".mov", fps=Fraction(30), audio_codec="pcm_s16le", channels=2),
    "mpeg-ts": Recipe(".ts"),
    "picture starts late": Recipe(video_start=Fraction(18, 25)),
    "picture starts late mkv": Recipe(".mkv", video_start=Fraction(18, 25)),
    "sound starts late": Recipe(audio_start=Fraction(1, 2)),
    "sound starts late mkv": Recipe(".mkv", audio_start=Fraction(1, 2), audio_codec="pcm_s16le"),
    "uneven frames": Recipe(
        frame_times=tuple(Fraction(round(4000 * (i / 60) ** 1.5), 1000) for i in range(60)), gop=20, b_frames=0
    ),
}
WITH_RECIPES = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


def frame_table(recipe: Recipe, path: Path) -> list[tuple[float, int]]:
    """When each frame begins after the first picture, and its number."""
    if recipe.suffix != ".avi":
        return [(float(start), number) for number, start in enumerate(recipe.times())]
    # AVI has no presentation stamps, and its muxer repeats a frame where the encoder delays: the file is what counts.
    return [(begin, read_stamps(frame.to_ndarray(format="rgb24")[None])[0]) for begin, frame in plain_frames(path)]


def shown_at(table: list[tuple[float, int]], seconds: float) -> int:
    """The frame on show at ``seconds`` after the first picture, found the plain way."""
    return next((number for start, number in reversed(table) if start <= seconds), table[0][1])


def delay_seconds(
    heard: NDArray[np.float32], content_seconds: NDArray[np.float64], about: float = 0.0
) -> tuple[float, float]:
    """How much later than expected the chirp is heard, and the relative error left after that shift."""
    shifts = about + np.arange(-240, 241) / 96_000  # to a sixth of a sample at 16 kHz, over +-2.5 ms
    wanted = chirp(content_seconds[::5] - shifts[:, None])
    errors = np.sqrt(((heard[::5] - wanted) ** 2).mean(1) / (wanted**2).mean(1))
    return float(shifts[errors.argmin()]), float(errors.min())


def slot_middles(spec: ClipSpec, start: float) -> NDArray[np.float64]:
    """The clip's promise (see clip.py), written out again."""
    longest = max(spec.frame_count / spec.frame_rate_hz, spec.audio_seconds)
    centre = start + longest / 2
    return centre + (np.arange(spec.frame_count) + 0.5 - spec.frame_count / 2) / spec.frame_rate_hz


# ---- frames and samples in their places -----------------------------------------------------------------------------


@WITH_RECIPES
def test_frames_are_those_on_show(media: Media, recipe: Recipe) -> None:
    path = media(recipe)
    table = frame_table(recipe, path)
    rng = np.random.default_rng(0)
    # Matroska rounds stamps to 1 ms, MPEG-TS to 11 us: a slot whose middle is so near to a border may fall either way.
    doubt = 0.0011 if recipe.suffix in (".mkv", ".webm") or recipe.frame_times else 2e-5
    seen: set[int] = set()
    for start in rng.uniform(-0.4, recipe.seconds - 0.3, 12):
        clip = decode_clip(path, start, SPEC)
        assert clip.frames.shape == (8, HEIGHT, WIDTH, 3)
        assert clip.waveform.shape == (12_800,)
        assert clip.start_seconds == start
        for number, middle in zip(read_stamps(clip.frames.numpy()), slot_middles(SPEC, start), strict=True):
            allowed = {shown_at(table, middle + shift) for shift in (-doubt, 0, doubt)}
            assert number in allowed, (start, middle)
            seen.add(number)
    assert len(seen) > 20


@WITH_RECIPES
def test_sound_keeps_its_place(media: Media, recipe: Recipe) -> None:
    path = media(recipe)
    offset = float(recipe.video_start - recipe.audio_start)  # the sound's own time at the first picture
    rng = np.random.default_rng(1)
    tolerance, about = 1.1 / 16_000, 0.0
    if recipe.suffix in (".mkv", ".webm") or recipe.audio_start:
        tolerance = 0.0011  # stamps (in .mp4 the edit list) of whole milliseconds, Opus' own delay rounded once more
    elif recipe.audio_codec == "libmp3lame":
        about = 1105 / 44_100  # the encoder's and decoder's delay, which AVI has no field for
    for start in rng.uniform(max(0.0, -offset) + 0.05, recipe.seconds - 0.9 - max(0.0, offset), 6):
        heard = decode_clip(path, start, SPEC).waveform.numpy()
        content = start + offset + np.arange(12_800) / 16_000
        delay, error = delay_seconds(heard, content, about)
        assert abs(delay - about) <= tolerance
        assert error < 0.12


# ---- ends, and streams that are not there ---------------------------------------------------------------------------


def test_over_the_ends_pictures_are_held_and_sound_is_zero(media: Media) -> None:
    path = media(Recipe(audio_codec="pcm_s16le", suffix=".mov"))
    before = decode_clip(path, -0.5, SPEC)
    assert read_stamps(before.frames.numpy()) == [
        max(0, math.floor(25 * middle)) for middle in slot_middles(SPEC, -0.5)
    ]
    assert (before.waveform[: 8_000 - 16] == 0).all()  # the resampler rings over a millisecond at most
    assert before.waveform[8_000:].abs().max() > 0.4
    after = decode_clip(path, 3.6, SPEC)
    assert read_stamps(after.frames.numpy())[-3:] == [99, 99, 99]
    assert (after.waveform[6_400 + 16 :] == 0).all()
    assert after.waveform[: 6_400 - 16].abs().max() > 0.4


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts"])
@pytest.mark.parametrize(("start", "number"), [(-50.0, 0), (50.0, 99)])
def test_far_outside_the_first_or_last_picture_stands_in_silence(
    media: Media, suffix: str, start: float, number: int
) -> None:
    codecs = ("mpeg4", "pcm_s16le") if suffix == ".avi" else ("libx264", "aac")
    clip = decode_clip(media(Recipe(suffix, video_codec=codecs[0], audio_codec=codecs[1])), start, SPEC)
    assert read_stamps(clip.frames.numpy()) == [number] * 8
    assert (clip.waveform == 0).all()


def test_file_shorter_than_the_window(media: Media) -> None:
    path = media(Recipe(seconds=0.2))
    clip = decode_clip(path, -0.3, SPEC)
    assert clip.frames.shape == (8, HEIGHT, WIDTH, 3)
    numbers = [min(4, max(0, math.floor(25 * middle))) for middle in slot_middles(SPEC, -0.3)]
    assert read_stamps(clip.frames.numpy()) == numbers
    assert (clip.waveform[:4_700] == 0).all()
    assert clip.waveform[4_900:7_900].abs().max() > 0.3
    assert (clip.waveform[8_400:] == 0).all()  # AAC may sound on until the end of its frame


def test_picture_in_the_middle_of_a_longer_sound(media: Media) -> None:
    spec = ClipSpec(4, 25.0, HEIGHT, WIDTH, audio_seconds=2.0, sample_rate_hz=16_000)
    assert read_stamps(decode_clip(media(Recipe()), 1.0, spec).frames.numpy()) == [48, 49, 50, 51]


def test_no_sound(media: Media) -> None:
    path = media(Recipe(audio_codec=None))
    info = probe(path)
    assert (info.has_audio, info.audio_rate_hz) == (False, 0)
    clip = decode_clip(path, 1.0, SPEC)
    assert (clip.waveform == 0).all()
    assert clip.waveform.shape == (12_800,)
    assert read_stamps(clip.frames.numpy())[0] == math.floor(25 * slot_middles(SPEC, 1.0)[0])


@pytest.mark.parametrize(
    ("suffix", "codec", "rate_hz", "tolerance"),
    [
        (".wav", "pcm_s16le", 22_050, 0.00007),
        (".flac", "flac", 44_100, 0.00007),
        (".m4a", "aac", 44_100, 0.00007),
        (".mp3", "libmp3lame", 44_100, 0.00007),
        (".ogg", "libopus", 48_000, 0.00007),
        (".mka", "libopus", 48_000, 0.0011),
    ],
)
def test_sound_only(media: Media, suffix: str, codec: str, rate_hz: int, tolerance: float) -> None:
    path = media(Recipe(suffix, video_codec=None, audio_codec=codec, audio_rate_hz=rate_hz))
    info = probe(path)
    assert (info.width, info.height, info.fps, info.has_audio) == (0, 0, 0.0, True)
    assert info.audio_rate_hz == rate_hz
    assert info.duration_seconds == pytest.approx(4.0, abs=0.06)
    for start in (0.05, 1.234, 2.9):
        clip = decode_clip(path, start, SPEC)
        assert (clip.frames == 0).all()
        delay, error = delay_seconds(clip.waveform.numpy(), start + np.arange(12_800) / 16_000)
        assert abs(delay) <= tolerance
        assert error < 0.12


@WITH_RECIPES
def test_probe_tells_what_was_written(media: Media, recipe: Recipe) -> None:
    info = probe(media(recipe))
    assert (info.width, info.height) == (WIDTH, HEIGHT)
    assert info.duration_seconds == pytest.approx(4.0, abs=0.1 if recipe.frame_times else 0.06)
    if not recipe.frame_times:
        assert info.fps == pytest.approx(float(recipe.fps), rel=1e-3)
    assert info.has_audio
    assert info.audio_rate_hz == recipe.audio_rate_hz


# ---- size, rotation, resampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(32, 32), (30, 60), (64, 20), (96, 96)])
def test_scaled_to_cover_and_cut_about_the_centre(media: Media, height: int, width: int) -> None:
    recipe = Recipe(size=(60, 80), seconds=0.4, audio_codec=None)
    spec = ClipSpec(2, 10.0, height, width)
    picture = decode_clip(media(recipe), 0.0, spec).frames[0].numpy().astype(float)
    scale = max(height / 60, width / 80)
    across = 20 + 200 * np.clip(((np.arange(width) + 0.5 - width / 2) / scale + 40 - 0.5) / 79, 0, 1)
    down = 20 + 200 * np.clip(((np.arange(height) + 0.5 - height / 2) / scale + 30 - 0.5) / 59, 0, 1)
    # Half a pixel of cutting, 4:2:0 colour and rounding; a pixel is 2.5 (across) or 3.4 (down) levels at scale 1.
    assert np.abs(picture[:, :, 0].mean(0) - across)[2:-2].max() < 6
    assert np.abs(picture[:, :, 1].mean(1) - down)[2:-2].max() < 6


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotated_file_is_shown_upright(media: Media, degrees: int) -> None:
    upright = decode_clip(media(Recipe(size=(60, 80), seconds=0.4, audio_codec=None)), 0.0, ClipSpec(1, 10.0, 60, 80))
    recipe = Recipe(size=(60, 80), seconds=0.4, audio_codec=None, rotation=degrees)
    path = media(recipe)
    matrix = _display_matrix(path)
    # Apply the stored matrix (QuickTime: x' = a x + c y, y' = b x + d y; y downwards) to the picture's corners.
    a, b, c, d = matrix
    plain = upright.frames[0].numpy()
    wanted = np.empty((60, 80, 3) if degrees == 180 else (80, 60, 3), np.uint8)
    rows, columns = np.mgrid[:60, :80]
    new_columns, new_rows = a * columns + c * rows, b * columns + d * rows
    wanted[new_rows - new_rows.min(), new_columns - new_columns.min()] = plain
    height, width = wanted.shape[:2]
    got = decode_clip(path, 0.0, ClipSpec(1, 10.0, height, width)).frames[0].numpy()
    assert np.abs(got.astype(int) - wanted).max() <= 6
    assert np.abs(got.astype(int) - wanted[::-1, ::-1]).max() > 50


def _display_matrix(path: Path) -> tuple[int, int, int, int]:
    """a, b, c, d of the file's first track header, read from its bytes."""
    data = path.read_bytes()
    place = data.index(b"tkhd") + 4 + 40  # version 0: the matrix begins 40 bytes into the box
    numbers = np.frombuffer(data[place : place + 36], ">i4").reshape(3, 3)[:2, :2] // 65_536
    return tuple(numbers.ravel().tolist())


@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 44_100, 48_000])
def test_resampling_equals_scipy_on_the_whole_sound(media: Media, rate_hz: int) -> None:
    path = media(Recipe(".wav", video_codec=None, audio_codec="pcm_s16le", audio_rate_hz=rate_hz))
    with av.open(str(path)) as container:
        whole = np.concatenate([frame.to_ndarray().ravel() for frame in container.decode(audio=0)]) / 32_768
    wanted = signal.resample(whole, 4 * 16_000)  # by Fourier transform, not by the polyphase filter under test
    for start in (0.5, 1.0, 2.5):  # whole samples at every rate
        got = decode_clip(path, start, SPEC).waveform.numpy()
        error = got - wanted[round(start * 16_000) :][:12_800]
        assert np.sqrt((error**2).mean() / (got**2).mean()) < 0.01


def test_windows_of_one_file_meet_without_a_seam(media: Media) -> None:
    path = media(Recipe(audio_rate_hz=22_050))
    spec = ClipSpec(8, 20.0, HEIGHT, WIDTH, audio_seconds=0.4, sample_rate_hz=22_050)
    long = decode_clip(path, 1.0, ClipSpec(16, 20.0, HEIGHT, WIDTH, audio_seconds=0.8, sample_rate_hz=22_050))
    parts = [decode_clip(path, start, spec) for start in (1.0, 1.4)]
    np.testing.assert_array_equal(np.concatenate([p.frames for p in parts]), long.frames)
    np.testing.assert_allclose(np.concatenate([p.waveform for p in parts]), long.waveform, atol=1e-6)


# ---- files that are not as they should be ---------------------------------------------------------------------------


def both_refuse(path: Path, reason: str) -> None:
    for read in (probe, lambda p: decode_clip(p, 0.0, SPEC)):
        with pytest.raises(MediaError, match=f"{path.name}: {reason}"):
            read(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    both_refuse(tmp_path / "gone.mp4", "no such file")
    (tmp_path / "folder.mp4").mkdir()
    both_refuse(tmp_path / "folder.mp4", "no such file")


@pytest.mark.parametrize("content", [b"", b"not a film at all\n" * 50, bytes(4096)])
def test_other_content(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.mp4"
    path.write_bytes(content)
    both_refuse(path, "does not decode")


def test_playlist_in_disguise_fetches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "list.mp4"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n")
    both_refuse(path, "")


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile 'other.mp4'\n", "#EXTM3U\n#EXTINF:4,\nother.mp4\n"])
def test_list_of_other_files_opens_none_of_them(media: Media, tmp_path: Path, text: str) -> None:
    """They may lie outside the folder that a scan keeps to."""
    (tmp_path / "other.mp4").write_bytes(media(Recipe()).read_bytes())
    (tmp_path / "list.mp4").write_text(text)
    both_refuse(tmp_path / "list.mp4", "does not decode")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_truncated_file(media: Media, tmp_path: Path, suffix: str, share: float) -> None:
    codecs = ("mpeg4", "pcm_s16le") if suffix == ".avi" else ("libx264", "aac")
    whole = media(Recipe(suffix, video_codec=codecs[0], audio_codec=codecs[1])).read_bytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole[: round(share * len(whole))])
    if suffix == ".mp4":  # its index comes last
        both_refuse(path, "does not decode")
        return
    probe(path)
    assert set(read_stamps(decode_clip(path, 0.0, SPEC).frames.numpy())) <= set(range(25))
    works_or_refuses(path, 3.0)


def works_or_refuses(path: Path, start: float) -> bool:
    """Whether the file decodes; anything but a clip of the right size or a `MediaError` that names the file fails."""
    begun = time.monotonic()
    try:
        probe(path)
        clip = decode_clip(path, start, SPEC)
    except MediaError as error:
        assert path.name in str(error)  # noqa: PT017
        return False
    finally:
        assert time.monotonic() - begun < 5
    assert clip.frames.shape == (8, HEIGHT, WIDTH, 3)
    assert clip.waveform.shape == (12_800,)
    assert np.isfinite(clip.waveform.numpy()).all()
    return True


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_flipped_bytes(media: Media, tmp_path: Path, suffix: str) -> None:
    codecs = ("mpeg4", "libmp3lame") if suffix == ".avi" else ("libx264", "aac")
    recipe = Recipe(suffix, seconds=1.0, video_codec=codecs[0], audio_codec=codecs[1])
    whole = np.frombuffer(media(recipe).read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    outcomes = []
    for case in range(100):
        data = whole.copy()
        # Half of the damage goes into the head and the tail, where the containers keep their tables.
        edge = rng.random() < 0.5
        count = int(rng.choice([1, 10, 100]))
        places = rng.integers(0, min(2_500, len(data)), count) * rng.choice([-1, 1]) if edge else None
        data[rng.integers(0, len(data), count) if places is None else places] = rng.integers(0, 256, count)
        path = tmp_path / f"case_{case}{suffix}"
        path.write_bytes(data.tobytes())
        outcomes.append(works_or_refuses(path, float(rng.uniform(-0.2, 0.6))))
    assert {True, False} <= set(outcomes)  # the damage was neither harmless nor always fatal


# ---- real files -----------------------------------------------------------------------------------------------------


def plain_frames(path: Path) -> list[tuple[float, av.VideoFrame]]:
    """Every frame from the beginning on with its time after the stream's start."""
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        start = float((stream.start_time or 0) * stream.time_base)
    # The order of frames is right; in AVI some of their times come swapped.
    return list(zip(sorted(frame.time - start for frame in frames), frames, strict=True))


def plain_sound(path: Path) -> tuple[float, NDArray[np.float32]] | None:
    """The whole sound and when it begins; None where the stamps do not follow from counting the samples."""
    with av.open(str(path), metadata_errors="ignore") as container:
        blocks = list(container.decode(container.streams.audio[0]))
    counted = blocks[0].time + np.cumsum([0] + [block.samples for block in blocks])[:-1] / blocks[0].sample_rate
    if np.abs(counted - [block.time for block in blocks]).max() > 1e-4:
        return None
    return blocks[0].time, np.concatenate([sound.mono(block) for block in blocks])


@pytest.mark.slow
@pytest.mark.real_data
def test_real_windows_equal_plain_decoding(real_data: Path) -> None:
    rng = np.random.default_rng(0)
    paths = sorted((real_data / "wild").glob("*.mp4"))[::10]
    paths += sorted((real_data / "ucf101_original").rglob("v_BabyCrawling*.avi"))  # among them one with B-frames
    paths += sorted((real_data / "grid" / "clips").iterdir())[::200]
    heard = 0
    for path in paths:
        info = probe(path)
        start = float(rng.uniform(0, max(0.0, info.duration_seconds - 0.8)))
        spec = ClipSpec(8, 12.0, 24, 32, 0.5, info.audio_rate_hz or 16_000)
        clip = decode_clip(path, start, spec)
        table = plain_frames(path)
        wanted = []
        for middle in slot_middles(spec, start):
            frame = next((frame for begin, frame in reversed(table) if begin <= middle), table[0][1])
            wanted.append(frames._scaled(VideoReformatter(), frame, 24, 32))
        np.testing.assert_array_equal(clip.frames, np.stack(wanted), err_msg=path.name)
        whole = plain_sound(path) if info.has_audio else None
        if whole is None:
            continue
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            origin = float((stream.start_time or 0) * stream.time_base)
        first = round((slot_middles(spec, start).mean() - 0.25 + origin - whole[0]) * info.audio_rate_hz)
        place = max(first, 0) + np.arange(100, 15_000)
        near = [clip.waveform.numpy()[place - first + shift] - whole[1][place] for shift in range(-20, 21)]
        errors = np.abs(near).mean(1)
        if errors.max() > 1e-4:  # silence is equal to itself anywhere
            # AAC fills bands with fresh noise, so that equality is near only; one sample off is much farther.
            assert abs(int(errors.argmin()) - 20) <= 1, path.name
            heard += 1
    assert heard > 10


@pytest.mark.slow
@pytest.mark.real_data
def test_every_wild_and_original_file_decodes(real_data: Path) -> None:
    paths = sorted(p for p in (real_data / "wild").iterdir() if p.suffix != ".csv")
    originals = sorted((real_data / "ucf101_original").rglob("*.avi"))
    assert (len(paths), len(originals)) == (148, 30)
    spec = ClipSpec(4, 8.0, 32, 40, 0.5, 16_000)
    refused: dict[str, str] = {}
    for path in paths + originals:
        try:
            length = probe(path).duration_seconds
            for start in (0.0, (length - 0.5) / 2, length - 0.5):
                clip = decode_clip(path, start, spec)
                assert clip.frames.shape == (4, 32, 40, 3)
                assert clip.waveform.shape == (8_000,)
        except MediaError as error:
            refused[path.name] = str(error)
    assert refused == {}
