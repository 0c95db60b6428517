"""Folders and tables to lists of files: what matches what, links and paths that lead out, and bad input."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmacc.clips.catalog.listing import LabelTable, Listing, ListingError, list_folders, other_files, place_within

Lay = Callable[..., Path]


@pytest.fixture
def lay(tmp_path: Path) -> Lay:
    """Empty files under the given names: a listing opens none."""

    def lay(*names: str, root: str = "films") -> Path:
        for name in names:
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / root

    return lay


def labels_of(listing: Listing) -> dict[str, str | None]:
    return {file.path.relative_to(file.root).as_posix(): file.label for file in listing.files}


def test_class_folders_in_the_order_of_paths(lay: Lay) -> None:
    root = lay("run/b.mp4", "run/deep/c.MP4", "run-fast/a.wav", "a.mp4", "run/notes.txt", "run/mp4")
    listing = list_folders([root])
    paths = [file.path for file in listing.files]
    assert paths == sorted(paths)  # as paths: "run" before "run-fast", which as text is the other way round
    assert labels_of(listing) == {
        "a.mp4": None,
        "run/b.mp4": "run",
        "run/deep/c.MP4": "run",
        "run-fast/a.wav": "run-fast",
    }
    assert (listing.missing, listing.unmatched_count, listing.listed_count, listing.skipped) == ((), 0, 0, ())
    assert all(file.root == root and (file.start_seconds, file.end_seconds) == (0.0, None) for file in listing.files)


def test_one_folder_is_no_class(lay: Lay) -> None:
    assert labels_of(list_folders([lay("clips/a.mp4", "clips/b.mp4", "c.mp4")])) == {
        "c.mp4": None,
        "clips/a.mp4": None,
        "clips/b.mp4": None,
    }


def test_a_relative_folder_gives_absolute_paths(lay: Lay, monkeypatch: pytest.MonkeyPatch) -> None:
    root = lay("a.mp4")
    monkeypatch.chdir(root.parent)
    (file,) = list_folders(["films"]).files
    assert (file.path, file.root) == (root / "a.mp4", root)


def test_overlapping_folders_give_each_file_once(lay: Lay) -> None:
    root = lay("x/a.mp4", "y/b.mp4")
    (root.parent / "again").symlink_to(root)
    listing = list_folders([root, root / "x", root.parent / "again"])
    assert [file.path for file in listing.files] == [root / "x/a.mp4", root / "y/b.mp4"]


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    path.write_text("\n".join(lines), encoding="utf-8-sig")


def write_objects(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text(json.dumps(rows))


def write_mapping(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text(json.dumps({row["file"]: {k: v for k, v in row.items() if k != "file"} for row in rows}))


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8-sig")


@pytest.mark.parametrize(
    ("name", "write"),
    [("t.csv", write_csv), ("t.json", write_objects), ("t.json", write_mapping), ("t.jsonl", write_jsonl)],
)
def test_a_table_of_any_kind(lay: Lay, tmp_path: Path, name: str, write: Callable[..., None]) -> None:
    root = lay("x/a.mp4", "y/a.mp4", "y/b.mp4", "z/c.mp4")
    rows = [
        {"file": "x/a.mp4", "label": "one", "part": "train", "scene": "s1"},
        {"file": "somewhere/else/b.mp4", "label": "two", "part": "test", "scene": ""},
        {"file": "other.mp4", "label": "no", "part": "", "scene": ""},
    ]
    write(tmp_path / name, rows)
    listing = list_folders([root], LabelTable(tmp_path / name, split_column="part", group_column="scene"))
    assert [(f.path.relative_to(root).as_posix(), f.label, f.split, f.group) for f in listing.files] == [
        ("x/a.mp4", "one", "train", "s1"),
        ("y/a.mp4", None, None, None),  # a name that two files bear says nothing, and with a table no folder is a class
        ("y/b.mp4", "two", "test", None),
        ("z/c.mp4", None, None, None),
    ]
    assert (listing.missing, listing.unmatched_count, listing.listed_count) == (("other.mp4",), 2, 3)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", '\ufeff path , label\r\na.mp4,dog \r\n b.mp4 ," cat"\r\nc.mp4,\ufeffdog\r\nd.mp4, \r\n'),
        ("t.json", '{"a.mp4": {"label ": "dog "}, " b.mp4": {"label ": " cat"}, "c.mp4": {"label ": "dog\\u00a0"}}'),
    ],
)
def test_blanks_around_names_make_no_other_names(lay: Lay, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, newline="")
    listing = list_folders([lay("a.mp4", "b.mp4", "c.mp4", "d.mp4")], LabelTable(tmp_path / name))
    assert labels_of(listing) == {"a.mp4": "dog", "b.mp4": "cat", "c.mp4": "dog", "d.mp4": None}
    assert listing.missing == ()


def test_files_that_are_passed_over_are_counted_by_their_extension(lay: Lay) -> None:
    root = lay("a.MTS", "b.ac3", "c.txt", "x/d.TXT", "x/e.jpg", "README", "x/f.mp4")
    listing = list_folders([root, root / "x"])  # what two of the folders hold counts once
    assert set(labels_of(listing)) == {"a.MTS", "b.ac3", "x/f.mp4"}
    assert listing.other_endings == ((".txt", 2), ("", 1), (".jpg", 1))
    line = "4 files were not examined because of the file extension: .txt 2, no extension 1, .jpg 1"
    assert other_files(listing.other_endings) == line
    assert other_files([(f".{i}", 2) for i in range(12)]).endswith(".9 2, others 4")
    with pytest.raises(ListingError, match=r"no media file under .*void; 1 file was not examined .*: \.doc 1"):
        list_folders([lay("a.doc", root="void")])


def test_json_values_that_are_no_text(lay: Lay, tmp_path: Path) -> None:
    table = tmp_path / "t.json"
    table.write_text('{"a.mp4": {"label": 3}, "b.mp4": {"label": null}, "c.mp4": {}}')
    assert labels_of(list_folders([lay("a.mp4", "b.mp4", "c.mp4")], LabelTable(table))) == {
        "a.mp4": "3",
        "b.mp4": None,
        "c.mp4": None,
    }


def test_name_that_stands_twice_in_the_table_matches_none(lay: Lay, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,label\np/a.mp4,one\nq/a.mp4,two\n")
    listing = list_folders([lay("x/a.mp4")], LabelTable(tmp_path / "t.csv"))
    assert (labels_of(listing), listing.missing) == ({"x/a.mp4": None}, ("p/a.mp4", "q/a.mp4"))


def test_table_without_labels_keeps_class_folders(lay: Lay, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("name,part\nx/a.mp4,test\nlost\n,stray\n")
    labels = LabelTable(tmp_path / "t.csv", label_column=None, split_column="part", path_column="name")
    listing = list_folders([lay("x/a.mp4", "y/b.mp4")], labels)
    assert [(file.label, file.split) for file in listing.files] == [("x", "test"), ("y", None)]
    assert (listing.missing, listing.unmatched_count) == (("lost",), 1)


def test_paths_of_a_table_in_other_forms(lay: Lay, tmp_path: Path) -> None:
    decomposed, composed = "e\u0301.mp4", "\u00e9.mp4"
    root = lay("x/a.mp4", "y/a.mp4", "z/a.mp4", decomposed)
    (tmp_path / "link").symlink_to(root)
    (tmp_path / "t.csv").write_text(
        f"path,label\n./x//a.mp4,one\n{root}/y/a.mp4,two\n{tmp_path}/link/z/a.mp4,three\n{composed},four\n"
    )
    for given_as in (root, tmp_path / "link"):
        listing = list_folders([given_as], LabelTable(tmp_path / "t.csv"))
        assert labels_of(listing) == {"x/a.mp4": "one", "y/a.mp4": "two", "z/a.mp4": "three", decomposed: "four"}
        assert (listing.missing, listing.unmatched_count) == ((), 0)


def test_rows_that_leave_the_folder_are_skipped(lay: Lay, tmp_path: Path) -> None:
    root = lay("a.mp4", "b.mp4")
    lay("c.mp4", root="elsewhere")
    (tmp_path / "t.csv").write_text(f"path,label\n../elsewhere/c.mp4,x\nx/../../a.mp4,x\n{tmp_path}/b.mp4,x\na.mp4,y\n")
    listing = list_folders([root], LabelTable(tmp_path / "t.csv"))
    assert labels_of(listing) == {"a.mp4": "y", "b.mp4": None}
    assert [path.as_posix() for path, _ in listing.skipped] == [
        "../elsewhere/c.mp4",
        "x/../../a.mp4",
        f"{tmp_path}/b.mp4",
    ]
    assert listing.skipped[0][1] == f"leaves the scanned folders; so label table {tmp_path / 't.csv'}, line 2"
    assert (listing.missing, listing.unmatched_count, listing.listed_count) == ((), 1, 4)
    # With a second folder that holds it, the row that names it in full is good.
    (tmp_path / "t.csv").write_text(f"path,label\n{tmp_path}/elsewhere/c.mp4,x\n")
    listing = list_folders([root, tmp_path / "elsewhere"], LabelTable(tmp_path / "t.csv"))
    assert labels_of(listing)["c.mp4"] == "x"
    assert listing.skipped == ()


@given(st.lists(st.sampled_from(["..", ".", "a", "b", ""]), min_size=1, max_size=8), st.booleans())
def test_place_within_leaves_no_root(parts: list[str], absolute: bool) -> None:
    path = ("/srv/films/" if absolute else "") + "/".join(parts)
    place = place_within(path.lstrip("/") if not absolute else path, ["/srv/films"])
    if place is not None:
        landed = os.path.normpath(os.path.join("/srv/films", place))
        assert landed.startswith("/srv/films/")
        assert landed == os.path.normpath(os.path.join("/srv/films", path if absolute else path.lstrip("/")))


def test_links(lay: Lay, tmp_path: Path) -> None:
    root = lay("x/a.mp4", "y/b.mp4", "blobs/0123")
    outside = lay("secret.mp4", root="elsewhere")
    (root / "x/again.mp4").symlink_to("a.mp4")  # a double
    (root / "x/kept.mp4").symlink_to("../blobs/0123")  # media by the link's name alone
    (root / "x/out.mp4").symlink_to(outside / "secret.mp4")
    (root / "x/void.mp4").symlink_to("nothing.mp4")
    (root / "x/self.mp4").symlink_to("self.mp4")
    (root / "x/loop").symlink_to(root)
    (root / "x/note.txt").symlink_to(outside / "secret.mp4")  # of no concern
    (root / "y/folder.mp4").mkdir()
    os.mkfifo(root / "y/pipe.mp4")
    listing = list_folders([root])
    assert labels_of(listing) == {"x/a.mp4": "x", "x/kept.mp4": "x", "y/b.mp4": "y"}
    reasons = {path.relative_to(root).as_posix(): reason for path, reason in listing.skipped}
    assert reasons == {
        "x/loop": f"is a link to the folder {root}; links to folders are not followed",
        "x/out.mp4": f"is a link to {outside}/secret.mp4, outside {root}",
        "x/self.mp4": f"is a link to {root}/x/self.mp4, where no file is",
        "x/void.mp4": f"is a link to {root}/x/nothing.mp4, where no file is",
    }
    # The name that the table has stands for the file, be it a link's.
    (tmp_path / "t.csv").write_text("path,label\nx/again.mp4,one\n")
    assert labels_of(list_folders([root], LabelTable(tmp_path / "t.csv"))) == {
        "x/again.mp4": "one",
        "x/kept.mp4": None,
        "y/b.mp4": None,
    }


def test_a_folder_of_nothing_but_skipped_links_says_so(lay: Lay) -> None:
    outside = lay("secret.mp4", root="elsewhere")
    root = lay("notes.txt")
    (root / "a.mp4").symlink_to(outside / "secret.mp4")
    with pytest.raises(
        ListingError, match=r"no media file under .*films; skipped 1, such as .*a\.mp4, which is a link"
    ):
        list_folders([root])


def test_folder_that_cannot_be_read_is_told(lay: Lay, monkeypatch: pytest.MonkeyPatch) -> None:
    root = lay("x/a.mp4", "locked/b.mp4")
    scandir = os.scandir

    def refuse(path: str) -> object:  # tests may run as root, who can read everything
        if str(path).endswith("locked/"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    listing = list_folders([root])
    assert labels_of(listing) == {"x/a.mp4": None}
    assert listing.skipped == ((root / "locked", "cannot be read (Permission denied)"),)


def test_folders_that_cannot_be_listed(lay: Lay, tmp_path: Path) -> None:
    root = lay("a.mp4")
    (tmp_path / "void").mkdir()
    for folder, message in [
        (tmp_path / "gone", "gone must be a folder, got nothing there"),
        (root / "a.mp4", r"a\.mp4 must be a folder, got a file"),
        (tmp_path / "void", "no media file under .*void$"),
    ]:
        with pytest.raises(ListingError, match=f"list_folders: .*{message}"):
            list_folders([folder])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", None, r"t\.csv: no such file"),
        ("t.csv", "file,kind\na.mp4,x\n", r"t\.csv: no column 'label'; it has file, kind"),
        (
            "t.csv",
            "file,label\na.mp4,x\n./a.mp4,y\n",
            r"t\.csv, line 3: './a\.mp4' must say what it said before, .*'y'",
        ),
        ("t.csv", b"file,label\na.mp4,\xe9\n", r"t\.csv: cannot be read \('utf-8' codec"),
        ("t.json", "[{", r"t\.json: cannot be read \("),
        ("t.json", "3", r"t\.json: must hold a list of objects or one object by path, got '3'"),
        ("t.json", '["a.mp4"]', r"t\.json, entry 1: must be an object, got 'a\.mp4'"),
        ("t.json", '{"a.mp4": "x"}', r"t\.json, entry 'a\.mp4': must be an object, got 'x'"),
        ("t.json", '[{"path": "a.mp4"}]', r"t\.json: no column 'label'; it has path"),
        ("t.jsonl", '{"path": "a.mp4", "label": ["x"]}', r"t\.jsonl, line 1: label must be a text or .*, got \['x'\]"),
        ("t.jsonl", '{"path": "a.mp4", "label": "x"}\n{', r"t\.jsonl: cannot be read \("),
    ],
)
def test_tables_that_do_not_fit(lay: Lay, tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ListingError, match=f"^label table .*{message}"):
        list_folders([lay("a.mp4")], LabelTable(tmp_path / name))


def test_columns_that_the_table_lacks(lay: Lay, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file,kind\na.mp4,x\n")
    for option in ({"split_column": "part"}, {"group_column": "part"}, {"path_column": "part"}):
        with pytest.raises(ListingError, match=r"t\.csv: no column 'part'; it has file, kind"):
            list_folders([lay("a.mp4")], LabelTable(tmp_path / "t.csv", "kind", **option))


def test_names_that_are_not_text_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.mp4")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    listing = list_folders([tmp_path])
    assert [file.path.name for file in listing.files] == ["a.mp4"]
    assert [(path.name, reason) for path, reason in listing.skipped] == [("b\\xff.mp4", "its name is not UTF-8")]
