"""Files that appear whole: what reaches the disk, and in which order."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmacc.clips.storage import fsync_tree, written_aside


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | str]]:
    """``("fsync", inode)`` and ``("replace", name)`` in the order in which they happen."""
    made: list[tuple[str, int | str]] = []
    fsync: Callable[[int], None] = os.fsync
    replace: Callable[..., None] = os.replace

    def noted_fsync(descriptor: int) -> None:
        made.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def noted_replace(source: Any, target: Any, **options: Any) -> None:
        made.append(("replace", Path(target).name))
        replace(source, target, **options)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return made


def test_content_is_on_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, calls: list[tuple[str, int | str]]
) -> None:
    """After a power cut an empty file may stand there without the first wait, the old one without the last."""
    path = tmp_path / "a.json"
    path.write_text("old")
    with written_aside(path) as aside:
        aside.write_text("new")
        inode = aside.stat().st_ino
        assert path.read_text() == "old"
        assert calls == []
    assert calls == [("fsync", inode), ("replace", "a.json"), ("fsync", tmp_path.stat().st_ino)]
    assert path.read_text() == "new"


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), written_aside(path) as aside:
        aside.write_text(str(1 / 0))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.json": "old"}


def test_a_folder_to_be_renamed_is_on_disk_with_all_its_files(
    tmp_path: Path, calls: list[tuple[str, int | str]]
) -> None:
    names = ("a.json", "b", "b/c.safetensors")
    (tmp_path / "b").mkdir()
    for name in ("a.json", "b/c.safetensors"):
        (tmp_path / name).write_text(name)
    fsync_tree(tmp_path)
    assert {inode for _, inode in calls} == {(tmp_path / name).stat().st_ino for name in (".", *names)}
