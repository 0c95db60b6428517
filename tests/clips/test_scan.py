"""Folders to manifests: labels by folder and by table, bad files, splits; on real folders too."""

import csv
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from cmacc.clips.scan import LabelTable, ScanError, scan

from .conftest import Recipe

Tree = Callable[..., Path]


@pytest.fixture
def tree(media: Callable[[Recipe], Path], tmp_path: Path) -> Tree:
    """Lay out copies of one small film under the given names."""
    film = media(Recipe(seconds=0.2))

    def lay(*names: str) -> Path:
        root = tmp_path / "films"
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(film, root / name)
        return root

    return lay


def write_table(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def by_name(root: Path, **options: object) -> dict[str, tuple[str | None, str | None]]:
    result = scan([root], **options)  # type: ignore[arg-type]
    return {r.path.relative_to(root.absolute()).as_posix(): (r.label, r.split) for r in result.manifest.records}


def test_class_folders(tree: Tree) -> None:
    root = tree("run/b.mp4", "run/deep/c.MP4", "jump/a.mp4")
    (root / "run" / "notes.txt").write_text("no film")
    seen: list[tuple[int, int]] = []
    result = scan([root], progress=lambda done, total: seen.append((done, total)))
    assert [r.path for r in result.manifest.records] == sorted(r.path for r in result.manifest.records)
    assert by_name(root) == {"run/b.mp4": ("run", None), "run/deep/c.MP4": ("run", None), "jump/a.mp4": ("jump", None)}
    assert (result.bad_files, result.unmatched_count) == ({}, 0)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    record = result.manifest.records[0]
    assert (record.width, record.height, record.fps, record.has_audio) == (64, 48, 25.0, True)
    assert record.duration_seconds == pytest.approx(0.2, abs=0.01)


def test_one_folder_is_no_class(tree: Tree) -> None:
    assert by_name(tree("clips/a.mp4", "clips/b.mp4")) == {"clips/a.mp4": (None, None), "clips/b.mp4": (None, None)}


def test_table_by_path_and_by_name(tree: Tree, tmp_path: Path) -> None:
    root = tree("x/a.mp4", "y/a.mp4", "y/b.mp4", "z/c.mp4")
    table = write_table(
        tmp_path / "t.csv", "file,label,split\nx/a.mp4,one,train\nsomewhere/else/b.mp4,two,test\nother.mp4,no,\n"
    )
    labels = LabelTable(table, split_column="split")
    result = scan([root], labels=labels)
    assert result.unmatched_count == 2
    assert by_name(root, labels=labels) == {
        "x/a.mp4": ("one", "train"),
        "y/a.mp4": (None, None),  # a name that two files bear says nothing, and with a table no folder is a class
        "y/b.mp4": ("two", "test"),
        "z/c.mp4": (None, None),
    }


def test_name_that_stands_twice_in_the_table_matches_none(tree: Tree, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", "path,label\np/a.mp4,one\nq/a.mp4,two\n")
    assert by_name(tree("x/a.mp4"), labels=LabelTable(table)) == {"x/a.mp4": (None, None)}


def test_table_for_splits_keeps_class_folders(tree: Tree, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", "name,part\nx/a.mp4,test\n")
    labels = LabelTable(table, label_column=None, split_column="part", path_column="name")
    assert by_name(tree("x/a.mp4", "y/b.mp4"), labels=labels) == {"x/a.mp4": ("x", "test"), "y/b.mp4": ("y", None)}


def test_table_with_empty_cells_and_short_rows(tree: Tree, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", "label,path\n,x/a.mp4\nlost\nstray,\n")
    assert by_name(tree("x/a.mp4", "y/b.mp4"), labels=LabelTable(table)) == {
        "x/a.mp4": (None, None),
        "y/b.mp4": (None, None),
    }


def test_bad_files_are_counted_and_left_out(tree: Tree) -> None:
    root = tree("a.mp4")
    (root / "broken.mp4").write_bytes(b"no film")
    (root / "empty.wav").write_bytes(b"")
    result = scan([root], workers=1)
    assert [r.path.name for r in result.manifest.records] == ["a.mp4"]
    assert {path.name for path in result.bad_files} == {"broken.mp4", "empty.wav"}
    assert "does not decode" in result.bad_files[(root / "broken.mp4").absolute()]


def test_overlapping_folders_give_each_file_once(tree: Tree) -> None:
    root = tree("x/a.mp4", "y/b.mp4")
    result = scan([root, root / "x"])
    assert [r.path.name for r in result.manifest.records] == ["a.mp4", "b.mp4"]


def test_test_fraction_shares_groups_out(tree: Tree, tmp_path: Path) -> None:
    root = tree(*(f"g{i // 2}/{i}.mp4" for i in range(8)))
    table = write_table(
        tmp_path / "t.csv", "file,group,split\n" + "".join(f"g{i // 2}/{i}.mp4,g{i // 2},\n" for i in range(8))
    )
    labels = LabelTable(table, label_column=None, group_column="group")
    outcome = by_name(root, labels=labels, test_fraction=0.5, seed=3)
    groups = {name.split("/")[0]: split for name, (_, split) in outcome.items()}
    assert all(groups[name.split("/")[0]] == split for name, (_, split) in outcome.items())
    assert Counter(groups.values()) == {"train": 2, "test": 2}
    assert outcome == by_name(root, labels=labels, test_fraction=0.5, seed=3)
    alone = by_name(root, test_fraction=0.25)
    assert Counter(split for _, split in alone.values()) == {"train": 6, "test": 2}


def test_table_splits_win_over_the_fraction(tree: Tree, tmp_path: Path) -> None:
    root = tree("a.mp4", "b.mp4", "c.mp4", "d.mp4")
    table = write_table(tmp_path / "t.csv", "file,split\na.mp4,val\n")
    outcome = by_name(root, labels=LabelTable(table, label_column=None, split_column="split"), test_fraction=0.5)
    assert outcome["a.mp4"] == (None, "val")
    assert {outcome[name][1] for name in ("b.mp4", "c.mp4", "d.mp4")} <= {"train", "test"}


def test_what_cannot_be_scanned(tree: Tree, tmp_path: Path) -> None:
    root = tree("a.mp4")
    (tmp_path / "void").mkdir()
    for folder, message in [
        (tmp_path / "gone", "must be a folder, got nothing there"),
        (root / "a.mp4", "must be a folder, got a file"),
        (tmp_path / "void", "no media file under .*void"),
    ]:
        with pytest.raises(ScanError, match=f"scan: .*{message}"):
            scan([folder])
    with pytest.raises(ScanError, match=r"label table .*gone\.csv: no such file"):
        scan([root], labels=LabelTable(tmp_path / "gone.csv"))
    table = write_table(tmp_path / "t.csv", "file,kind\na.mp4,x\n")
    for labels, missing in [
        (LabelTable(table), "label"),
        (LabelTable(table, label_column="kind", split_column="part"), "part"),
        (LabelTable(table, label_column="kind", group_column="g"), "g"),
        (LabelTable(table, label_column="kind", path_column="uri"), "uri"),
    ]:
        with pytest.raises(ScanError, match=rf"label table .*t\.csv: no column '{missing}'; it has file, kind"):
            scan([root], labels=labels)
    (tmp_path / "latin.csv").write_bytes("file,label\na.mp4,é\n".encode("latin-1"))
    with pytest.raises(ScanError, match=r"latin\.csv: cannot be read"):
        scan([root], labels=LabelTable(tmp_path / "latin.csv"))


@pytest.mark.slow
@pytest.mark.real_data
def test_ucf101_with_its_manifest(real_data: Path) -> None:
    root = real_data / "ucf101"
    result = scan([root], labels=LabelTable(root / "manifest.csv", split_column="split1"), workers=2)
    with (root / "manifest.csv").open() as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert (len(result.manifest), result.bad_files, result.unmatched_count) == (792, {}, 0)
    for record in result.manifest.records:
        row = rows[record.path.relative_to(root).as_posix()]
        assert (record.label, record.split) == (row["label"], row["split1"])
        assert record.has_audio == (row["has_audio"] == "1")
        assert record.duration_seconds == pytest.approx(float(row["duration"]), abs=0.05)
    assert Counter(r.label for r in result.manifest.records if r.has_audio) == {
        "BabyCrawling": 132,
        "BodyWeightSquats": 112,
        "BoxingPunchingBag": 163,
    }


@pytest.mark.slow
@pytest.mark.real_data
def test_grid_with_its_commands(real_data: Path) -> None:
    labels = LabelTable(real_data / "grid" / "labels.csv", label_column="command")
    result = scan([real_data / "grid" / "clips"], labels=labels, test_fraction=0.25, workers=2)
    assert (len(result.manifest), result.bad_files, result.unmatched_count) == (800, {}, 0)
    assert result.manifest.classes() == ["bin", "lay", "place", "set"]
    for record in result.manifest.records:
        assert record.label is not None
        assert record.label[0] == record.path.name[0]  # GRID's file names begin with the command's letter
    assert sum(r.split == "test" for r in result.manifest.records) == 200
