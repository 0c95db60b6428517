"""The examination of one file, on films that each have one thing wrong with them."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from cmacc.clips.catalog import examine as examine_module
from cmacc.clips.catalog.examine import FINDINGS, Examination, examine, unreadable
from cmacc.clips.catalog.fingerprint import near_duplicates

from ..conftest import Recipe
from ..films import changing_sound, moving_picture, write_film


def look(path: Path) -> Examination:
    return Examination.from_json(json.loads(json.dumps(examine(path))))


def names(path: Path) -> list[str]:
    return [finding.name for finding in look(path).findings]


def test_a_good_film_has_no_findings(tmp_path: Path) -> None:
    path = write_film(tmp_path / "a.mp4", moving_picture(), changing_sound())
    found = look(path)
    assert found.findings == ()
    assert found.info is not None
    assert (found.info.width, found.info.height, found.info.has_audio) == (128, 96, True)
    assert (found.content_hash, found.size_bytes) == (
        hashlib.sha256(path.read_bytes()).hexdigest(),
        path.stat().st_size,
    )
    assert found.loudness_dbfs is not None
    rms = np.sqrt(np.mean(changing_sound() ** 2))
    assert found.loudness_dbfs == pytest.approx(20 * np.log10(rms), abs=2)


@pytest.mark.parametrize(
    ("finding", "frames", "sound"),
    [
        ("no_audio", moving_picture(), None),
        ("no_picture", None, changing_sound()),
        ("silent", moving_picture(), np.zeros(32_000, np.float32)),
        ("black", moving_picture() // 20, changing_sound()),
        ("still", np.repeat(moving_picture(0.1), 20, axis=0), changing_sound()),
        ("audio_shorter", moving_picture(), changing_sound(1.0)),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, finding: str, frames: np.ndarray | None, sound: np.ndarray | None
) -> None:
    assert names(write_film(tmp_path / "a.mp4", frames, sound)) == [finding]


def test_a_sound_between_the_windows_is_heard(tmp_path: Path) -> None:
    sound = np.zeros(9 * 16_000, np.float32)
    sound[32_000:36_000] = changing_sound(0.25)  # the windows are 0 to 1, 4 to 5 and 8 to 9 s
    assert names(write_film(tmp_path / "a.mp4", moving_picture(9.0), sound)) == []


def test_sound_that_begins_late(tmp_path: Path) -> None:
    sound = changing_sound()
    path = write_film(tmp_path / "a.mp4", moving_picture(3.0), sound, audio_start_seconds=Fraction(3, 4))
    (finding,) = look(path).findings
    assert finding.name == "offset"
    assert "begins 0.69 s" in finding.detail  # AAC's own run-in of 1,024 samples comes first
    assert "after the picture" in finding.detail


def test_uneven_frames(media: Callable[[Recipe], Path]) -> None:
    even = media(Recipe())
    uneven = media(
        Recipe(frame_times=tuple(Fraction(round(4000 * (i / 60) ** 1.5), 1000) for i in range(60)), gop=20, b_frames=0)
    )
    assert "variable_frame_rate" not in names(even)
    assert "variable_frame_rate" in names(uneven)


@pytest.mark.parametrize("suffix", [".mkv", ".avi"])
def test_a_file_cut_short_is_corrupt_and_says_where(
    media: Callable[[Recipe], Path], tmp_path: Path, suffix: str
) -> None:
    codecs = ("mpeg4", "pcm_s16le") if suffix == ".avi" else ("libx264", "aac")
    whole = media(Recipe(suffix, video_codec=codecs[0], audio_codec=codecs[1])).read_bytes()
    (tmp_path / f"cut{suffix}").write_bytes(whole[: len(whole) * 6 // 10])
    found = [finding for finding in look(tmp_path / f"cut{suffix}").findings if finding.name == "corrupt"]
    assert any("of the stated" in finding.detail for finding in found)


@pytest.mark.parametrize("seconds", [(2.0, 5.0), (5.0, 2.0)])
@pytest.mark.parametrize("codecs", [(".mkv", "libx264", "aac"), (".webm", "libvpx", "libopus")])
def test_streams_of_different_lengths_are_no_damage_but_a_cut_file_is(
    media: Callable[[Recipe], Path], tmp_path: Path, seconds: tuple[float, float], codecs: tuple[str, str, str]
) -> None:
    """Matroska states one length for the whole file, which only the longest stream reaches."""
    suffix, video, audio = codecs
    path = media(
        Recipe(
            suffix, seconds=seconds[0], sound_seconds=seconds[1], video_codec=video, audio_codec=audio,
            audio_rate_hz=48_000, b_frames=0,
        )
    )  # fmt: skip
    found = look(path)
    assert [finding.name for finding in found.findings] == (["audio_shorter"] if seconds[1] < seconds[0] else [])
    assert found.info is not None
    assert found.info.duration_seconds == pytest.approx(seconds[0], abs=0.03)
    content = path.read_bytes()
    for share in (0.5, 0.8):
        (tmp_path / f"cut{suffix}").write_bytes(content[: round(share * len(content))])
        (finding,) = (f for f in look(tmp_path / f"cut{suffix}").findings if f.name == "corrupt")
        assert "of the stated 5.0 s" in finding.detail


def test_a_header_that_states_no_length_is_no_damage_but_a_cut_file_is(
    media: Callable[[Recipe], Path], tmp_path: Path
) -> None:
    content = media(Recipe(".wav", seconds=3.0, video_codec=None, audio_codec="pcm_s16le")).read_bytes()
    place = content.index(b"data") + 4
    for name, stated in (("ones", b"\xff" * 4), ("zero", bytes(4))):
        path = tmp_path / f"{name}.wav"
        path.write_bytes(content[:4] + stated + content[8:place] + stated + content[place + 4 :])
        found = look(path)
        assert [finding.name for finding in found.findings] == ["no_picture"]
        assert found.info is not None
        assert found.info.duration_seconds == 3.0
    (tmp_path / "cut.wav").write_bytes(content[: len(content) * 6 // 10])
    assert "corrupt" in names(tmp_path / "cut.wav")


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "findings", "seconds", "size"),
    [
        ("music_cover.m4a", ["no_picture"], 3.0, 0),
        ("two_audio_default_second.mp4", [], 3.0, 160),
        ("longer_audio.mkv", [], 2.0, 160),
        ("longer_audio.webm", [], 2.0, 160),
        ("streamed_header.wav", ["no_picture"], 3.0, 0),
        ("flv1_mp3.flv", [], 3.0, 160),
    ],
)
def test_files_as_people_have_them(real_data: Path, name: str, findings: list[str], seconds: float, size: int) -> None:
    assert names(real_data.parent / "field" / name) == findings
    info = look(real_data.parent / "field" / name).info
    assert info is not None
    assert (info.width, info.fps, info.has_audio) == (size, 25.0 if size else 0.0, True)
    assert info.duration_seconds == pytest.approx(seconds, abs=0.001)


def test_damage_inside_a_window_is_found_at_its_place(tmp_path: Path) -> None:
    path = write_film(tmp_path / "a.mp4", moving_picture(9.0), changing_sound(9.0), crf=10)
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size, float(p.pts * p.time_base)) for p in container.demux(video=0) if p.size]
    position, size, _ = min(packets, key=lambda packet: abs(packet[2] - 8.5))  # in the last window, 8 to 9 s
    data = bytearray(path.read_bytes())
    data[position + 40 : position + size] = bytes(size - 40)
    path.write_bytes(data)
    (finding,) = (finding for finding in look(path).findings if finding.name == "corrupt")
    assert finding.detail.startswith("at 8.0 s")


@pytest.mark.parametrize(
    ("suffix", "codecs", "openings"),
    [
        (".mp4", ("libx264", "aac"), 2),
        (".mkv", ("libx264", "pcm_s16le"), 2),
        (".avi", ("mpeg4", "libmp3lame"), 3),  # a seek that lands too late is met by reopening
        (".ts", ("libx264", "aac"), 3),
        (".wav", (None, "pcm_s16le"), 2),
        (".mp4", ("libx264", None), 2),
    ],
)
def test_an_undamaged_file_is_opened_twice_and_found_the_same(
    media: Callable[[Recipe], Path],
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    codecs: tuple[str | None, str | None],
    openings: int,
) -> None:
    """Once for the hash and once by FFmpeg; with a decoder that is new for each part it comes to the same."""
    path = media(Recipe(suffix, seconds=5.0, gop=250, video_codec=codecs[0], audio_codec=codecs[1]))
    opened: list[Path] = []
    av_open, path_open = av.open, Path.open
    monkeypatch.setattr(av, "open", lambda file, *a, **o: opened.append(Path(file)) or av_open(file, *a, **o))
    monkeypatch.setattr(Path, "open", lambda file, *a, **o: opened.append(file) or path_open(file, *a, **o))
    examine(path)
    assert opened == [path] * openings
    info, packets, clips, faults = examine_module._read_at_once(path)
    other_info, other_packets, other_clips, other_faults = examine_module._read_in_parts(path)
    assert (info, packets, faults) == (other_info, other_packets, other_faults)
    assert len(opened) >= openings + (openings - 1) + 5
    for clip, other in zip(clips, other_clips, strict=True):
        assert torch.equal(clip.frames, other.frames)
        torch.testing.assert_close(clip.waveform, other.waveform, rtol=0, atol=5e-3)  # AAC's noise


@pytest.mark.parametrize("content", [b"", b"not a film\n" * 100])
def test_other_content_is_unreadable(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    found = look(tmp_path / "a.mp4")
    assert [finding.name for finding in found.findings] == ["unreadable"]
    assert found.info is None
    assert "a.mp4" not in found.findings[0].detail  # whose fault it is stands beside it already
    assert found.content_hash == hashlib.sha256(content).hexdigest()


def test_a_file_that_was_not_examined() -> None:
    found = unreadable("crashes", 17)
    assert (found.size_bytes, found.content_hash, found.findings[0].detail) == (17, "", "crashes")
    assert Examination.from_json(found.to_json()) == found


def test_every_finding_is_explained(tmp_path: Path) -> None:
    assert set(names(write_film(tmp_path / "a.mp4", moving_picture(), None))) <= set(FINDINGS)
    assert all(FINDINGS.values())


def test_a_copy_made_smaller_is_recognised_and_others_are_not(tmp_path: Path) -> None:
    prints = []
    for seed in (0, 1, 2):
        frames, sound = moving_picture(3.0, seed), changing_sound(3.0, seed)
        prints.append(look(write_film(tmp_path / f"{seed}.mp4", frames, sound)))
        small = np.ascontiguousarray(frames[:, ::2, ::2])
        prints.append(look(write_film(tmp_path / f"{seed}s.mp4", small, 0.5 * sound, crf=30)))
    assert len({p.content_hash for p in prints}) == 6
    pairs = near_duplicates(
        [bytes.fromhex(p.picture_print or "") for p in prints], [bytes.fromhex(p.sound_print or "") for p in prints]
    )
    assert [(first, second) for first, second, _, _ in pairs] == [(0, 1), (2, 3), (4, 5)]


def test_an_examination_survives_json(tmp_path: Path) -> None:
    found = look(write_film(tmp_path / "a.mp4", moving_picture(), changing_sound()))
    assert dataclasses.asdict(found) == json.loads(json.dumps(found.to_json())) | {"findings": ()}
