"""The synthetic world: pure, reproducible, and its sound really follows from its picture."""

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from scipy import stats

from cmacc.clips.synthetic import Event, WorldConfig, describe_clip, mux, render_clip, write_clip, write_world
from cmacc.clips.synthetic.event import MOTIONS, PITCH_RANGE_HZ, SIZE_RANGE, class_parts
from cmacc.clips.synthetic.motion import trace
from cmacc.clips.synthetic.sound import synthesise

SMALL = WorldConfig(clip_count=5, duration_seconds=1.0, frame_size=32, frame_rate_hz=8)
CLEAN = WorldConfig(class_count=64, nuisance=0.0, frame_size=32)
STRUCK = ("bounce", "swing", "pulse", "collide", "dart")


def first_event(config: WorldConfig, motion: str, timbre: str | None = None) -> Event:
    """Find the first clip of a motion (and timbre)."""
    for index in range(5000):
        event = describe_clip(config, index)
        if event.motion == motion and timbre in (None, event.timbre):
            return event
    raise AssertionError(f"no clip of {motion}, {timbre}")


def decode(path: Path) -> tuple[list[float], np.ndarray, np.ndarray]:
    """Give the frames' seconds (T,), the pictures (T, S, S, 3), and the sound (samples, 2) laid on the time axis."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    with av.open(str(path)) as container:
        rate = container.streams.audio[0].rate
        blocks = [(float(block.pts * block.time_base), block.to_ndarray().T) for block in container.decode(audio=0)]
    sound = np.zeros((max(round(start * rate) + len(block) for start, block in blocks), 2))
    for start, block in blocks:
        assert start >= 0
        sound[round(start * rate) :][: len(block)] = block
    seconds = [float(frame.pts * frame.time_base) for frame in frames]
    return seconds, np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), sound


# ---- classes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_count", [2, 5, 16, 40, 64])
def test_picture_and_sound_each_tell_the_class(class_count: int) -> None:
    parts = [class_parts(k, class_count) for k in range(class_count)]
    assert len({(shape, motion) for shape, motion, _ in parts}) == class_count
    assert len({(motion, timbre) for _, motion, timbre in parts}) == class_count


def test_how_often_parts_are_shared() -> None:
    def uses(class_count: int) -> list[list[int]]:
        parts = zip(*(class_parts(k, class_count) for k in range(class_count)), strict=True)
        return [sorted(Counter(values).values()) for values in parts]

    assert uses(8) == [[4, 4], [1] * 8, [4, 4]]
    assert uses(16) == [[8, 8], [2] * 8, [8, 8]]


def test_class_frequencies_follow_zipf() -> None:
    config = WorldConfig(zipf_exponent=1.0, duration_seconds=1.0)
    counts = np.bincount([describe_clip(config, i).class_index for i in range(2000)], minlength=16)
    expected = 1 / np.arange(1, 17)
    # Significance 0.001: of a thousand seeds one would fail; this seed is fixed. 2,000 draws do tell it from uniform.
    assert stats.chisquare(counts, 2000 * expected / expected.sum()).pvalue > 0.001
    assert stats.chisquare(counts).pvalue < 1e-9


# ---- purity ---------------------------------------------------------------------------------------------------------


def test_rendering_is_pure() -> None:
    frames, sound = render_clip(SMALL, 3)
    render_clip(SMALL, 4)
    again_frames, again_sound = render_clip(replace(SMALL, clip_count=9), 3)
    assert (frames.dtype, frames.shape) == (np.uint8, (8, 32, 32, 3))
    assert (sound.dtype, sound.shape) == (np.float32, (16000, 2))
    assert np.abs(sound).max() <= 1
    np.testing.assert_array_equal(frames, again_frames)
    np.testing.assert_array_equal(sound, again_sound)
    assert (render_clip(replace(SMALL, seed=1), 3)[0] != frames).any()


@pytest.mark.parametrize("class_index", range(0, 64, 5))
def test_every_class_renders(class_index: int) -> None:
    config = WorldConfig(class_count=64, duration_seconds=1.0, frame_size=32)
    index = next(i for i in range(5000) if describe_clip(config, i).class_index == class_index)
    frames, sound = render_clip(config, index)
    assert frames.std() > 5
    assert 0.01 < np.abs(sound).max() <= 1  # and not NaN


@pytest.mark.slow
def test_workers_change_no_byte_and_resuming_keeps_files(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    one = write_world(SMALL, tmp_path / "one", workers=1, progress=lambda what, done, total: seen.append((done, total)))
    two = write_world(SMALL, tmp_path / "two", workers=2)
    assert seen == [(done, 5) for done in range(1, 6)]
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file

    with (one / "world.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [row["label"] for row in rows] == [describe_clip(SMALL, i).label for i in range(5)]
    lost, kept = one / rows[0]["file"], one / rows[1]["file"]
    lost.unlink()
    before = kept.stat().st_mtime_ns
    write_world(SMALL, one, workers=1)
    assert kept.stat().st_mtime_ns == before
    assert lost.read_bytes() == (two / rows[0]["file"]).read_bytes()


def test_a_world_grows_and_never_shrinks(tmp_path: Path) -> None:
    few, many = replace(SMALL, clip_count=2), replace(SMALL, clip_count=3)

    def written(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    write_world(few, tmp_path / "grown", workers=1)
    first = next((tmp_path / "grown").rglob("clip_000000.mp4"))
    before = first.stat().st_mtime_ns
    write_world(many, tmp_path / "grown", workers=1)
    assert first.stat().st_mtime_ns == before
    at_once = written(write_world(many, tmp_path / "at_once", workers=1))
    assert written(tmp_path / "grown") == at_once
    seen: list[tuple[int, int]] = []
    write_world(few, tmp_path / "grown", workers=1, progress=lambda what, done, total: seen.append((done, total)))
    assert written(tmp_path / "grown") == at_once
    assert seen[-1] == (3, 3)
    with pytest.raises(ValueError, match=r"seed \(0, not 1\)"):
        write_world(replace(many, seed=1, clip_count=9), tmp_path / "grown", workers=1)
    assert written(tmp_path / "grown") == at_once


def test_near_duplicates_share_the_event_only() -> None:
    config = WorldConfig(duplicate_share=0.3, duration_seconds=1.0, frame_size=32)
    events = [describe_clip(config, i) for i in range(1000)]
    copies = [event for event in events if event.duplicate_of is not None]
    assert abs(len(copies) - 0.3 * 999) < 4 * (0.3 * 0.7 * 999) ** 0.5  # four standard deviations
    for copy in copies:
        original = events[copy.duplicate_of or 0]
        assert original.duplicate_of is None
        assert original.index < copy.index
        assert original == replace(copy, index=original.index, duplicate_of=None, nuisance_seed=original.nuisance_seed)
    copy = copies[0]
    pair = (copy.duplicate_of or 0, copy.index)
    for noisy, clean in zip(
        zip(*(render_clip(config, i) for i in pair), strict=True),
        zip(*(render_clip(replace(config, nuisance=0.0), i) for i in pair), strict=True),
        strict=True,
    ):
        assert (noisy[0] != noisy[1]).mean() > 0.9
        np.testing.assert_array_equal(*clean)


# ---- picture causes sound -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timbre", ["marimba", "buzz", "pluck", "bell"])
@pytest.mark.parametrize("motion", STRUCK)
def test_energy_rises_at_the_onsets_and_nowhere_else(motion: str, timbre: str) -> None:
    event = first_event(CLEAN, motion, timbre)
    sound = render_clip(CLEAN, event.index)[1]
    bins = (sound**2).sum(1).reshape(-1, 80).mean(1)  # 5 ms
    rise = np.diff(np.log(bins + 1e-2 * bins.max()), prepend=np.log(1e-2 * bins.max()))
    onsets = np.array([onset for onset in event.onset_seconds if onset < 2.98])
    assert len(onsets) >= 2
    near = np.abs((np.arange(len(bins)) + 0.5)[:, None] * 0.005 - onsets)  # (bins, onsets)
    audible = np.diff(onsets, prepend=-1) > 0.06  # the box's walls can be met at almost the same time
    for column in near.T[audible]:
        assert rise[column < 0.012].max() > 0.15
    assert (near[rise > 1.0].min(1) < 0.012).all()


@pytest.mark.parametrize("motion", ["roll", "spin", "orbit"])
def test_sustained_loudness_follows_the_motion(motion: str) -> None:
    event = first_event(CLEAN, motion, "whistle")
    assert event.onset_seconds == ()
    sound = render_clip(CLEAN, event.index)[1]
    envelope = np.sqrt((sound**2).sum(1).reshape(-1, 800).mean(1))  # 50 ms
    track = trace(event, (np.arange(60) + 0.5) * 0.05, 3.0)
    assert np.corrcoef(envelope, track.loudness)[0, 1] > 0.95


def test_contacts_are_seen_where_they_are_heard() -> None:
    event = first_event(CLEAN, "bounce")
    onsets = np.array(event.onset_seconds)
    at_contact = trace(event, onsets, 3.0).y
    np.testing.assert_allclose(at_contact, 1 - 1.1 * event.size, atol=1e-6)
    for moment in (onsets - 0.05, onsets + 0.05):
        assert (trace(event, moment, 3.0).y < at_contact).all()
    swing = first_event(CLEAN, "swing")
    places = trace(swing, np.array(swing.onset_seconds), 3.0).x
    assert (np.abs(np.diff(np.sign(places - 0.5))) == 2).all()  # left, right, left


def test_drawn_object_stands_where_the_event_says() -> None:
    config = replace(CLEAN, frame_size=96)
    for motion in MOTIONS:
        event = first_event(config, motion)
        frames = render_clip(config, event.index)[0].astype(float)
        weight = np.abs(frames - frames[:, :1, :1]).sum(3)
        centre = (weight.sum(1) @ (np.arange(96) + 0.5)) / weight.sum((1, 2)) / 96
        # The two colours and the crescent pull the centre of brightness off by up to half a radius.
        assert np.abs(centre - event.horizontal_path).max() < 0.6 * 1.4 * event.size


def test_pitch_falls_with_size() -> None:
    events = [describe_clip(WorldConfig(class_count=64), i) for i in range(200)]
    events.sort(key=lambda event: event.size)
    pitches = [event.pitch_hz for event in events]
    assert pitches == sorted(pitches, reverse=True)
    assert SIZE_RANGE[0] <= events[0].size < events[-1].size <= SIZE_RANGE[1]
    assert PITCH_RANGE_HZ[1] >= pitches[0] > 4 * pitches[-1]
    heard = []
    for event in [event for event in events if event.timbre == "marimba"][::4]:
        spectrum = np.abs(np.fft.rfft(render_clip(CLEAN, event.index)[1].sum(1)))
        heard.append(np.argmax(spectrum) / 3.0)
        assert heard[-1] == pytest.approx(event.pitch_hz, rel=0.02)
    assert len(heard) >= 4
    assert heard == sorted(heard, reverse=True)


def test_balance_follows_the_place() -> None:
    event = first_event(CLEAN, "swing")
    sound = render_clip(CLEAN, event.index)[1]
    places = trace(event, np.array(event.onset_seconds), 3.0).x
    for onset, place in zip(event.onset_seconds[:-1], places, strict=False):
        left, right = np.sqrt((sound[round(onset * 16000) :][:1000] ** 2).mean(0))
        assert (right > left) == (place > 0.5)


def test_partials_stay_below_nyquist() -> None:
    seconds = np.arange(8000) / 8000
    wave = synthesise("pluck", 1000.0, seconds, False, np.random.default_rng(0))
    assert np.abs(wave).max() == pytest.approx(1)
    spectrum = np.abs(np.fft.rfft(wave))
    assert spectrum[[1000, 3000]].min() > 1e3 * np.delete(spectrum, [1000, 3000]).max()


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frame_rate_hz", "sample_rate_hz"), [(16, 16000), (30, 44100)])
def test_sound_and_picture_keep_their_time_through_the_file(
    tmp_path: Path, frame_rate_hz: int, sample_rate_hz: int
) -> None:
    config = WorldConfig(frame_size=32, frame_rate_hz=frame_rate_hz, sample_rate_hz=sample_rate_hz)
    frames = np.zeros((3 * frame_rate_hz, 32, 32, 3), np.uint8)
    frames[frame_rate_hz] = 255  # a flash at 1 s
    sound = np.zeros((3 * sample_rate_hz, 2), np.float32)
    clicks = (0.004, 0.5, 1.2345, 2.7)
    for click in clicks:
        sound[round(click * sample_rate_hz)] = 0.9
    mux(frames, sound, tmp_path / "click.mp4", config)
    seconds, pictures, decoded = decode(tmp_path / "click.mp4")
    assert seconds == [i / frame_rate_hz for i in range(3 * frame_rate_hz)]
    assert np.argmax(pictures.mean((1, 2, 3))) == frame_rate_hz
    assert abs(len(decoded) - len(sound)) < 1024
    power = (decoded**2).sum(1)
    for click in clicks:
        start = max(0, round((click - 0.1) * sample_rate_hz))
        heard = (start + np.argmax(power[start:][: round(0.2 * sample_rate_hz)])) / sample_rate_hz
        assert abs(heard - click) < 0.003


def test_written_clip_decodes_to_what_was_rendered(tmp_path: Path) -> None:
    config = WorldConfig()
    write_clip(config, 0, tmp_path / "clip.mp4")
    frames, sound = render_clip(config, 0)
    _, pictures, decoded = decode(tmp_path / "clip.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]  # nothing left aside
    assert np.abs(pictures.astype(float) - frames).mean() < 25  # 4:2:0 blurs the noise's colour
    assert np.corrcoef(decoded[: len(sound)].ravel(), sound.ravel())[0, 1] > 0.9


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("cmacc.clips.synthetic.world.mux", fail)
    with pytest.raises(OSError, match="disk full"):
        write_clip(SMALL, 0, tmp_path / "clip.mp4")
    assert list(tmp_path.iterdir()) == []


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_folder_of_another_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "world.json").write_text(json.dumps({**SMALL.__dict__, "seed": 7}))
    with pytest.raises(ValueError, match=r"write_world: folder must .* same config, got .* seed \(7, not 0\)"):
        write_world(SMALL, tmp_path, workers=1)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("class_count", 1, r"class_count must be in 2\.\.64, got 1$"),
        ("class_count", 65, r"class_count must be in 2\.\.64, got 65$"),
        ("clip_count", 0, r"clip_count must be in 1\.\.1000000, got 0$"),
        ("zipf_exponent", -1.0, r"zipf_exponent must be in 0\.\.5, got -1\.0$"),
        ("duplicate_share", 1.5, r"duplicate_share must be in 0\.\.1, got 1\.5$"),
        ("nuisance", float("nan"), r"nuisance must be in 0\.\.1, got nan$"),
        ("duration_seconds", 0.5, r"duration_seconds must be in 1\.\.60, got 0\.5$"),
        ("frame_rate_hz", 1, r"frame_rate_hz must be in 8\.\.60, got 1$"),
        ("frame_size", 97, r"frame_size must be even, got 97$"),
        ("sample_rate_hz", 9000, r"sample_rate_hz must be in \(8000, .*\), got 9000$"),
        ("seed", -1, r"seed must be in 0\.\..*, got -1$"),
    ],
)
def test_config_is_checked(field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match="^WorldConfig: " + message):
        replace(WorldConfig(), **{field: value})


def test_other_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="describe_clip: index must be at least 0, got -1"):
        describe_clip(SMALL, -1)
    with pytest.raises(ValueError, match="write_world: workers must be at least 0, got -2"):
        write_world(SMALL, tmp_path, workers=-2)
