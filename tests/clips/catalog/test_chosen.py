"""Lists of chosen samples: what they name, and which files and segments of a listing they keep."""

from pathlib import Path

import pytest

from cmacc.clips import (
    ChosenSample,
    ListedFile,
    Listing,
    ListingError,
    Manifest,
    MediaRecord,
    keep_chosen,
    list_folders,
    read_chosen,
)


def record(path: Path, start_seconds: float = 0.0) -> MediaRecord:
    return MediaRecord(path, 1.0, 0.0, 1, 1, True, 0, start_seconds=start_seconds)


def test_a_manifest_names_segments_and_a_text_whole_files(tmp_path: Path) -> None:
    Manifest([record(tmp_path / "a.mp4"), record(tmp_path / "b.mp4", 2.5)]).write(tmp_path / "list.csv")
    assert read_chosen(tmp_path / "list.csv") == [
        ChosenSample(f"{tmp_path}/a.mp4", None, 0.0),
        ChosenSample(f"{tmp_path}/b.mp4", None, 2.5),
    ]
    (tmp_path / "list.txt").write_text("\ufeffa.mp4\r\n\n  b c.mp4 \n", encoding="utf-8")
    assert read_chosen(tmp_path / "list.txt") == [ChosenSample("a.mp4"), ChosenSample("b c.mp4")]
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ListingError, match=r"empty\.txt: must name at least one sample, got none"):
        read_chosen(tmp_path / "empty.txt")


def test_chosen_files_are_kept_and_others_are_missing(tmp_path: Path) -> None:
    for name in ("x/1.mp4", "x/2.mp4", "y/1.mp4"):
        (tmp_path / "films" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "films" / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "films")
    listing = list_folders([tmp_path / "link"])
    chosen = [ChosenSample(name) for name in ("y/1.mp4", f"{tmp_path}/films/x/2.mp4", "../other.mp4", "1.mp4")]
    kept = keep_chosen(listing, chosen)
    assert [file.path.relative_to(file.root).as_posix() for file in kept.files] == ["x/2.mp4", "y/1.mp4"]
    assert [file.label for file in kept.files] == ["x", "y"]
    assert kept.missing == ("../other.mp4", "1.mp4")
    assert kept.listed_count == 4


def test_segments_are_kept_by_their_start(tmp_path: Path) -> None:
    files = tuple(ListedFile(tmp_path / "a.mp4", tmp_path, None, None, None, start, start + 1) for start in (0.0, 4.0))
    listing = Listing(files, (), 0, 0)
    assert keep_chosen(listing, [ChosenSample("a.mp4", None, 4.0)]).files == files[1:]
    assert keep_chosen(listing, [ChosenSample("a.mp4")]).files == files
    assert keep_chosen(listing, [ChosenSample("a.mp4", None, 5.0)]).missing == ("a.mp4",)
