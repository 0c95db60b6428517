"""Films of parts: the right pictures and sound by PyAV's own decoder, cut to the file, the same bytes each time."""

import io
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from cmacc.clips import ClipSpec, MediaError, PackedSample, PackSettings, decode_clip, encode_part
from cmacc.clips.packing.transcode import transcode
from cmacc.clips.storage import Extent

from ..conftest import Recipe, chirp, read_stamps
from ..films import changing_sound, moving_picture, write_film

Media = Callable[[Recipe], Path]


def played(film: bytes) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Frames ``(T, height, width, 3)`` and sound of a film, by PyAV alone; empty where there is no such stream."""
    with av.open(io.BytesIO(film)) as file:
        kinds = [stream.type for stream in file.streams]
        assert [stream.codec_context.name for stream in file.streams] == [
            {"video": "h264", "audio": "aac"}[kind] for kind in kinds
        ]
    frames, sound = np.zeros((0, 2, 2, 3), np.uint8), np.zeros(0, np.float32)
    if "video" in kinds:
        with av.open(io.BytesIO(film)) as file:
            assert file.streams.video[0].codec_context.pix_fmt == "yuv420p"
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    if "audio" in kinds:
        with av.open(io.BytesIO(film)) as file:
            assert file.streams.audio[0].layout.name == "mono"
            assert file.streams.audio[0].rate == 48_000
            sound = np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)])
    return frames, sound


def correlation(first: NDArray[np.float32], second: NDArray[np.floating]) -> float:
    """Of the two sounds as they are, without a shift."""
    count = min(len(first), len(second))
    return float(np.corrcoef(first[:count], second[:count])[0, 1])


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(seconds=3.0),
        Recipe(suffix=".avi", video_codec="mpeg4", audio_codec="mp3", b_frames=0, seconds=3.0),
        Recipe(suffix=".mkv", audio_codec="ac3", audio_rate_hz=48_000, gop=50, seconds=3.0),
        Recipe(
            seconds=3.0, fps=Fraction(30_000, 1001), video_start=Fraction(1001, 1000), audio_start=Fraction(1001, 1000)
        ),
    ],
    ids=["mp4", "avi", "mkv", "late"],
)
def test_a_part_holds_its_own_frames_and_sound(media: Media, recipe: Recipe) -> None:
    frames, sound = played(encode_part(media(recipe), 1.0, 2.2, short_side_pixels=480))
    rate = float(recipe.fps)
    assert len(frames) == round(1.2 * rate)
    assert frames.shape[1:] == (48, 64, 3)  # smaller ones are not enlarged
    spec = ClipSpec(len(frames), rate, 48, 64, audio_seconds=len(frames) / rate, sample_rate_hz=48_000)
    clip = decode_clip(media(recipe), 1.0, spec)
    assert read_stamps(frames) == read_stamps(clip.frames.numpy())
    if recipe.suffix != ".avi":  # whose second frame is late, as FFmpeg writes it
        assert read_stamps(frames) == [int((1.0 + (n + 0.5) / rate) * rate + 1e-6) for n in range(len(frames))]
    assert abs(len(sound) / 48_000 - 1.2) < 0.04
    inner = slice(0, round(1.19 * 48_000))  # what was decoded from the source, and what was put into it
    assert correlation(sound[inner], clip.waveform.numpy()) > 0.99
    # The others delay it, by their codec or by an edit list in milliseconds. 50 microseconds would give 0.95 here.
    if recipe == Recipe(seconds=3.0):
        assert correlation(sound[inner], chirp(1.0 + np.arange(len(sound)) / 48_000)) > 0.98


def test_pictures_are_near_those_of_the_source(tmp_path: Path) -> None:
    pixels = moving_picture(2.0)
    path = write_film(tmp_path / "a.mp4", pixels, None)
    frames, _ = played(encode_part(path, 0.5, 1.5, short_side_pixels=96))
    with av.open(str(path)) as file:
        source = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])[5:15]
    error = np.square(frames.astype(float) - source).mean(axis=(1, 2, 3))
    assert (10 * np.log10(255**2 / error) > 33).all()
    half, _ = played(encode_part(path, 0.0, 1.0, short_side_pixels=48, frame_rate_hz=5.0))
    assert half.shape == (5, 48, 64, 3)
    assert abs(half.astype(float).mean() - pixels[:10].mean()) < 3  # brightness, whatever the colour matrix


def test_the_same_part_gives_the_same_bytes_with_the_index_in_front(media: Media) -> None:
    path = media(Recipe(seconds=3.0))
    film = encode_part(path, 0.5, 1.5)
    assert encode_part(path, 0.5, 1.5) == film
    assert encode_part(path, 0.6, 1.6) != film
    assert 0 < film.index(b"moov") < film.index(b"mdat")


def test_a_part_is_cut_to_the_ends_of_the_file(media: Media) -> None:
    path = media(Recipe(seconds=3.0))
    frames, sound = played(encode_part(path, -5.0, 100.0))
    assert read_stamps(frames) == list(range(75))
    assert abs(len(sound) / 48_000 - 3) < 0.04
    for begin, end in ((3.0, 4.0), (-2.0, 0.0)):
        with pytest.raises(MediaError, match=r"a part must lie within its 3\.000 s, got"):
            encode_part(path, begin, end)


def test_chunks_join_without_a_seam(media: Media, monkeypatch: pytest.MonkeyPatch) -> None:
    path = media(Recipe(seconds=3.0))
    frames, sound = played(encode_part(path, 0.1, 2.9))
    monkeypatch.setattr("cmacc.clips.media.film._CHUNK_SECONDS", 1)
    again, heard = played(encode_part(path, 0.1, 2.9))
    assert len(frames) == 70
    assert np.array_equal(again, frames)
    # The encoder may round otherwise after differences of 1e-7. A sample too many would give 0.07.
    assert np.sqrt(np.square(heard - sound).mean()) < 0.01


def test_missing_streams_stay_missing(tmp_path: Path) -> None:
    silent = write_film(tmp_path / "silent.mp4", moving_picture(1.0), None)
    frames, sound = played(encode_part(silent, 0.0, 1.0))
    assert (len(frames), len(sound)) == (10, 0)
    with pytest.raises(MediaError, match="has no sound"):
        encode_part(silent, 0.0, 1.0, short_side_pixels=None)
    tones = changing_sound(1.5)
    unseen = write_film(tmp_path / "sound.mp4", None, tones)
    both = write_film(tmp_path / "both.mp4", moving_picture(1.5), tones)
    for film in (encode_part(unseen, 0.3, 1.3), encode_part(both, 0.3, 1.3, short_side_pixels=None)):
        frames, sound = played(film)
        assert len(frames) == 0
        third = sound[: 3 * (len(sound) // 3)].reshape(-1, 3)[:, 0]  # 16 kHz, as made
        assert correlation(third, tones[round(0.3 * 16_000) :]) > 0.97


def test_a_packed_sample_is_played_like_a_file(tmp_path: Path) -> None:
    path = write_film(tmp_path / "a.mp4", moving_picture(1.5), changing_sound(1.5))
    transcode(path, 0.0, 1.5, PackSettings(), tmp_path / "packed")
    video, audio = ((tmp_path / f"packed{suffix}").read_bytes() for suffix in (".mp4", ".flac"))
    (tmp_path / "shard").write_bytes(video + audio)
    packed = PackedSample(str(tmp_path / "shard"), Extent(0, len(video)), Extent(len(video), len(audio)))
    frames, sound = played(encode_part(packed, 0.5, 1.5))
    original, heard = played(encode_part(path, 0.5, 1.5))
    assert frames.shape == original.shape
    assert np.abs(frames.astype(float) - original).mean() < 4
    assert correlation(sound, heard) > 0.97


def test_bad_input_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no film" * 100)
    with pytest.raises(MediaError, match=r"broken\.mp4: does not decode"):
        encode_part(broken, 0.0, 1.0)
    with pytest.raises(MediaError, match="no such file"):
        encode_part(tmp_path / "none.mp4", 0.0, 1.0)
    with pytest.raises(ValueError, match=r"end_seconds must be after start_seconds, got 2\.0 to 2\.0"):
        encode_part(broken, 2.0, 2.0)
    with pytest.raises(ValueError, match="short_side_pixels must be at least 2, got 0"):
        encode_part(broken, 0.0, 1.0, short_side_pixels=0)
    with pytest.raises(ValueError, match=r"frame_rate_hz must be in \[1, 240\], got 0"):
        encode_part(broken, 0.0, 1.0, frame_rate_hz=0.0)
