"""Scans: from listed files to a manifest, restartable, with copies found and bad files skipped."""

import dataclasses
import importlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmacc.clips.catalog.listing import LabelTable, ListedFile, Listing, list_folders
from cmacc.clips.catalog.manifest import Manifest
from cmacc.clips.catalog.scan import ScanError, examine_files, scan

from ..films import changing_sound, moving_picture, write_film

scan_module = importlib.import_module("cmacc.clips.catalog.scan")  # the package gives the function of that name


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six different films of half a second; nothing may change them."""
    folder = tmp_path_factory.mktemp("films")
    for seed in range(6):
        write_film(folder / f"{seed}.mp4", moving_picture(0.5, seed), changing_sound(0.5, seed))
    return folder


@pytest.fixture
def tree(films: Path, tmp_path: Path) -> Callable[..., Path]:
    """Lay out the films under the given names, in their order."""

    def lay(*names: str) -> Path:
        root = tmp_path / "films"
        for number, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(films / f"{number}.mp4", root / name)
        return root

    return lay


Tree = Callable[..., Path]


class Counting(Executor):
    """Runs tasks at once in this thread, and counts the files that it was given."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.files: list[Path] = []
        self._stop_after = stop_after

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        if self._stop_after is not None and len(self.files) >= self._stop_after:
            future.set_exception(KeyboardInterrupt())
            return future
        self.files += arguments[0]
        future.set_result(function(*arguments, **options))
        return future


def test_labels_splits_and_facts_go_into_the_manifest(tree: Tree) -> None:
    root = tree("run/b.mp4", "jump/a.mp4")
    seen: list[tuple[int, int]] = []
    result = scan(list_folders([root]), progress=lambda what, done, total: seen.append((done, total)))
    first, second = result.manifest.records
    assert (first.path, first.label) == (root / "jump" / "a.mp4", "jump")
    assert (second.path, second.label) == (root / "run" / "b.mp4", "run")
    assert (first.width, first.height, first.fps, first.has_audio, first.audio_rate_hz) == (128, 96, 10.0, True, 16_000)
    assert first.duration_seconds == pytest.approx(0.5, abs=0.01)
    assert first.findings == ()
    assert first.content_hash == result.examinations[root / "jump" / "a.mp4"].content_hash
    assert result.skipped == {}
    assert (seen[0], seen[-1]) == ((0, 2), (2, 2))


def test_bad_files_are_told_and_left_out(tree: Tree) -> None:
    root = tree("a.mp4")
    (root / "broken.mp4").write_bytes(b"no film")
    (root / "empty.wav").write_bytes(b"")
    (root / "out.mp4").symlink_to("/etc/hostname")
    result = scan(list_folders([root]))
    assert [r.path.name for r in result.manifest.records] == ["a.mp4"]  # type: ignore[union-attr]
    assert {path.name for path in result.skipped} == {"broken.mp4", "empty.wav", "out.mp4"}
    assert result.skipped[root / "broken.mp4"].startswith("unreadable: does not decode")


def test_what_is_skipped_is_for_the_caller_to_say(tree: Tree) -> None:
    root = tree("a.mp4", "b.mp4")
    write_film(root / "mute.mp4", moving_picture(0.5, 9), None)
    listing = list_folders([root])
    assert len(scan(listing).manifest) == 3
    result = scan(listing, exclude=["no_audio"])
    assert [path.name for path in result.skipped] == ["mute.mp4"]
    assert len(scan(listing, min_seconds=0.6).manifest) == 0
    (root / "broken.mp4").write_bytes(b"no film")
    assert len(scan(list_folders([root]), exclude=[]).manifest) == 3  # nothing can be known of what cannot be read
    with pytest.raises(ScanError, match=r"exclude must name findings .*, got mute"):
        scan(listing, exclude=["mute"])
    with pytest.raises(ScanError, match=r"must hold at least one media file, got none of 0 listed ones"):
        scan(Listing((), (), 0, 0))
    with pytest.raises(ScanError, match=r"test_fraction must be in \[0, 1\), got -0\.1"):
        scan(listing, test_fraction=-0.1)


def test_copies_are_marked_and_stay_in_one_split(tree: Tree, films: Path) -> None:
    root = tree(*(f"{i}.mp4" for i in range(6)))
    for i in range(6):
        shutil.copy(films / f"{i}.mp4", root / f"copy{i}.mp4")
        small = np.ascontiguousarray(moving_picture(0.5, i)[:, ::2, ::2])
        write_film(root / f"small{i}.mp4", small, 0.6 * changing_sound(0.5, i), crf=24)
    result = scan(list_folders([root]), test_fraction=0.5)
    findings = {record.path.name: record.findings for record in result.manifest.records}  # type: ignore[union-attr]
    assert all(findings[f"{i}.mp4"] == () for i in range(6))
    assert all(findings[f"copy{i}.mp4"] == ("duplicate",) for i in range(6))
    near = [i for i in range(6) if findings[f"small{i}.mp4"] == ("near_duplicate",)]
    assert len(near) >= 5
    detail = result.examinations[root / f"small{near[0]}.mp4"].findings[0].detail
    assert f"/{near[0]}.mp4 (" in detail
    assert "of the picture" in detail
    splits = {record.path.name: record.split for record in result.manifest.records}  # type: ignore[union-attr]
    assert all(splits[f"{i}.mp4"] == splits[f"copy{i}.mp4"] for i in range(6))
    assert all(splits[f"{i}.mp4"] == splits[f"small{i}.mp4"] for i in near)
    assert set(splits.values()) == {"train", "test"}


def test_groups_stay_in_one_split_and_given_splits_win(tree: Tree, tmp_path: Path) -> None:
    root = tree(*(f"g{i // 2}/{i}.mp4" for i in range(6)))
    table = tmp_path / "t.csv"
    rows = [f"g{i // 2}/{i}.mp4,g{i // 2},{'val' if i == 0 else ''}\n" for i in range(6)]
    table.write_text("file,group,split\n" + "".join(rows))
    labels = LabelTable(table, label_column=None, group_column="group", split_column="split")
    records = scan(list_folders([root], labels), test_fraction=0.34, seed=3).manifest.records
    splits = [record.split for record in records]
    assert splits[:2] == ["val", "val"]  # the second goes with its group, of which the table has put the first there
    assert splits[2] == splits[3]
    assert splits[4] == splits[5]
    assert set(splits[2:]) <= {"train", "test"}
    assert [record.group for record in records] == ["g0", "g0", "g1", "g1", "g2", "g2"]


def test_a_copy_goes_where_the_listing_put_the_original(tree: Tree, films: Path, tmp_path: Path) -> None:
    root = tree(*(f"{i}.mp4" for i in range(6)))
    for i in range(6):
        shutil.copy(films / f"{i}.mp4", root / f"copy{i}.mp4")
    table = tmp_path / "t.csv"
    table.write_text("file,split\n" + "".join(f"{i}.mp4,{'test' if i % 2 else 'train'}\n" for i in range(6)))
    listing = list_folders([root], LabelTable(table, label_column=None, split_column="split"))
    splits = {r.path.name: r.split for r in scan(listing, test_fraction=0.5).manifest.records}  # type: ignore[union-attr]
    assert all(splits[f"copy{i}.mp4"] == splits[f"{i}.mp4"] == ("test" if i % 2 else "train") for i in range(6))


def test_segments_of_one_file_are_samples_of_their_own(tree: Tree) -> None:
    root = tree("a.mp4")
    segments = ((0.1, 0.3), (0.2, 9.0), (7.0, 8.0))
    files = tuple(ListedFile(root / "a.mp4", root, "x", None, None, start, end) for start, end in segments)
    counting = Counting()
    assert len(scan(Listing(files, (), 0, 3), min_seconds=0.25).manifest) == 1
    result = scan(Listing(files, (), 0, 3), executor=counting)
    assert len(counting.files) == 1
    found = [(r.start_seconds, round(r.duration_seconds, 3)) for r in result.manifest.records]
    assert found == [(0.1, 0.2), (0.2, 0.3)]
    assert "segment begins at 7 s of 0.5 s" in result.skipped[root / "a.mp4"]


# ---- restarting -----------------------------------------------------------------------------------------------------


def written(result_path: Path, listing: Listing, **options: Any) -> bytes:
    scan(listing, test_fraction=0.3, **options).manifest.write(result_path)
    return result_path.read_bytes()


def test_only_changed_files_are_examined_again(tree: Tree, tmp_path: Path) -> None:
    root = tree("a.mp4", "b.mp4", "c.mp4")
    journal = tmp_path / "journal"
    whole = written(tmp_path / "m.parquet", list_folders([root]), journal=journal)
    counting = Counting()
    assert written(tmp_path / "m.parquet", list_folders([root]), journal=journal, executor=counting) == whole
    assert counting.files == []
    write_film(root / "b.mp4", moving_picture(0.7, 8), changing_sound(0.7, 8))
    (root / "c.mp4").unlink()
    changed = scan(list_folders([root]), journal=journal, executor=counting)
    assert counting.files == [root / "b.mp4"]
    assert [round(r.duration_seconds, 1) for r in changed.manifest.records] == [0.5, 0.7]
    assert len((journal / "journal.jsonl").read_text().splitlines()) == 2  # it does not grow with every scan


def test_an_interrupted_scan_goes_on_and_ends_the_same(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "_FILES_PER_TASK", 1)
    whole = written(tmp_path / "whole.parquet", list_folders([films]), journal=tmp_path / "j1")
    first = Counting(stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "m.parquet", list_folders([films]), journal=tmp_path / "j2", executor=first)
    journal = tmp_path / "j2" / "journal.jsonl"
    assert len(first.files) == 3
    with journal.open("a") as file:  # what a kill in the middle of a line leaves
        file.write(json.dumps({"path": str(films / "3.mp4"), "stamp": [1, 2]})[:-7])
    second = Counting()
    assert written(tmp_path / "m.parquet", list_folders([films]), journal=tmp_path / "j2", executor=second) == whole
    assert sorted([*first.files, *second.files]) == sorted(films.iterdir())
    assert journal.read_bytes() == (tmp_path / "j1" / "journal.jsonl").read_bytes()


def test_what_may_be_otherwise_next_time_is_asked_again(tree: Tree, tmp_path: Path) -> None:
    """A limit that was too short is noted as such; a disk that failed is not noted at all."""
    root = tree("a.mp4", "b.mp4")
    journal = tmp_path / "journal"
    too_short = scan(list_folders([root]), journal=journal, timeout_seconds=0.001)
    assert [path.name for path in too_short.skipped] == ["a.mp4", "b.mp4"]
    again = Counting()
    scan(list_folders([root]), journal=journal, timeout_seconds=0.0005, executor=again)
    assert again.files == []
    assert len(scan(list_folders([root]), journal=journal, executor=again).manifest) == 2
    assert len(again.files) == 2
    listing = list_folders([root])
    (root / "b.mp4").rename(tmp_path / "b.mp4")
    assert "FileNotFoundError" in scan(listing, journal=journal).skipped[root / "b.mp4"]
    (tmp_path / "b.mp4").rename(root / "b.mp4")
    assert len(scan(listing, journal=journal).manifest) == 2


def test_a_new_version_of_the_examination_asks_again(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "m.parquet", list_folders([films]), journal=tmp_path / "j")
    monkeypatch.setattr(scan_module, "VERSION", scan_module.VERSION + 1)
    counting = Counting()
    written(tmp_path / "m.parquet", list_folders([films]), journal=tmp_path / "j", executor=counting)
    assert len(counting.files) == 6


def test_parts_share_the_files_out_and_meet_in_the_journal(films: Path, tmp_path: Path) -> None:
    whole = written(tmp_path / "whole.parquet", list_folders([films]), journal=tmp_path / "j1")
    listing = list_folders([films])
    shares = [set(examine_files(listing, part=(i, 3), journal=tmp_path / "j2")) for i in (1, 2, 3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert set.union(*shares) == set(films.iterdir())
    counting = Counting()
    assert written(tmp_path / "m.parquet", listing, journal=tmp_path / "j2", executor=counting) == whole
    assert counting.files == []
    assert [path.name for path in (tmp_path / "j2").iterdir()] == ["journal.jsonl"]


# ---- real files -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.real_data
def test_real_files_with_their_labels(real_data: Path) -> None:
    """UCF101's punching bags, by the folder's own table: what it says of each file is what the scan finds."""
    root = real_data / "ucf101"
    listing = list_folders([root], LabelTable(root / "manifest.csv", split_column="split1", group_column="group"))
    assert (len(listing.files), listing.missing, listing.unmatched_count) == (792, (), 0)
    some = dataclasses.replace(listing, files=listing.files[::8])
    result = scan(some)
    assert result.skipped == {}
    table = {line.split(",")[0]: line for line in (root / "manifest.csv").read_text().splitlines()}
    for record in result.manifest.records:
        assert isinstance(record.path, Path)
        assert (record.label or "?") in table[record.path.relative_to(root).as_posix()]
        assert record.has_audio == (record.label in ("BabyCrawling", "BodyWeightSquats", "BoxingPunchingBag"))
        assert ("no_audio" in record.findings) == (not record.has_audio)
        assert record.split in ("train", "test")
    assert isinstance(result.manifest, Manifest)
