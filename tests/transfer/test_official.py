"""The official divisions against the official lists themselves, read here in another way."""

import csv
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cmacc.clips import Listing, Manifest, MediaRecord, ScanResult
from cmacc.transfer import official
from cmacc.transfer.official import OFFICIAL, official_task
from cmacc.transfer.tasks import TaskData, TaskError, TaskName


@pytest.fixture
def no_files_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scan, without opening any file: 13,320 of them are empty here."""

    def scanned(listing: Listing, **_: Any) -> ScanResult:
        records = [
            MediaRecord(
                file.path,
                5.0,
                25.0,
                320,
                240,
                True,
                44_100,
                file.label,
                file.split,
                file.group,
                content_hash=file.path.stem,
            )
            for file in listing.files
        ]
        return ScanResult(Manifest(records), {}, {}, listing)

    monkeypatch.setattr(official, "scan", scanned)


def _touched(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def _sides(data: TaskData, part: int) -> tuple[list[str], list[str]]:
    names = [Path(path).stem for path in data.manifest.column("path")]
    return [names[i] for i in data.splits[part].train], [names[i] for i in data.splits[part].test]


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.usefixtures("no_files_opened")
def test_ucf101_is_its_three_lists(real_data: Path, tmp_path: Path) -> None:
    lists = real_data / "splits" / "ucf101"
    given = {
        (part, number): [
            line.split()[0] for line in (lists / f"{part}list0{number}.txt").read_text().splitlines() if line
        ]
        for part in ("train", "test")
        for number in (1, 2, 3)
    }
    root = _touched(tmp_path, given["train", 1] + given["test", 1])
    data = official_task("ucf101", root, lists=lists)
    assert [split.name for split in data.splits] == ["split 1", "split 2", "split 3"]
    for number in (1, 2, 3):
        train, test = _sides(data, number - 1)
        for side, part in ((train, "train"), (test, "test")):
            assert sorted(side) == sorted(Path(name).stem for name in given[part, number])
            assert Counter(name.split("_")[1] for name in side) == Counter(n.split("_")[1] for n in given[part, number])
        split = data.splits[number - 1]
        assert len(train) + len(test) == 13_320
        # A group is cut from one film: none of it may be on both sides.
        groups = data.manifest.column("group")
        assert not {groups[i] for i in split.train} & {groups[i] for i in split.test}
    assert len(set(data.class_of)) == 101
    assert not data.facts.is_partial
    assert data.facts.files == data.facts.files_listed == 13_320


@pytest.mark.real_data
@pytest.mark.usefixtures("no_files_opened")
def test_hmdb51_has_70_and_30_clips_a_class(real_data: Path, tmp_path: Path) -> None:
    lists = real_data / "splits" / "hmdb51" / "testTrainMulti_7030_splits"
    names = []
    for path in lists.glob("*_test_split1.txt"):
        folder = path.name.removesuffix("_test_split1.txt")
        names += [f"{folder}/{line.rsplit(maxsplit=1)[0]}" for line in path.read_text().splitlines() if line.strip()]
    data = official_task("hmdb51", _touched(tmp_path, names), lists=lists)
    for split in data.splits:
        assert set(Counter(data.class_of[list(split.train)].tolist()).values()) == {70}
        assert set(Counter(data.class_of[list(split.test)].tolist()).values()) == {30}
        assert not set(split.train) & set(split.test)
    assert len(set(data.class_of)) == 51
    assert data.facts.files == data.facts.files_listed == 6_371  # 395 clips stand in no split
    # One clip that no split uses does not matter, one that the second uses does.
    used = [set(split.train) | set(split.test) for split in data.splits]
    paths = data.manifest.column("path")
    unused = next(i for i in range(len(paths)) if not any(i in ids for ids in used))
    Path(paths[unused]).unlink()
    Path(paths[min(used[1] - used[0])]).unlink()
    assert not official_task("hmdb51", tmp_path, lists=lists, parts=[1]).facts.is_partial
    with pytest.raises(TaskError, match=r"hmdb51, split 2: .* must hold all 5,100 files .*, got 5,099 files of 51"):
        official_task("hmdb51", tmp_path, lists=lists, parts=[2])
    partial = official_task("hmdb51", tmp_path, lists=lists, allow_partial=True).facts
    assert partial.is_partial
    assert (partial.files, partial.files_listed) == (6_370, 6_371)


@pytest.mark.real_data
@pytest.mark.usefixtures("no_files_opened")
@pytest.mark.parametrize(("task", "classes", "fold_size"), [("esc50", 50, 400), ("esc10", 10, 80)])
def test_esc_is_held_out_fold_by_fold(
    real_data: Path, tmp_path: Path, task: TaskName, classes: int, fold_size: int
) -> None:
    meta = real_data / "esc50" / "meta" / "esc50.csv"
    with meta.open() as file:
        rows = [row for row in csv.DictReader(file) if task == "esc50" or row["esc10"] == "True"]
    data = official_task(task, _touched(tmp_path, [row["filename"] for row in rows]), lists=meta)
    for number, split in enumerate(data.splits, start=1):
        _, test = _sides(data, number - 1)
        assert sorted(test) == sorted(Path(row["filename"]).stem for row in rows if row["fold"] == str(number))
        assert set(Counter(data.class_of[list(split.test)].tolist()).values()) == {8}
        assert len(split.test) == fold_size
        assert sorted((*split.train, *split.test)) == list(range(len(rows)))
    assert len(data.splits) == 5
    assert data.facts.classes == classes


@pytest.mark.real_data
def test_a_part_of_ucf101_is_evaluated_only_where_it_is_asked_for(real_data: Path, tmp_path: Path) -> None:
    lists = real_data / "splits"
    held_out = {"BabyCrawling": ["g01_c01", "g02_c01"], "Punch": ["g01_c01"], "JumpingJack": ["g01_c01"]}
    trained = {"BabyCrawling": ["g08_c01"], "Punch": ["g08_c01", "g08_c02"], "PushUps": ["g08_c01"]}
    for part in (held_out, trained):
        for name, clips in part.items():
            for clip in clips:
                shutil.copy(real_data / "ucf101" / name / f"v_{name}_{clip}.mp4", tmp_path)
    with pytest.raises(TaskError, match=r"ucf101, split 1: .* 13,320 files of 101 classes, got 8 files of 4;"):
        official_task("ucf101", tmp_path, lists=lists)
    data = official_task("ucf101", tmp_path, lists=lists, parts=[1], allow_partial=True, journal=tmp_path / "journal")
    train, test = _sides(data, 0)
    assert sorted(train) == [f"v_{name}_{clip}" for name, clips in sorted(trained.items()) for clip in clips]
    # JumpingJack has no training file here: nobody could name it, so it is no part of the result.
    assert sorted(test) == ["v_BabyCrawling_g01_c01", "v_BabyCrawling_g02_c01", "v_Punch_g01_c01"]
    assert data.facts.is_partial
    assert (data.facts.files, data.facts.files_listed) == (7, 13_320)
    assert (data.facts.classes, data.facts.classes_listed) == (3, 101)


@pytest.mark.parametrize("task", list(OFFICIAL))
def test_what_is_asked_of_an_official_set(task: TaskName, tmp_path: Path) -> None:
    _touched(tmp_path, ["a.avi"])
    with pytest.raises(TaskError, match=f"task {task}: --splits must be of 1 to {OFFICIAL[task].parts}, got 0, 9"):
        official_task(task, tmp_path, parts=[9, 0])
    with pytest.raises(TaskError, match=rf"task {task}: the official lists, with {OFFICIAL[task].marker}, must be in"):
        official_task(task, tmp_path)
