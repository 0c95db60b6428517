"""Selected samples and duplicates against brute force and planted copies; the lists that both commands write."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cmacc.cli import main
from cmacc.clips import ChosenSample, ClipSpec, Manifest, ManifestError, list_folders, scan, training_loader
from cmacc.pretraining import DataConfig, OptimConfig, PretrainConfig
from cmacc.pretraining.clip_stream import training_plan, usable_files
from cmacc.search.curate import select_samples
from cmacc.search.duplicates import near_duplicates, semantic_duplicates
from cmacc.search.table import SearchError

from ..clips.films import changing_sound, moving_picture, write_film
from .made import Vectors, make_index, read

SIZE = 16


def noise(count: int, seed: int, size: int = SIZE) -> Vectors:
    return np.random.default_rng(seed).standard_normal((count, size))


# ---- samples --------------------------------------------------------------------------------------------------------


def test_samples_join_both_modalities(tmp_path: Path) -> None:
    sounds, frames = noise(3, 0), noise(3, 1)
    samples = read(make_index(tmp_path, {"b": {"video": frames, "audio": sounds}, "a": {"audio": noise(2, 2)}}))
    assert samples.column("path") == ["a", "b"]
    assert samples.has("video").tolist() == [False, True]
    assert samples.has("audio").tolist() == [True, True]
    assert not samples.means("video")[0].any()
    mean = np.mean([row / np.linalg.norm(row) for row in sounds], axis=0)
    np.testing.assert_allclose(samples.means("audio")[1], mean / np.linalg.norm(mean), atol=2e-3)


def test_samples_are_found_by_path_key_and_start(tmp_path: Path) -> None:
    films = {name: {"audio": noise(2, i)} for i, name in enumerate("abc")}
    facts = [
        {"path": "x.mp4", "sample_start_seconds": 0.0, "sample_end_seconds": 3.0},
        {"path": "x.mp4", "sample_start_seconds": 10.0, "sample_end_seconds": 13.0},
        {"path": "s/0.tar", "key": "k1"},
    ]
    (tmp_path / "linked").symlink_to(tmp_path)
    samples = read(make_index(tmp_path / "i", films, root=tmp_path, facts=facts))
    assert samples.names == ["s/0.tar, k1", "x.mp4", "x.mp4, from 10 s"]
    chosen = [
        ChosenSample("x.mp4"), ChosenSample(f"{tmp_path}/x.mp4", None, 10.0), ChosenSample("x.mp4", None, 5.0),
        ChosenSample(f"{tmp_path}/linked/s/0.tar", "k1", 0.0), ChosenSample("s/0.tar", "k2", 0.0), ChosenSample("y"),
    ]  # fmt: skip
    assert samples.find(chosen) == [[1, 2], [2], [], [0], [], []]


# ---- select ---------------------------------------------------------------------------------------------------------


def planted(tmp_path: Path, groups: int = 8, each: int = 6) -> Path:
    """Files in tight groups, with both modalities, one group without pictures and one without sound."""
    films = {}
    for group in range(groups):
        for number in range(each):
            near = {
                m: noise(3, 100 * group + k) + 0.01 * noise(3, 7000 + 97 * group + number)
                for k, m in enumerate(("video", "audio"))
            }
            if group < 2:
                del near[("video", "audio")[group]]  # type: ignore[arg-type]
            films[f"{number}/{group}.mp4"] = near
    return make_index(tmp_path / "index", films)  # type: ignore[arg-type]


def group_of(path: str) -> str:
    return path.rpartition("/")[2]


def test_chosen_samples_cover_all_groups_and_the_same_seed_gives_the_same(tmp_path: Path) -> None:
    samples = read(planted(tmp_path))
    paths = samples.column("path")
    for seed in range(5):
        picked = select_samples(samples, 8, seed=seed)
        assert picked == select_samples(samples, 8, seed=seed)
        assert {group_of(paths[number]) for number in picked} == {f"{group}.mp4" for group in range(8)}
    assert len({tuple(select_samples(samples, 8, seed=seed)) for seed in range(5)}) == 5
    everything = select_samples(samples, len(samples))
    assert sorted(everything) == list(range(len(samples)))


def test_given_samples_are_not_chosen_and_count_as_chosen_before(tmp_path: Path) -> None:
    samples = read(planted(tmp_path))
    paths = samples.column("path")
    given = [number for number, path in enumerate(paths) if path in ("0/3.mp4", "5/3.mp4", "1/4.mp4")]
    for seed in range(5):
        picked = select_samples(samples, 6, given=given, seed=seed)
        assert {group_of(paths[number]) for number in picked} == {f"{group}.mp4" for group in (0, 1, 2, 5, 6, 7)}
    assert not set(select_samples(samples, len(samples) - len(given), given=given)) & set(given)
    with pytest.raises(SearchError, match=r"--count: must be in 1\.\.45, .*without the 3 given, got 46"):
        select_samples(samples, 46, given=given)


# ---- near-duplicates ------------------------------------------------------------------------------------------------


def test_a_copy_inside_a_longer_film_is_found_with_its_start_and_end(tmp_path: Path) -> None:
    film = {m: noise(30, k) for k, m in enumerate(("video", "audio"))}
    piece = {m: rows[3:15] + 0.1 * noise(12, 9) for m, rows in film.items()}
    others = {f"{i}.mp4": {m: noise(9, 10 * i + k) for k, m in enumerate(film)} for i in range(1, 6)}
    samples = read(make_index(tmp_path, {"film.mp4": film, "piece.mp4": piece, **others}))
    found = near_duplicates(samples)
    [stretch] = found.stretches
    paths = samples.column("path")
    assert (paths[stretch.first], paths[stretch.second]) == ("film.mp4", "piece.mp4")
    assert stretch.first_seconds == (3.0, 16.0)  # windows 3 to 14, of two seconds
    assert stretch.second_seconds == (0.0, 13.0)
    assert 0.97 < stretch.score < 1
    assert [[paths[number] for number in group] for group in found.groups] == [["film.mp4", "piece.mp4"]]
    assert [paths[number] for number in found.kept(samples)] == [*others, "film.mp4"]


def test_both_modalities_must_be_alike_where_both_exist(tmp_path: Path) -> None:
    frames, sounds = noise(5, 0), noise(5, 1)
    films = {
        "0": {"video": frames, "audio": sounds},
        "dubbed": {"video": frames, "audio": noise(5, 2)},
        "mute": {"video": frames},
        "sound": {"audio": sounds},
        **{f"other {i}": {"video": noise(5, 10 + i), "audio": noise(5, 20 + i)} for i in range(6)},
    }
    samples = read(make_index(tmp_path, films))  # type: ignore[arg-type]
    names = samples.names
    pairs = {(names[one.first], names[one.second]) for one in near_duplicates(samples).stretches}
    assert pairs == {("0", "mute"), ("0", "sound"), ("dubbed", "mute")}


def test_a_shared_jingle_is_a_stretch_but_no_duplicate_and_groups_are_connected(tmp_path: Path) -> None:
    jingle, show = noise(3, 0), noise(20, 1)
    films = {
        "a": np.concatenate([jingle, noise(20, 2)]),
        "b": np.concatenate([noise(20, 3), jingle]),
        "c": show,
        "d": show[:18],
        "e": show[1:16],
        **{f"other {i}": noise(9, 10 + i) for i in range(6)},
    }
    samples = read(make_index(tmp_path, {name: {"audio": rows} for name, rows in films.items()}))
    found = near_duplicates(samples)
    names = samples.names
    assert {(names[one.first], names[one.second]) for one in found.stretches} == {
        ("a", "b"), ("c", "d"), ("c", "e"), ("d", "e")
    }  # fmt: skip
    assert [[names[number] for number in group] for group in found.groups] == [["c", "d", "e"]]


def test_pairs_of_windows_are_those_of_brute_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of a few rows, with windows that lack a modality, and repeats far apart in one file."""
    from cmacc.search import duplicates

    monkeypatch.setattr(duplicates, "_SCORES_AT_ONCE", 300)
    kinds = noise(6, 0, 4)
    rng = np.random.default_rng(1)
    films = {
        str(i): {m: kinds[rng.integers(6, size=20)] + 0.2 * rng.standard_normal((20, 4)) for m in some}
        for i, some in enumerate([("video", "audio"), ("video",), ("audio",), ("video", "audio")])
    }
    samples = read(make_index(tmp_path, films))  # type: ignore[arg-type]
    windows = duplicates._Windows.of(samples)
    first, second, score = duplicates._alike(windows, 0.9, lambda *_: None)
    white = {}
    for m, rows in samples.rows.items():
        starts = rows.seconds("start_seconds").tolist()
        exact = duplicates.whitened(rows.vectors).double().numpy()
        for number, start, row in zip(samples.of_row[m].tolist(), starts, exact, strict=True):
            white[number, start, m] = row
    moments = sorted({key[:2] for key in white})
    expected = {}
    for i, one in enumerate(moments):
        for j in range(i + 1, len(moments)):
            other = moments[j]
            shared = [m for m in samples.rows if (*one, m) in white and (*other, m) in white]
            cosines = [float(white[(*one, m)] @ white[(*other, m)]) for m in shared]
            near = one[0] == other[0] and other[1] - one[1] < 10
            if cosines and min(cosines) >= 0.9 and not near:
                expected[i, j] = min(cosines)
    assert len(expected) > 50
    found = dict(zip(zip(first.tolist(), second.tolist(), strict=True), score.tolist(), strict=True))
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[pair] for pair in expected], list(expected.values()), atol=1e-5)
    # With a limit, the most similar partners of each window are left.
    monkeypatch.setattr(duplicates, "_MOST_PAIRS", 0)
    monkeypatch.setattr(duplicates, "_LEAST_PARTNERS", 2)
    first, second, _ = duplicates._alike(windows, 0.9, lambda *_: None)
    of_first: dict[int, list[int]] = {}
    for pair in sorted(expected, key=lambda pair: -expected[pair]):
        of_first.setdefault(pair[0], []).append(pair[1])
    assert max(map(len, of_first.values())) > 2
    left = {(i, j) for i, partners in of_first.items() for j in partners[:2]}
    assert set(zip(first.tolist(), second.tolist(), strict=True)) == left


def test_whitened_rows_have_a_like_spread_in_all_directions() -> None:
    """Against scikit-learn's whitening where the rows determine it; of few rows, it is hardly more than the mean."""
    from sklearn.decomposition import PCA

    from cmacc.search.duplicates import whitened

    mixed = noise(50_000, 0, 4) @ np.diag([1.0, 0.7, 0.5, 0.3]) @ noise(4, 1, 4) + 3
    expected = PCA(whiten=True).fit_transform(mixed)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = whitened(mixed.astype(np.float32)).numpy()[:300]
    # Equal up to a rotation, which cosines do not show, and the shrinkage.
    np.testing.assert_allclose(found @ found.T, expected[:300] @ expected[:300].T, atol=0.3)
    few = noise(3, 0, 64).astype(np.float32)
    centred = few - few.mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    np.testing.assert_allclose(whitened(few) @ whitened(few).T, centred @ centred.T, atol=0.05)
    assert not whitened(np.ones((3, 4), np.float32)).isnan().any()


def test_a_still_picture_gives_few_stretches(tmp_path: Path) -> None:
    still = np.repeat(noise(1, 0), 200, axis=0)
    films = {"still": still, "still too": still[:150], **{str(i): noise(9, 10 + i) for i in range(40)}}
    samples = read(make_index(tmp_path, {name: {"video": rows} for name, rows in films.items()}))
    found = near_duplicates(samples)
    assert len(found.stretches) < 20
    assert [[samples.names[number] for number in group] for group in found.groups] == [["still", "still too"]]


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_a_threshold_out_of_range_is_refused(tmp_path: Path, threshold: float) -> None:
    samples = read(make_index(tmp_path, {"a": {"audio": noise(2, 0)}}))
    with pytest.raises(SearchError, match=r"--threshold: must be in \(0, 1\], got"):
        near_duplicates(samples, threshold=threshold)
    with pytest.raises(SearchError, match=r"--semantic: must be in \(0, 1\), got"):
        semantic_duplicates(samples, threshold if threshold else 1.0)


# ---- SemDeDup -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster_size", [1000, 15])
def test_semantic_duplicates_are_those_of_a_naive_semdedup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster_size: int
) -> None:
    from cmacc.search import duplicates

    monkeypatch.setattr(duplicates, "_SCORES_AT_ONCE", 200)
    monkeypatch.setattr(duplicates, "_CLUSTER_SIZE", cluster_size)
    kinds = noise(20, 0)
    films = {f"{i:02}": {"audio": kinds[i % 20 :][:1] + 0.2 * noise(1, 50 + i)} for i in range(60)}
    samples = read(make_index(tmp_path, films))
    found = semantic_duplicates(samples, 0.3)
    rows = duplicates._sample_rows(samples).astype(np.float64)
    clusters, centroids = duplicates._clusters(rows.astype(np.float32), 0)
    assert len(centroids) == (1 if cluster_size == 1000 else 4)
    removed = set()
    for cluster, centroid in enumerate(centroids):
        order = sorted(np.flatnonzero(clusters == cluster).tolist(), key=lambda number: rows[number] @ centroid)
        for place, number in enumerate(order):
            if any(rows[number] @ rows[earlier] > 0.7 for earlier in order[:place]):
                removed.add(number)
    assert found.removed == removed
    assert 10 < len(removed) < 50
    for group in found.groups:
        assert len({number % 20 for number in group}) == 1
    assert {number for group in found.groups for number in group} & set(found.kept(samples)) == {
        group[0] for group in found.groups
    }
    assert all(one.score > 0.7 and one.second in removed for one in found.stretches)


# ---- lists and commands ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("films")
    for seed in range(4):
        write_film(root / "ab"[seed % 2] / f"{seed}.mp4", moving_picture(0.6, seed), changing_sound(0.6, seed))
    shutil.copy(root / "a" / "0.mp4", root / "b" / "copy of 0.mp4")
    scan(list_folders([root]), test_fraction=0.5).manifest.write(root / "all.parquet")
    return root


@pytest.fixture
def index(films: Path, tmp_path: Path) -> str:
    """Made-up vectors of the films; 0 and its copy are alike."""
    paths = ["a/0.mp4", "a/2.mp4", "b/1.mp4", "b/3.mp4", "b/copy of 0.mp4"]
    vectors = {
        p: {m: noise(2, 10 * (i % 4) + k) for k, m in enumerate(("video", "audio"))} for i, p in enumerate(paths)
    }
    facts = [{"sample_end_seconds": 0.6}] * 5
    folder = make_index(tmp_path / "index", vectors, root=films, labels={"b/1.mp4": "b"}, facts=facts)  # type: ignore[arg-type]
    return str(folder)


def test_lists_go_on_into_scan_and_manifests(
    films: Path, index: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in sorted(films.rglob("*.mp4"))}
    keep, again = tmp_path / "keep.csv", tmp_path / "again.parquet"
    assert main(["dedupe", index, "--out", str(keep), "--json", str(tmp_path / "groups.json")]) == 0
    assert "1 of 5 samples are near-duplicates of others, in 1 groups" in capsys.readouterr().out
    kept = Manifest.read(keep)
    assert [record.name for record in kept.records] == ["0.mp4", "2.mp4", "1.mp4", "3.mp4"]
    record = kept.records[2]
    assert (record.path, record.label, record.duration_seconds) == (films / "b" / "1.mp4", "b", 0.6)
    assert record.has_audio
    assert record.has_picture
    groups = json.loads((tmp_path / "groups.json").read_text())
    assert groups["groups"] == [{"keep": "a/0.mp4", "remove": ["b/copy of 0.mp4"]}]
    assert groups["stretches"][0]["second_seconds"] == [0.0, 0.6]

    assert main(["scan", str(films), "--only", str(keep), "--out", str(again), "--min-seconds", "0.1"]) == 0
    scanned = Manifest.read(again)
    assert sorted(scanned.column("path")) == sorted(kept.column("path"))
    assert scanned.column("content_hash")[0]
    capsys.readouterr()
    (tmp_path / "list.txt").write_text(f"b/1.mp4\n\n{films}/a/2.mp4\nnone.mp4\n")
    arguments = ["scan", str(films), "--only", str(tmp_path / "list.txt"), "--min-seconds", "0.1", "--overwrite"]
    assert main([*arguments, "--out", str(again)]) == 0
    assert [record.name for record in Manifest.read(again).records] == ["2.mp4", "1.mp4"]
    assert "1 of 3 files in the list are missing" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in sorted(films.rglob("*.mp4"))} == before


def test_pretraining_reads_a_list(index: str, films: Path, tmp_path: Path) -> None:
    """With its own reading; an index knows no frame rate, and no size of the frames."""
    out = tmp_path / "chosen.csv"
    assert main(["select", index, "--count", "4", "--out", str(out)]) == 0
    clip = ClipSpec(frame_count=2, frame_rate_hz=4.0, frame_height=32, frame_width=32, audio_seconds=0.5)
    config = PretrainConfig(data=DataConfig(manifest=out, clip=clip), optim=OptimConfig(batch_size=4))
    manifest = Manifest.read(out)
    usable, excluded = usable_files(manifest, config)
    assert usable == [0, 1, 2, 3]
    assert not excluded
    [batch] = training_loader(training_plan(manifest, usable, config), clip, first_step=0, last_step=1, workers=0)
    assert sorted(batch.sample_ids.tolist()) == usable
    assert not batch.failures
    assert bool((batch.waveforms.abs().amax(dim=1) > 0.01).all())


def test_rows_of_the_embedded_manifest_are_taken_over(films: Path, index: str, tmp_path: Path) -> None:
    out = tmp_path / "chosen.parquet"
    arguments = ["select", index, "--count", "3", "--out", str(out), "--manifest", str(films / "all.parquet")]
    assert main(arguments) == 0
    everything = {record.path: record for record in Manifest.read(films / "all.parquet").records}
    chosen = list(Manifest.read(out).records)
    assert len(chosen) == 3
    assert all(record == everything[record.path] for record in chosen)
    assert {record.split for record in chosen} <= {"train", "test"}


def test_select_takes_given_samples_from_a_list_or_a_text_file(
    index: str, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = (tmp_path / name for name in ("1.csv", "2.csv", "3.csv"))
    assert main(["select", index, "--count", "2", "--out", str(first), "--seed", "3"]) == 0
    assert main(["select", index, "--count", "3", "--out", str(second), "--given", str(first)]) == 0
    assert "3 of 5 samples chosen, beside 2 given" in capsys.readouterr().out
    paths = [set(Manifest.read(path).column("path")) for path in (first, second)]
    assert not paths[0] & paths[1]
    assert len(paths[0] | paths[1]) == 5
    given = tmp_path / "given.txt"
    given.write_text(f"a/0.mp4\n{films}/b/3.mp4\nelsewhere.mp4\n")
    assert main(["select", index, "--count", "3", "--out", str(third), "--given", str(given)]) == 0
    assert "1 of 3 samples of" in capsys.readouterr().err
    assert not {f"{films}/a/0.mp4", f"{films}/b/3.mp4"} & set(Manifest.read(third).column("path"))


def test_bad_input_gives_one_line(index: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    out = str(tmp_path / "list.csv")
    (tmp_path / "other.txt").write_text("other.mp4\n")
    (tmp_path / "empty.txt").write_text("\n")
    assert "--out must end in .parquet or .csv" in error("select", index, "--count", "1", "--out", "list.txt")
    assert "--count: must be in 1..5" in error("select", index, "--count", "9", "--out", out)
    assert "no index there" in error("dedupe", str(tmp_path / "none"), "--out", out)
    given = ["select", index, "--count", "1", "--out", out, "--given"]
    assert "must name samples of" in error(*given, str(tmp_path / "other.txt"))
    assert "must name at least one sample" in error(*given, str(tmp_path / "empty.txt"))
    assert "no such file" in error(*given, str(tmp_path / "none.txt"))
    assert not Path(out).exists()
    Path(out).write_text("mine")
    for command in (["select", index, "--count", "1"], ["dedupe", index]):
        assert "exists" in error(*command, "--out", out)
    assert Path(out).read_text() == "mine"
    assert main(["dedupe", index, "--out", out, "--overwrite"]) == 0
    assert len(Manifest.read(out)) == 4


def test_packed_samples_need_their_manifest(films: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    assert main(["pack", str(films / "all.parquet"), "--out", str(packed), "--workers", "1"]) == 0
    manifest = Manifest.read(packed / "index.parquet")
    facts = [
        {"path": Path(record.path).name, "key": record.key, "sample_end_seconds": record.duration_seconds}
        for record in manifest.records
    ]
    vectors = {str(i): {"audio": noise(2, i)} for i in range(len(manifest))}
    samples = read(make_index(tmp_path / "index", vectors, root=packed, facts=facts))  # type: ignore[arg-type]
    with pytest.raises(SearchError, match=r"is a packed sample: name its manifest with --manifest"):
        samples.manifest([0])
    assert samples.manifest(range(len(samples)), manifest).column("video_offset") == manifest.column("video_offset")
    with pytest.raises(
        SearchError, match=r"--manifest: must be the manifest that was embedded, got one without 1 of 1"
    ):
        samples.manifest([0], Manifest.of_table(manifest.table.slice(1)))
    with pytest.raises(ManifestError):
        Manifest.read(tmp_path / "none.csv")
