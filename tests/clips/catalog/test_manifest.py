"""Manifests: round trips, moved folders, messages, fingerprints and splits."""

import csv
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmacc.clips.catalog.manifest import Manifest, ManifestError, MediaRecord, assign_split
from cmacc.clips.storage import Extent

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=12)
# Made into records by the test: beartype, which checks a record's tuple, draws on `random`, which strategies must not.
RECORDS = st.builds(
    dict,
    path=TEXT.filter(lambda name: "/" not in name and name not in (".", "..")).map(lambda name: Path("/data") / name),
    duration_seconds=st.floats(0, 1e6),
    fps=st.floats(0, 1000),
    width=st.integers(0, 8192),
    height=st.integers(0, 8192),
    has_audio=st.booleans(),
    audio_rate_hz=st.integers(0, 192_000),
    label=st.none() | TEXT,
    split=st.none() | st.sampled_from(["train", "test"]),
    group=st.none() | TEXT,
    start_seconds=st.floats(0, 1e6),
    content_hash=st.none() | st.just("0f" * 32),
    findings=st.lists(st.sampled_from(["silent", "duplicate"]), max_size=2).map(tuple),
    key=st.none() | TEXT,
    video=st.none() | st.builds(Extent, st.integers(0, 2**60), st.integers(0, 2**40)),
    audio=st.none() | st.builds(Extent, st.integers(0, 2**60), st.integers(0, 2**40)),
)


def record(path: Path, label: str | None = None, split: str | None = None, duration: float = 3.25) -> MediaRecord:
    return MediaRecord(path, duration, 25.0, 320, 240, True, 44_100, label, split)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
@settings(max_examples=40)
@given(rows=st.lists(RECORDS, max_size=5))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, suffix: str, rows: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("manifest") / f"m{suffix}"
    manifest = Manifest(MediaRecord(**row) for row in rows)
    manifest.write(path)
    assert Manifest.read(path) == manifest
    assert list(Manifest.read(path).records) == [MediaRecord(**row) for row in rows]
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing left aside


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_files_beneath_the_manifest_move_with_it(tmp_path: Path, suffix: str) -> None:
    old, outside = tmp_path / "old", tmp_path / "elsewhere" / "b.mp4"
    manifest = Manifest((record(old / "clips" / "a.mp4"), record(outside)))
    manifest.write(old / f"m{suffix}")
    old.rename(tmp_path / "new")
    moved = Manifest.read(tmp_path / "new" / f"m{suffix}")
    assert [r.path for r in moved.records] == [tmp_path / "new" / "clips" / "a.mp4", outside]
    assert moved.fingerprint() == manifest.fingerprint()


def test_folder_reached_through_a_link_moves_too(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    Manifest((record(tmp_path / "link" / "a.mp4"),)).write(tmp_path / "link" / "m.csv")
    with (tmp_path / "real" / "m.csv").open() as file:
        assert next(csv.DictReader(file))["path"] == "a.mp4"


def test_relative_paths_are_read_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path)
    Manifest((record(Path("a.mp4")),)).write(Path("m.csv"))
    monkeypatch.chdir(tmp_path / "deep")
    assert Manifest.read(os.path.join("..", "m.csv")).records[0].path == (tmp_path / "a.mp4").resolve()


def test_hand_written_csv(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(b"\xef\xbb\xbfpath,duration_seconds,has_audio,note\r\na.mp4,2.5,yes,x\r\n/abs/b.wav,1,0,\r\n")
    first, second = Manifest.read(path).records
    assert (first.path, first.duration_seconds, first.has_audio) == (tmp_path / "a.mp4", 2.5, True)
    assert (first.label, first.split, first.has_picture) == (None, None, True)
    assert (second.path, second.has_audio) == (Path("/abs/b.wav"), False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,has_audio\na.mp4,1\n", "row 1: duration_seconds must be given, got nothing"),
        ("path,duration_seconds,has_audio\na.mp4,1,1\n,,1\n", "row 2: path must be given"),
        ("path,duration_seconds,has_audio\na.mp4,long,1\n", "row 1: could not convert .*'long'"),
        ("path,duration_seconds,has_audio\na.mp4,nan,1\n", "row 1: duration_seconds must be finite, got nan"),
        ("path,duration_seconds,has_audio,width\na.mp4,1,1,inf\n", "row 1: width must be finite, got inf"),
        ("path,duration_seconds,has_audio\na.mp4,1,maybe\n", "row 1: has_audio must be true or false, got 'maybe'"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "m.csv").write_text(content)
    with pytest.raises(ManifestError, match=rf"manifest .*m\.csv, {message}"):
        Manifest.read(tmp_path / "m.csv")


def test_files_that_are_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"gone\.csv: no such file; make one with `cmacc scan"):
        Manifest.read(tmp_path / "gone.csv")
    for name, content, reason in [
        ("m.json", b"{}", r"must end in \.parquet or \.csv, got '\.json'"),
        ("m.parquet", b"PAR1 not really", "cannot be read"),
        ("m.csv", b"path\xff\xfe\xfa\n", "cannot be read"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ManifestError, match=rf"manifest .*{name}: {reason}"):
            Manifest.read(tmp_path / name)
    with pytest.raises(ManifestError, match=r"must end in \.parquet or \.csv, got '\.txt'"):
        Manifest(()).write(tmp_path / "m.txt")


def test_truncated_parquet(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    Manifest(tuple(record(tmp_path / f"{i}.mp4") for i in range(50))).write(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ManifestError, match=r"m\.parquet: cannot be read"):
        Manifest.read(path)


def test_parquet_without_a_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.mp4"], "has_audio": [True]}), tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match="row 1: duration_seconds must be given"):
        Manifest.read(tmp_path / "m.parquet")


def test_failed_write_leaves_the_old_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.csv"
    old = Manifest((record(tmp_path / "a.mp4"),))
    old.write(path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Manifest(()).write(path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.csv"]
    assert Manifest.read(path) == old


def test_classes_and_ids() -> None:
    manifest = Manifest(tuple(record(Path("/x"), label) for label in ("run", None, "jump", "run")))
    assert manifest.classes() == ["jump", "run"]
    assert manifest.label_indices() == [1, -1, 0, 1]
    assert manifest.ids_where(lambda r: r.label == "run") == [0, 3]
    assert len(manifest) == 4


def test_fingerprint_tells_what_matters() -> None:
    base = record(Path("/x/a.mp4"), "run", "train")
    changed = [
        replace(base, path=Path("/x/b.mp4")),
        replace(base, label="jump"),
        replace(base, label=None),
        replace(base, split="test"),
        replace(base, duration_seconds=3.3),
    ]
    prints = [Manifest((r,)).fingerprint() for r in [base, *changed]]
    assert len(set(prints)) == 6
    assert all(len(p) == 16 and int(p, 16) >= 0 for p in prints)
    assert Manifest((replace(base, path=Path("/y/a.mp4")),)).fingerprint() == prints[0]
    assert Manifest((base, changed[0])).fingerprint() != Manifest((changed[0], base)).fingerprint()


# ---- splits ---------------------------------------------------------------------------------------------------------

KEYS = st.lists(st.text("abcdefgh", min_size=1, max_size=3), max_size=60)


@given(KEYS, st.floats(0, 0.99), st.integers(0, 100), st.randoms())
def test_split_keeps_groups_and_ignores_order(keys: list[str], fraction: float, seed: int, random: object) -> None:
    split = assign_split(keys, fraction, seed)
    side = dict(zip(keys, split, strict=True))
    assert [side[key] for key in keys] == split  # one side a group
    assert sum(s == "test" for s in side.values()) == round(fraction * len(side))  # exact share of the groups
    shuffled = sorted(keys, key=lambda _: random.random())  # type: ignore[attr-defined]
    assert assign_split(shuffled, fraction, seed) == [side[key] for key in shuffled]


def test_split_depends_on_the_seed_and_grows_with_the_share() -> None:
    keys = [f"g{i}" for i in range(100)]
    assert assign_split(keys, 0.3, 0) != assign_split(keys, 0.3, 1)
    tests = [{k for k, s in zip(keys, assign_split(keys, f), strict=True) if s == "test"} for f in (0.1, 0.3)]
    assert tests[0] < tests[1]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2.0])
def test_fraction_is_checked(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"assign_split: test_fraction must be in \[0, 1\), got {fraction}"):
        assign_split(["a"], fraction)
