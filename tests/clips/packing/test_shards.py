"""Packed shards: the same windows as the originals, whole or not there, the same bytes however they came about."""

import dataclasses
import hashlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cmacc.clips.catalog.listing import ListedFile, Listing, list_folders
from cmacc.clips.catalog.manifest import Manifest
from cmacc.clips.catalog.scan import scan
from cmacc.clips.clip import ClipSpec, MediaError
from cmacc.clips.loading.loader import evaluation_loader, evaluation_requests
from cmacc.clips.media.decoding import decode_clip, decode_clips
from cmacc.clips.packing.shards import PackError, pack, verify
from cmacc.clips.packing.transcode import PackSettings
from cmacc.clips.storage import Extent, read_extent

from ..conftest import HEIGHT, WIDTH, Recipe, read_stamps
from ..films import changing_sound, moving_picture, write_film
from ..media.test_decoding import delay_seconds

pack_module = importlib.import_module("cmacc.clips.packing.shards")  # the package gives the function of that name
SETTINGS = PackSettings(samples_per_shard=2)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Five films with labels; the fourth has no sound and the fifth no picture."""
    folder = tmp_path_factory.mktemp("films")
    for seed in range(3):
        write_film(folder / "ab"[seed % 2] / f"{seed}.mp4", moving_picture(1.0, seed), changing_sound(1.0, seed))
    write_film(folder / "a" / "3.mp4", moving_picture(0.6, 3), None)
    write_film(folder / "b" / "4.mp4", None, changing_sound(0.8, 4))
    return scan(list_folders([folder]), test_fraction=0.4).manifest


@pytest.fixture(scope="module")
def packed(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The films in three shards; nothing may change them."""
    out = tmp_path_factory.mktemp("packed") / "shards"
    result = pack(manifest, out, SETTINGS)
    assert (result.sample_count, result.shard_count, result.skipped) == (5, 3, {})
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- what is in a shard ---------------------------------------------------------------------------------------------


def test_the_index_is_a_manifest_of_the_same_samples(manifest: Manifest, packed: Path) -> None:
    index = Manifest.read(packed / "index.parquet")
    assert len(index) == len(manifest)
    for ours, original in zip(index.records, manifest.records, strict=True):
        for name in ("label", "split", "group", "content_hash", "duration_seconds", "has_audio", "has_picture"):
            assert getattr(ours, name) == getattr(original, name), name
        assert ours.fps == pytest.approx(original.fps, rel=0.01)
        assert (ours.audio_rate_hz == 16_000) == original.has_audio
        assert ours.start_seconds == 0
    assert index.classes() == manifest.classes()
    moved = packed.parent / "moved"
    shutil.copytree(packed, moved)
    first = Manifest.read(moved / "index.parquet").records[0]
    assert str(first.path) == str(moved / "shard-000000.tar")


def test_shards_are_plain_tar_files_in_the_webdataset_naming(packed: Path) -> None:
    names = []
    for shard in sorted(packed.glob("shard-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.uname) == (0, 0, "")
                names.append(member.name)
                if member.name.endswith(".json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    assert json.loads(content.read())["key"] == member.name.split(".")[0]
    assert names == [
        f"{i:09d}.{ending}"
        for i, endings in enumerate((("mp4", "flac"), ("mp4", "flac"), ("mp4",), ("mp4", "flac"), ("flac",)))
        for ending in (*endings, "json")
    ]


def test_any_sample_is_read_by_seeking(packed: Path) -> None:
    table = pq.read_table(packed / "index.parquet").to_pylist()
    for row in reversed(table):
        for kind, ending in (("video", "mp4"), ("audio", "flac"), ("json", "json")):
            if row[f"{kind}_size"] is None:
                continue
            data = read_extent(str(packed / row["path"]), Extent(row[f"{kind}_offset"], row[f"{kind}_size"]))
            assert hashlib.sha256(data).hexdigest() == row[f"{ending}_sha256"]


@pytest.mark.slow
def test_the_webdataset_package_reads_them_unchanged(packed: Path) -> None:
    # In a process of its own: the package leaves files open, which here would be an error.
    code = (
        "import hashlib, json, sys, webdataset\n"
        "for sample in webdataset.WebDataset(sys.argv[1:], shardshuffle=False):\n"
        "    told = {'key': sample['__key__'], 'label': json.loads(sample['json'])['label']}\n"
        "    for kind in {'mp4', 'flac'} & set(sample):\n"
        "        told[f'{kind}_sha256'] = hashlib.sha256(sample[kind]).hexdigest()\n"
        "    print(json.dumps(told))"
    )
    shards = [str(path) for path in sorted(packed.glob("shard-*.tar"))]
    result = subprocess.run([sys.executable, "-c", code, *shards], capture_output=True, text=True, check=True)
    rows = pq.read_table(packed / "index.parquet").to_pylist()
    names = ("key", "label", "mp4_sha256", "flac_sha256")
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {name: row[name] for name in names if row[name] is not None} for row in rows
    ]


def test_keyframes_and_size(media: Callable[[Recipe], Path], tmp_path: Path) -> None:
    film = write_film(tmp_path / "films" / "a.mp4", moving_picture(5.0, size=(180, 320)), None)
    source = scan(list_folders([film.parent])).manifest
    pack(source, tmp_path / "out", PackSettings(short_side=64, keyframe_every=7))
    record = Manifest.read(tmp_path / "out" / "index.parquet").records[0]
    assert (record.height, record.width) == (64, 114)
    assert record.video is not None
    data = read_extent(str(record.path), record.video)
    with av.open(io.BytesIO(data)) as container:
        keyframes = [i for i, packet in enumerate(container.demux(video=0)) if packet.is_keyframe and packet.size]
        assert container.streams.video[0].frames == 50
    assert keyframes[0] == 0
    assert max(np.diff([*keyframes, 50])) <= 7


# ---- the same windows -----------------------------------------------------------------------------------------------

SPEC = ClipSpec(8, 12.0, HEIGHT, WIDTH, audio_seconds=0.8, sample_rate_hz=16_000)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(fps=Fraction(30_000, 1001), gop=250, b_frames=3, audio_rate_hz=48_000),
        Recipe(".mkv", video_start=Fraction(18, 25)),
        Recipe(".avi", video_codec="mpeg4", audio_codec="pcm_s16le", audio_rate_hz=48_000),
        Recipe(".ts"),
        Recipe(frame_times=tuple(Fraction(round(4000 * (i / 60) ** 1.5), 1000) for i in range(60)), gop=20, b_frames=0),
    ],
    ids=["mp4", "ntsc, B-frames", "late picture", "avi, B-frames", "mpeg-ts", "uneven frames"],
)
def test_windows_of_a_packed_sample_are_those_of_the_original(
    media: Callable[[Recipe], Path], tmp_path: Path, recipe: Recipe
) -> None:
    """Of a whole file, and of a segment of it, whose clock begins at its start."""
    path = media(recipe)
    offset = float(recipe.video_start - recipe.audio_start)  # the sound's own time at the first picture
    files = (ListedFile(path, path.parent, "x", None, None), ListedFile(path, path.parent, "x", None, None, 1.1, 3.3))
    source = scan(Listing(files, (), 0, 0)).manifest
    pack(source, tmp_path / "out", PackSettings(crf=12))
    rng = np.random.default_rng(0)
    for ours, original in zip(Manifest.read(tmp_path / "out" / "index.parquet").records, source.records, strict=True):
        starts = rng.uniform(-0.2, original.duration_seconds - 0.9 - max(0.0, offset), 8).tolist()
        clips = decode_clips(ours.source, starts, SPEC)
        for start, clip in zip(starts, clips, strict=True):
            wanted = decode_clip(original.source, original.start_seconds + start, SPEC)
            inside = np.flatnonzero(SPEC.frame_times(start) >= 0)
            numbers = read_stamps(clip.frames.numpy()[inside])
            assert numbers == read_stamps(wanted.frames.numpy()[inside]), start
            began = wanted.frame_seconds.numpy() - original.start_seconds
            # The first frame counts as shown from the beginning, also where (in AVI) it is said to begin a little late.
            later = began > 0.05
            np.testing.assert_allclose(clip.frame_seconds.numpy()[later], began[later], atol=1.1 / 90_000)
            if start < 0:
                continue  # a segment has nothing before its start, where its file goes on
            # What is heard at a clip's own time of its first sample, which is a whole one of its own source.
            content = np.arange(len(clip.waveform)) / 16_000 + offset
            delays = [
                delay_seconds(c.waveform.numpy(), content + begin + c.audio_start_seconds, about=0.0)
                for c, begin in ((clip, original.start_seconds), (wanted, 0.0))
            ]
            # Matroska rounds stamps to 1 ms: in the original each window's sound is placed by another one of them.
            assert abs(delays[0][0] - delays[1][0]) <= (0.0011 if recipe.suffix == ".mkv" else 1.1 / 16_000)
            assert max(delays[0][1], delays[1][1]) < 0.12


def test_sound_keeps_its_place_to_the_sample(tmp_path: Path) -> None:
    """Clicks in a long sound, past the length that is transcoded at a time."""
    rate = 16_000
    sound = np.zeros(130 * rate, np.float32)
    places = np.arange(1, 130) * rate - 37
    sound[places] = 0.9
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray((sound * 32_767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    source = scan(list_folders([tmp_path])).manifest
    pack(source, tmp_path / "out")
    (record,) = Manifest.read(tmp_path / "out" / "index.parquet").records
    assert record.duration_seconds == pytest.approx(130)
    spec = ClipSpec(audio_seconds=1.5, sample_rate_hz=rate)
    for start in (0.25, 58.9, 59.5, 77.123, 119.4, 128.0):
        clip = decode_clip(record.source, start, spec)
        begin = round(start * rate)
        assert clip.audio_start_seconds == pytest.approx(begin / rate, abs=1e-9)
        wanted = sound[begin : begin + len(clip.waveform)]
        np.testing.assert_allclose(clip.waveform, wanted, atol=1 / 16_000)
        assert (wanted > 0.5).any()


def test_the_loader_takes_packed_samples_of_every_kind(packed: Path, manifest: Manifest) -> None:
    index = Manifest.read(packed / "index.parquet")
    requests = evaluation_requests(index, range(5), 0.4)
    spec = ClipSpec(2, 10.0, 24, 32, 0.4, 8_000)
    (batch,) = evaluation_loader(index, requests, spec, batch_size=5, workers=0)
    assert batch.failures == {}
    assert batch.sample_ids.tolist() == [0, 1, 2, 3, 4]
    assert batch.labels.tolist() == manifest.label_indices()
    for i, record in enumerate(index.records):
        assert (batch.frames[i] == 0).all() == (not record.has_picture)
        assert (batch.waveforms[i] == 0).all() == (not record.has_audio)
        wanted = decode_clip(record.source, requests[i].start_seconds, spec)
        assert torch.equal(batch.frames[i], wanted.frames)


# ---- whole or not at all --------------------------------------------------------------------------------------------


def test_a_pack_that_was_stopped_ends_with_the_same_bytes(
    manifest: Manifest, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pack_module._pack_shard

    def stop_at_the_second(shard: Any, **options: Any) -> Any:
        if shard.number == 1:
            raise KeyboardInterrupt
        return real(shard, **options)

    monkeypatch.setattr(pack_module, "_pack_shard", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        pack(manifest, tmp_path / "out", SETTINGS)
    assert "index.parquet" not in contents(tmp_path / "out")
    monkeypatch.undo()
    (tmp_path / "out" / ".shard-000001.tar.x7.tar").write_bytes(b"left by a kill")
    made: list[int] = []

    def note(shard: Any, **options: Any) -> Any:
        if not (tmp_path / "out" / shard.name).exists():
            made.append(shard.number)
        return real(shard, **options)

    monkeypatch.setattr(pack_module, "_pack_shard", note)
    pack(manifest, tmp_path / "out", SETTINGS)
    assert 1 in made
    assert 0 not in made
    found = contents(tmp_path / "out")
    assert found.pop(".shard-000001.tar.x7.tar") == b"left by a kill"
    assert found == contents(packed)


def test_parts_leave_the_index_to_the_last_call(manifest: Manifest, packed: Path, tmp_path: Path) -> None:
    for i in (1, 2):
        pack(manifest, tmp_path / "out", SETTINGS, part=(i, 2))
        assert not (tmp_path / "out" / "index.parquet").exists()
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3
    pack(manifest, tmp_path / "out", SETTINGS)
    assert contents(tmp_path / "out") == contents(packed)


def test_a_store_at_a_url(manifest: Manifest, packed: Path, tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    result = pack(manifest, "memory://bucket/set", SETTINGS)
    assert result.sample_count == 5
    for name, data in contents(packed).items():
        if name != "index.parquet":
            assert system.cat_file(f"/bucket/set/{name}") == data
    (tmp_path / "index.parquet").write_bytes(system.cat_file("/bucket/set/index.parquet"))
    index = Manifest.read(tmp_path / "index.parquet")
    assert str(index.records[0].path) == "memory://bucket/set/shard-000000.tar"
    local = Manifest.read(packed / "index.parquet")
    for ours, other in zip(index.records, local.records, strict=True):
        assert torch.equal(decode_clip(ours.source, 0.1, SPEC).frames, decode_clip(other.source, 0.1, SPEC).frames)
    assert verify("memory://bucket/set") == []
    system.rm("/bucket/set/shard-000001.tar")
    assert verify("memory://bucket/set") == ["shard-000001.tar: the index names it, but it is not there"]
    system.rm("/bucket", recursive=True)
    with pytest.raises(MediaError, match=r"memory://bucket/set/shard-000000\.tar: cannot be read"):
        decode_clip(index.records[0].source, 0.1, SPEC)


def test_verify_finds_every_kind_of_damage(packed: Path, tmp_path: Path) -> None:
    assert verify(packed) == []
    shard, index = "shard-000001.tar", pq.read_table(packed / "index.parquet").to_pylist()

    def damaged(change: Callable[[Path], object]) -> list[str]:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(packed, copy)
        change(copy)
        return verify(copy)

    def flip(copy: Path) -> None:
        data = bytearray((copy / shard).read_bytes())
        data[index[2]["video_offset"] + 5] ^= 1
        (copy / shard).write_bytes(data)

    assert damaged(flip) == [f"{shard}: sample {index[2]['key']} is not what the index says"]
    assert damaged(lambda copy: (copy / shard).unlink()) == [f"{shard}: the index names it, but it is not there"]
    cut = damaged(lambda copy: (copy / shard).write_bytes((packed / shard).read_bytes()[:3_000]))
    assert len(cut) == 1
    assert cut[0].startswith(f"{shard}: ")
    extra = damaged(lambda copy: shutil.copy(copy / shard, copy / "shard-000009.tar"))
    assert extra == [f"shard-000009.tar: sample {index[i]['key']} is not in the index" for i in (2, 3)]
    with pytest.raises(PackError, match=r"must hold index\.parquet"):
        damaged(lambda copy: (copy / "index.parquet").unlink())


def test_samples_that_do_not_decode_are_left_out_and_told_again(manifest: Manifest, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no film")
    records = list(manifest.records)
    bad = Manifest([records[0], dataclasses.replace(records[1], path=broken), *records[2:]])
    results = [pack(bad, tmp_path / "out", SETTINGS) for _ in range(2)]
    assert results[0] == results[1]
    assert results[0].sample_count == 4
    assert list(results[0].skipped) == [str(broken)]
    assert "does not decode" in results[0].skipped[str(broken)]
    assert [row.key for row in Manifest.read(tmp_path / "out" / "index.parquet").records][:2] == [
        "000000000",
        "000000002",
    ]


def test_files_that_are_gone_stop_it_before_anything_is_left_out(manifest: Manifest, tmp_path: Path) -> None:
    records = list(manifest.records)
    moved = Manifest([*records[:4], dataclasses.replace(records[4], path=tmp_path / "gone.mp4")])
    with pytest.raises(PackError, match=r"all files .* must be there, got 1 missing, such as .*gone\.mp4"):
        pack(moved, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no film")
    with pytest.raises(PackError, match=r"at least one sample must be readable, got none: .*does not decode"):
        pack(Manifest([dataclasses.replace(records[0], path=broken)]), tmp_path / "out", SETTINGS)


def test_overwrite_replaces_the_pack_and_damaged_shards_are_made_again(
    manifest: Manifest, packed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(packed, out)
    whole = (out / "shard-000000.tar").read_bytes()
    index = pq.read_table(out / "index.parquet").to_pylist()
    (out / "shard-000000.tar").write_bytes(whole[: index[1]["video_offset"] - 512])  # at the border of two samples
    (out / "shard-000001.tar").write_bytes(b"")
    pack(manifest, out, SETTINGS)
    assert contents(out) == contents(packed)
    os.utime(out / "shard-000000.tar", (0, 0))
    pack(manifest, out, SETTINGS)
    assert (out / "shard-000000.tar").stat().st_mtime == 0
    pack(manifest, out, SETTINGS, overwrite=True)
    assert (out / "shard-000000.tar").stat().st_mtime > 0
    assert contents(out) == contents(packed)
    longer = dataclasses.replace(manifest.records[0], duration_seconds=0.5)
    with pytest.raises(PackError, match="got one with another manifest"):
        pack(Manifest([longer, *manifest.records[1:]]), out, SETTINGS)


def test_another_pack_is_not_lost_by_accident(manifest: Manifest, packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "out")
    with pytest.raises(PackError, match=r"got one with another short_side \(128, not 64\); .* --overwrite"):
        pack(manifest, tmp_path / "out", dataclasses.replace(SETTINGS, short_side=64))
    assert contents(tmp_path / "out") == contents(packed)
    pack(manifest, tmp_path / "out", dataclasses.replace(SETTINGS, short_side=64), overwrite=True)
    assert Manifest.read(tmp_path / "out" / "index.parquet").records[0].height == 64
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    with pytest.raises(PackError, match=r"must be empty or hold a pack, got other files, such as diary\.txt"):
        pack(manifest, tmp_path / "mine", SETTINGS, overwrite=True)


def test_what_cannot_be_packed(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(PackError, match="at least one sample, got none"):
        pack(Manifest(), tmp_path)
    with pytest.raises(PackError, match="samples that are packed already"):
        pack(Manifest.read(packed / "index.parquet"), tmp_path)
    for name, value in (("short_side", 8), ("keyframe_every", 0), ("crf", 52), ("samples_per_shard", 0)):
        with pytest.raises(ValueError, match=f"PackSettings: {name} must be"):
            PackSettings(**{name: value})
