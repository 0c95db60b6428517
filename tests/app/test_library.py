"""Which files the page shows: those in the folders, by id, with links resolved."""

from pathlib import Path

import pytest

from cmacc.app import library as library_module
from cmacc.app.library import Library, Member
from cmacc.clips import Manifest, MediaError, PackedSample, decode_clip, list_folders, pack, scan
from cmacc.clips.storage import Extent

from ..search.scenes import SceneEncoder
from .conftest import World


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "inner").mkdir()
    for name in ("in/a.mp4", "in/deep/b.mp4", "inner/c.mp4", "secret.mp4"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_ids_tell_files_apart_and_are_no_paths(folder: Path) -> None:
    library = Library([folder / "in"])
    first, second = library.id_of(folder / "in" / "a.mp4"), library.id_of(folder / "in" / "deep" / "b.mp4")
    assert first != second
    assert first == library.id_of(folder / "in" / "a.mp4")
    assert first.isalnum()
    assert library.source(second) == (folder / "in" / "deep" / "b.mp4").resolve()
    with pytest.raises(KeyError):
        library.source("0" * 24)
    # An id counts once the page has shown the file, and not before.
    with pytest.raises(KeyError):
        Library([folder / "in"]).source(first)


@pytest.mark.parametrize(
    "path",
    ["secret.mp4", "in/../secret.mp4", "in/deep/../../secret.mp4", "inner/c.mp4", "in/link.mp4", "in/away/c.mp4"],
)
def test_nothing_outside_of_the_folders(folder: Path, path: str) -> None:
    (folder / "in" / "link.mp4").symlink_to(folder / "secret.mp4")
    (folder / "in" / "away").symlink_to(folder / "inner")
    library = Library([folder / "in"])
    name = library.id_of(folder / path)
    with pytest.raises(
        MediaError, match=r"must lie in an indexed folder, got a file or a link outside of it"
    ) as caught:
        library.source(name)
    assert str(folder) not in str(caught.value)


def test_a_file_that_becomes_a_link_or_goes(folder: Path) -> None:
    library = Library([folder / "in"])
    path = folder / "in" / "a.mp4"
    name = library.id_of(path)
    assert library.source(name) == path.resolve()
    path.unlink()
    with pytest.raises(MediaError, match=r"a\.mp4: there is no such file any more"):
        library.source(name)
    path.symlink_to(folder / "secret.mp4")
    with pytest.raises(MediaError, match="outside of it"):
        library.source(name)
    path.unlink()
    path.symlink_to(folder / "in" / "deep" / "b.mp4")  # a link to a file that may be shown
    assert library.source(name) == (folder / "in" / "deep" / "b.mp4").resolve()


def test_folders_that_are_links_are_what_they_lead_to(folder: Path) -> None:
    (folder / "way").symlink_to(folder / "in")
    library = Library([folder / "way"])
    assert library.source(library.id_of(folder / "way" / "a.mp4")) == (folder / "in" / "a.mp4").resolve()


def test_the_ids_of_long_ago_are_forgotten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_module, "_MOST_IDS", 2)
    library = Library([folder / "in"])
    one, two = (library.id_of(folder / "in" / name) for name in ("a.mp4", "deep/b.mp4"))
    library.id_of(folder / "in" / "a.mp4")
    library.id_of(Path("third.mp4"))
    assert library.named(one) == folder / "in" / "a.mp4"
    with pytest.raises(KeyError):
        library.named(two)


def test_packed_samples_are_found_by_their_key(world: World, tmp_path: Path) -> None:
    manifest = scan(list_folders([world.films / "even"])).manifest
    pack(manifest, tmp_path / "packed")
    record = Manifest.read(tmp_path / "packed" / "index.parquet").records[1]
    library = Library([tmp_path / "packed"])
    name = library.id_of_row(str(record.path), record.key)
    assert library.source(name) == record.source
    spec = SceneEncoder().spec
    shown = decode_clip(library.source(name), 1.0, spec)
    assert (shown.frames == decode_clip(record.source, 1.0, spec).frames).all()
    assert library.source(library.id_of(record.source)) == record.source

    with pytest.raises(MediaError, match=r"nothing: must be in the index of its pack"):
        library.source(library.id_of(Member(str(record.path), "nothing")))
    elsewhere = Library([tmp_path / "other"])
    with pytest.raises(MediaError, match="outside of it"):
        elsewhere.source(elsewhere.id_of(record.source))


def test_urls_only_under_the_root() -> None:
    library = Library(["memory://shards"])
    for address in ("memory://other/s.tar", "memory://shards/../other/s.tar", "memory://shards-2/s.tar"):
        with pytest.raises(MediaError, match="must lie under the root of the index, got another URL"):
            library.source(library.id_of(PackedSample(address, Extent(0, 1), None)))
    inside = PackedSample("memory://shards/s.tar", Extent(0, 1), None)
    assert library.source(library.id_of(inside)) == inside
