"""Making an index and keeping it up to date: what a user does to a folder, kills, second writers, parts."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cmacc.clips import Manifest, list_folders, pack, scan, workers_of
from cmacc.clips.windows import covering_starts
from cmacc.search import EmbedResult, Index, SearchError, WindowTable, embed_files, export_parquet
from cmacc.search.writer import writer_lock

from .conftest import FILMS, SECONDS
from .scenes import SceneEncoder, write_scenes

Built = tuple[Path, EmbedResult]


@pytest.fixture
def folder(films: Path, tmp_path: Path) -> Path:
    """Four of the films, to change."""
    own = tmp_path / "videos"
    for number in range(4):
        own.mkdir(exist_ok=True)
        shutil.copy2(films / f"film-{number:02}.mp4", own)
    return own


def rows_of(index: Path) -> list[dict]:
    """All rows, in an order that does not depend on when they were written."""
    return in_order(pa.Table.from_batches(WindowTable(index).batches()))


def in_order(table: pa.Table) -> list[dict]:
    return sorted(table.to_pylist(), key=lambda row: (row["path"], row["start_seconds"], row["modality"]))


def counts(result: EmbedResult) -> tuple[int, int, int, int]:
    return result.added, result.copied, result.removed, result.kept


def test_every_window_of_every_film_has_the_vectors_of_its_clip(built: Built, films: Path) -> None:
    from cmacc.clips import decode_clip

    index, result = built
    assert counts(result) == (FILMS, 0, 0, 0)
    rows = rows_of(index)
    starts = covering_starts(6 * SECONDS, 2.0, 1.0)
    assert len(rows) == FILMS * len(starts) * 2 == result.row_count
    encoder = SceneEncoder()
    for row in rows[:: len(rows) // 40]:
        clip = decode_clip(films / row["path"], row["start_seconds"], encoder.spec)
        if row["modality"] == "video":
            expected = encoder.match_video(encoder.embed_video(clip.frames[None]))[0]
        else:
            expected = encoder.match_audio(encoder.embed_audio(clip.waveform[None]))[0]
        np.testing.assert_allclose(row["vector"], expected, atol=2e-3)
        assert row["end_seconds"] == row["start_seconds"] + 2
        assert (row["sample_start_seconds"], row["sample_end_seconds"]) == (0, pytest.approx(30, abs=0.01))
        assert row["weights"] == result.description.weights


def test_only_what_changed_is_embedded_again(folder: Path, scenes: list[list[int]], tmp_path: Path) -> None:
    index = tmp_path / "an.index"
    embed_files(SceneEncoder(), folder, index)
    before = rows_of(index)
    assert counts(embed_files(SceneEncoder(), folder, index)) == (0, 0, 0, 4)
    assert rows_of(index) == before

    (folder / "film-00.mp4").rename(folder / "renamed.mp4")  # its vectors are known
    write_scenes(folder / "film-01.mp4", [(scenes[-1], 4.0)])  # replaced
    (folder / "film-02.mp4").unlink()
    write_scenes(folder / "deep" / "new.mp4", [(scenes[-2], 3.0)])
    assert counts(embed_files(SceneEncoder(), folder, index)) == (2, 1, 3, 1)
    after = rows_of(index)
    assert {row["path"] for row in after} == {"renamed.mp4", "film-01.mp4", "film-03.mp4", "deep/new.mp4"}
    fresh = tmp_path / "fresh.index"
    embed_files(SceneEncoder(), folder, fresh)
    assert after == rows_of(fresh)


def test_a_new_label_is_taken_over_without_decoding(folder: Path, tmp_path: Path) -> None:
    manifest, index = scan(list_folders([folder])).manifest, tmp_path / "an.index"
    embed_files(SceneEncoder(), manifest, index)
    labels = pa.array(["dog", "dog", "cat", "cat"], pa.string())
    column = manifest.table.column_names.index("label")
    relabelled = Manifest.of_table(manifest.table.set_column(column, "label", labels))
    assert counts(embed_files(SceneEncoder(), relabelled, index)) == (0, 4, 4, 0)
    found = Index.open(index, encoder=SceneEncoder()).search(
        folder / "film-02.mp4", at_seconds=2.5, where="label = 'cat'", false_alarm_rate=1.0
    )
    assert {moment.label for moment in found.moments} == {"cat"}


_KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from search_scenes import SceneEncoder
from cmacc.search import embed_files, update
update._SECONDS_PER_COMMIT = 0.0  # a commit for every film

def progress(what, done, total):
    if what == "windows" and done > 60:
        os.kill(os.getpid(), signal.SIGKILL)

embed_files(SceneEncoder(), Path({folder!r}), {index!r}, progress=progress)
"""


def test_a_killed_run_goes_on_to_the_same_table(folder: Path, tmp_path: Path) -> None:
    # The encoder as a module of its own: the process knows nothing of the package of the tests.
    source = Path(__file__).with_name("scenes.py").read_text().replace("from ..clips.films import", "from films import")
    (tmp_path / "search_scenes.py").write_text(source)
    shutil.copy(Path(__file__).parents[1] / "clips" / "films.py", tmp_path)
    index = tmp_path / "an.index"
    script = _KILLED.format(tests=str(tmp_path), folder=str(folder), index=str(index))
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert 0 < len({row["path"] for row in rows_of(index)}) < 4
    result = embed_files(SceneEncoder(), folder, index)
    assert 0 < result.added < 4
    assert result.added + result.kept == 4
    embed_files(SceneEncoder(), folder, tmp_path / "fresh.index")
    assert rows_of(index) == rows_of(tmp_path / "fresh.index")


def test_ctrl_c_keeps_what_is_done(folder: Path, tmp_path: Path) -> None:
    def progress(what: str, done: int, total: int) -> None:
        if what == "windows" and done > 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_files(SceneEncoder(), folder, tmp_path / "an.index", progress=progress)
    assert 0 < len({row["path"] for row in rows_of(tmp_path / "an.index")}) < 4


def test_a_second_writer_is_refused_and_readers_go_on(folder: Path, films: Path, tmp_path: Path) -> None:
    index = tmp_path / "an.index"
    embed_files(SceneEncoder(), folder, index)
    with writer_lock(index), pytest.raises(SearchError, match="one writer at a time, and another process is at work"):
        embed_files(SceneEncoder(), folder, index)
    for number in range(4, FILMS):
        shutil.copy2(films / f"film-{number:02}.mp4", folder)
    reader = Index.open(index, encoder=SceneEncoder())
    seen: list[int] = []
    failed: list[BaseException] = []

    def search() -> None:
        try:
            while writer.is_alive():
                answer = reader.search(films / "film-00.mp4", at_seconds=2.5, false_alarm_rate=1.0, top=1)
                assert Path(answer.moments[0].path).name == "film-00.mp4"
                seen.append(answer.window_count)
        except BaseException as error:
            failed.append(error)

    writer = threading.Thread(target=embed_files, args=(SceneEncoder(), folder, index))
    searcher = threading.Thread(target=search)
    writer.start()
    searcher.start()
    writer.join()
    searcher.join()
    assert not failed, failed
    assert seen == sorted(seen), "a reader never goes back"
    late = reader.search(films / "film-11.mp4", at_seconds=2.5, false_alarm_rate=1.0, top=1)
    assert Path(late.moments[0].path).name == "film-11.mp4"


def test_a_reader_of_a_version_that_was_cleaned_up_reads_the_latest(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "an.index"
    embed_files(SceneEncoder(), folder, index)
    reader = WindowTable(index)
    (folder / "film-00.mp4").unlink()
    embed_files(SceneEncoder(), folder, index)  # deletes the files that the reader's version consists of
    paths = set(reader.columns("path").column("path").to_pylist())
    assert paths == {f"film-{number:02}.mp4" for number in (1, 2, 3)}


def test_the_disk_is_not_filled_by_old_versions(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "an.index"
    sizes = [embed_files(SceneEncoder(), folder, index).disk_bytes]
    for number in range(4):
        os.utime(folder / "film-00.mp4", (number, number))
        with (folder / "film-00.mp4").open("ab") as file:
            file.write(b"\0" * 8)  # another content hash, the same film
        sizes.append(embed_files(SceneEncoder(), folder, index).disk_bytes)
    # Vectors take 4 x 29 x 2 rows x (9 + 9) x 2 bytes; the rest is overhead, which must not grow with the runs.
    assert max(sizes) < 1.5 * sizes[0], sizes


def test_other_weights_or_windows_are_refused(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "an.index"
    embed_files(SceneEncoder(), folder, index)
    before = rows_of(index)
    with pytest.raises(SearchError, match=r"the weights of the encoder must be \w+, as for the rows that it has"):
        embed_files(SceneEncoder(scale=2.0), folder, index)
    with pytest.raises(SearchError, match=r"--hop must be 1.0, as for the rows that it has, got 0.5"):
        embed_files(SceneEncoder(), folder, index, hop_seconds=0.5)
    with pytest.raises(SearchError, match=r"--hop must be in \(0, 2\]"):
        embed_files(SceneEncoder(), folder, tmp_path / "other.index", hop_seconds=3.0)
    assert rows_of(index) == before
    replaced = embed_files(SceneEncoder(scale=2.0), folder, index, hop_seconds=2.0, rebuild=True)
    assert counts(replaced) == (4, 0, 0, 0)
    assert {row["weights"] for row in rows_of(index)} == {replaced.description.weights}


def test_an_encoder_of_one_modality_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="must encode video and audio into one space"):
        embed_files("statistics", folder, tmp_path / "an.index")
    assert not (tmp_path / "an.index" / "description.json").exists()


def test_files_that_do_not_decode_are_named_and_the_rest_is_embedded(folder: Path, tmp_path: Path) -> None:
    (folder / "broken.mp4").write_bytes(b"no film" * 100)
    result = embed_files(SceneEncoder(), folder, tmp_path / "an.index", workers=1)
    assert result.added == 4
    assert [Path(path).name for path in result.failures] == ["broken.mp4"]
    # Damaged after the scan that made the manifest: found while decoding.
    manifest = scan(list_folders([folder])).manifest
    (folder / "film-02.mp4").write_bytes(b"gone" * 100)
    later = embed_files(SceneEncoder(), manifest, tmp_path / "other.index")
    assert later.added == 3
    assert [Path(path).name for path in later.failures] == ["film-02.mp4"]
    assert {row["path"] for row in rows_of(tmp_path / "other.index")} == {f"film-0{n}.mp4" for n in (0, 1, 3)}


def test_parts_make_the_same_table(folder: Path, tmp_path: Path) -> None:
    manifest, index = scan(list_folders([folder])).manifest, tmp_path / "parts.index"
    assert embed_files(SceneEncoder(), manifest, index, part=(2, 3)).added == 1
    assert counts(embed_files(SceneEncoder(), manifest, index, part=(1, 3))) == (2, 0, 0, 0)
    assert counts(embed_files(SceneEncoder(), manifest, index, part=(1, 3))) == (0, 0, 0, 2)  # resumed
    assert counts(embed_files(SceneEncoder(), manifest, index)) == (4, 0, 0, 0)  # and what part 3 would have done
    assert not list(index.glob("part-*.parquet"))
    embed_files(SceneEncoder(), manifest, tmp_path / "whole.index")
    assert rows_of(index) == rows_of(tmp_path / "whole.index")


def unaligned(rows: pa.Table) -> pa.Table:
    """The same rows, with vectors at an odd address."""
    vectors = rows.column("vector").combine_chunks()
    moved = pa.py_buffer(b"-" + vectors.flatten().buffers()[1].to_pybytes()).slice(1)
    flat = pa.Array.from_buffers(pa.float16(), len(vectors.flatten()), [None, moved])
    again = pa.FixedSizeListArray.from_arrays(flat, vectors.type.list_size)
    return rows.set_column(rows.column_names.index("vector"), "vector", again)


def test_an_executor_makes_the_same_table(small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads stand for the workers of a cluster, with the untrained encoder at a size that takes no time."""
    from cmacc.search import embed as embed_module
    from cmacc.transfer import open as open_module

    encoder = SceneEncoder()
    facts = open_module.opened_object(encoder)
    monkeypatch.setattr(embed_module, "open_encoder", lambda name, device: facts)
    monkeypatch.setattr(embed_module, "_SAMPLES_PER_TASK", 5)
    embed_module._encoder_of_worker.cache_clear()
    here = embed_module._embed_task

    def over_a_network(task):  # type: ignore[no-untyped-def]
        rows, ids, failures = pickle.loads(pickle.dumps(here(pickle.loads(pickle.dumps(task)))))
        return unaligned(rows), ids, failures

    monkeypatch.setattr(embed_module, "_embed_task", over_a_network)
    with workers_of(2) as executor:
        result = embed_files(encoder, Manifest.read(small_world), tmp_path / "spread.index", executor=executor)
    embed_module._encoder_of_worker.cache_clear()
    assert result.added == 48
    embed_files(encoder, Manifest.read(small_world), tmp_path / "here.index")
    assert rows_of(tmp_path / "spread.index") == rows_of(tmp_path / "here.index")


def test_segments_and_packed_samples_keep_their_places(folder: Path, tmp_path: Path) -> None:
    whole = scan(list_folders([folder])).manifest
    table = whole.table.take(pa.array([0, 0, 1]))
    for name, values in (("start_seconds", [5.0, 15.0, 0.0]), ("duration_seconds", [5.0, 10.0, 30.0])):
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    segments = Manifest.of_table(table)
    embed_files(SceneEncoder(), segments, tmp_path / "segments.index")
    rows = [row for row in rows_of(tmp_path / "segments.index") if row["path"] == "film-00.mp4"]
    assert {(row["sample_start_seconds"], row["sample_end_seconds"]) for row in rows} == {(5, 10), (15, 25)}
    assert {row["start_seconds"] for row in rows} == {*np.arange(5.0, 9.0), *np.arange(15.0, 24.0)}
    # The same vectors as the windows of the whole file at those times.
    embed_files(SceneEncoder(), whole, tmp_path / "whole.index")
    by_place = {
        (row["path"], row["start_seconds"], row["modality"]): row["vector"] for row in rows_of(tmp_path / "whole.index")
    }
    for row in rows:
        np.testing.assert_allclose(
            row["vector"], by_place["film-00.mp4", row["start_seconds"], row["modality"]], atol=2e-3
        )

    pack(whole, str(tmp_path / "packed"))
    embed_files(SceneEncoder(), tmp_path / "packed" / "index.parquet", tmp_path / "packed.index")
    answer = Index.open(tmp_path / "packed.index", encoder=SceneEncoder()).search(
        folder / "film-03.mp4", window=(5.0, 10.0), top=1, false_alarm_rate=1.0
    )
    assert answer.moments[0].key is not None
    assert answer.moments[0].key == "000000003"
    assert answer.moments[0].start_seconds == pytest.approx(5, abs=1)


def test_files_outside_of_the_root_are_refused_and_moved_ones_found_again(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "an.index"
    embed_files(SceneEncoder(), folder, index)
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(SearchError, match=r"must be under the root of the index, .*videos; name a folder above both"):
        embed_files(SceneEncoder(), moved, index)
    result = embed_files(SceneEncoder(), moved, index, root=moved)
    assert counts(result) == (0, 0, 0, 4)
    answer = Index.open(index, encoder=SceneEncoder()).search(
        moved / "film-00.mp4", at_seconds=2.5, top=1, false_alarm_rate=1.0
    )
    assert Path(answer.moments[0].path) == moved / "film-00.mp4"


def test_parquet_has_all_rows(built: Built, tmp_path: Path) -> None:
    index, result = built
    assert export_parquet(index, tmp_path / "rows.parquet") == result.row_count
    table = pq.read_table(tmp_path / "rows.parquet")
    assert sorted(table.to_pylist(), key=lambda row: (row["path"], row["start_seconds"], row["modality"])) == rows_of(
        index
    )


def test_a_url_is_a_place_for_an_index(folder: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'url.index'}"
    assert embed_files(SceneEncoder(), scan(list_folders([folder])).manifest, url).added == 4
    answer = Index.open(url, encoder=SceneEncoder()).search(
        folder / "film-01.mp4", at_seconds=2.5, top=1, false_alarm_rate=1.0
    )
    assert Path(answer.moments[0].path).name == "film-01.mp4"


def test_films_come_as_they_are_done(built: Built) -> None:
    from cmacc.search.embed import embedded_here

    manifest = scan(list_folders([Path(built[1].description.root)])).manifest
    done = [some.sample_ids for some in embedded_here(SceneEncoder(), manifest, built[1].description, range(FILMS))]
    assert [i for ids in done for i in ids] == list(range(FILMS))
    assert max(map(len, done)) <= 2


# ---- what must not be lost or taken for something else --------------------------------------------------------------


def test_a_rebuild_that_cannot_begin_leaves_the_index(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "an.index"
    embed_files(SceneEncoder(), folder, index)
    before = rows_of(index)
    with pytest.raises(SearchError, match="must be under the root"):
        embed_files(SceneEncoder(), folder, index, root=tmp_path / "elsewhere", rebuild=True)
    with pytest.raises(SearchError, match="--rebuild replaces the index, and --part embeds a part"):
        embed_files(SceneEncoder(), folder, index, part=(1, 2), rebuild=True)
    assert rows_of(index) == before


def test_a_folder_with_other_files_is_not_taken_for_an_index(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "part-1.parquet").write_bytes(b"of the user")
    for rebuild in (False, True):
        with pytest.raises(SearchError, match=r"--out must be an index or a new folder, .* such as part-1.parquet"):
            embed_files(SceneEncoder(), folder, mine, rebuild=rebuild)
    assert (mine / "part-1.parquet").read_bytes() == b"of the user"


def test_parts_with_other_windows_are_not_taken_in(folder: Path, tmp_path: Path) -> None:
    manifest, index = scan(list_folders([folder])).manifest, tmp_path / "an.index"
    embed_files(SceneEncoder(), manifest, index, part=(1, 2))
    with pytest.raises(SearchError, match=r"--hop must be 1.0, .* got 0.5"):
        embed_files(SceneEncoder(), manifest, index, hop_seconds=0.5)
    rebuilt = embed_files(SceneEncoder(), manifest, index, hop_seconds=0.5, rebuild=True)
    assert counts(rebuilt) == (4, 0, 0, 0)
    assert {row["start_seconds"] % 1 for row in rows_of(index)} >= {0.0, 0.5}


def test_a_part_never_overwrites_its_own_files(folder: Path, films: Path, tmp_path: Path) -> None:
    index = tmp_path / "an.index"
    embed_files(SceneEncoder(), scan(list_folders([folder])).manifest, index, part=(1, 2))
    (first,) = index.glob("part-1-*.parquet")
    first.rename(first.with_name(first.name.replace("000001", "000007")))
    shutil.copy2(films / "film-05.mp4", folder / "film-000.mp4")
    embed_files(SceneEncoder(), scan(list_folders([folder])).manifest, index, part=(1, 2))
    assert sorted(path.name[-14:] for path in index.glob("part-1-*.parquet")) == ["000007.parquet", "000008.parquet"]


def test_an_open_index_notices_that_it_was_rebuilt(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "an.index"
    embed_files(SceneEncoder(), folder, index)
    reader = Index.open(index, encoder=SceneEncoder())
    ask = {"at_seconds": 2.5, "false_alarm_rate": 1.0}
    assert reader.search(folder / "film-00.mp4", **ask).moments
    embed_files(SceneEncoder(scale=2.0), folder, index, rebuild=True)
    with pytest.raises(SearchError, match="must have weights"):
        reader.search(folder / "film-00.mp4", **ask)


def without_hashes(manifest: Manifest) -> Manifest:
    place = manifest.table.column_names.index("content_hash")
    return Manifest.of_table(manifest.table.set_column(place, "content_hash", pa.nulls(len(manifest), pa.string())))


def test_files_of_equal_size_and_time_are_not_one_content(tmp_path: Path, scenes: list[list[int]]) -> None:
    """As in a tree that was unpacked from an archive: the manifest has no hashes, and all times are equal."""
    folder = tmp_path / "videos"
    for number in range(3):
        write_scenes(folder / f"{number}.mp4", [(scenes[number], 3.0)])
    size = max(path.stat().st_size for path in folder.iterdir())
    for path in folder.iterdir():
        with path.open("ab") as file:
            file.write(b"\0" * (size - path.stat().st_size))
        os.utime(path, (1, 1))
    manifest = without_hashes(scan(list_folders([folder])).manifest)
    index = tmp_path / "an.index"
    embed_files(SceneEncoder(), Manifest.of_table(manifest.table.slice(0, 1)), index)
    assert counts(embed_files(SceneEncoder(), manifest, index, root=folder)) == (2, 0, 0, 1)
    vectors = {row["path"]: row["vector"] for row in rows_of(index) if row["modality"] == "video"}
    assert vectors["0.mp4"] != vectors["1.mp4"] != vectors["2.mp4"]


def test_a_missing_file_is_named_and_the_rest_is_embedded(folder: Path, tmp_path: Path) -> None:
    manifest = without_hashes(scan(list_folders([folder])).manifest)
    (folder / "film-01.mp4").unlink()
    result = embed_files(SceneEncoder(), manifest, tmp_path / "an.index")
    assert result.added == 3
    assert [Path(path).name for path in result.failures] == ["film-01.mp4"]


def test_vectors_that_are_not_finite_fail_their_file_alone(folder: Path, tmp_path: Path) -> None:
    class Fragile(SceneEncoder):
        def match_audio(self, features):  # type: ignore[no-untyped-def]
            matched = super().match_audio(features)
            matched[features[:, 0] > 0.5] = torch.nan  # of the scenes with the first tone
            return matched

    result = embed_files(Fragile(), folder, tmp_path / "an.index")
    assert len(result.failures) > 0
    assert all("must be finite" in reason for reason in result.failures.values())
    assert result.added + len(result.failures) == 4


def test_a_path_cannot_leave_the_root(folder: Path, films: Path, tmp_path: Path) -> None:
    outside = scan(list_folders([films])).manifest.table.slice(0, 1)
    sneaky = outside.set_column(0, "path", pa.array([f"{folder}/../outside.mp4"]))
    shutil.copy2(films / "film-00.mp4", tmp_path / "outside.mp4")
    with pytest.raises(SearchError, match="must be under the root"):
        embed_files(SceneEncoder(), Manifest.of_table(sneaky), tmp_path / "an.index", root=folder)


def test_files_in_two_trees_have_the_root_of_both(folder: Path, films: Path, tmp_path: Path) -> None:
    both = pa.concat_tables([scan(list_folders([one])).manifest.table.slice(0, 1) for one in (folder, films)])
    result = embed_files(SceneEncoder(), Manifest.of_table(both), tmp_path / "an.index", root="/")
    assert result.description.root == "/"
    assert {f"/{row['path']}" for row in rows_of(tmp_path / "an.index")} == {
        str(folder.resolve() / "film-00.mp4"), str(films.resolve() / "film-00.mp4")
    }  # fmt: skip


def test_segments_that_begin_together_are_two_samples(folder: Path, tmp_path: Path) -> None:
    table = scan(list_folders([folder])).manifest.table.take(pa.array([0, 0]))
    for name, values in (("start_seconds", [5.0, 5.0]), ("duration_seconds", [5.0, 20.0])):
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    embed_files(SceneEncoder(), Manifest.of_table(table), tmp_path / "an.index")
    rows = WindowTable(tmp_path / "an.index").rows("video")
    assert rows.first.tolist() == [0, 4, 23]
