"""The points of the map are those of the index or the run, and the page gets them as data, never as markup."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from fastapi import FastAPI
from safetensors.numpy import load_file, save_file
from sklearn.decomposition import PCA
from starlette.testclient import TestClient

from cmacc.app.library import Library
from cmacc.app.map_page import map_routes
from cmacc.app.map_points import (
    MapPoints,
    colours_by_group,
    colours_by_label,
    points_of_index,
    points_of_run,
)
from cmacc.app.opened import Opened
from cmacc.clips import Manifest
from cmacc.search import Index
from cmacc.viewer.run_folder import read_run

from .conftest import EVIL_FILE, EVIL_LABEL, World


def client_of(opened: Opened) -> TestClient:
    app = FastAPI()
    app.include_router(map_routes(opened))
    return TestClient(app)


def made_points(vectors: np.ndarray, modality: Sequence[str], label: Sequence[str | None]) -> MapPoints:
    count = len(vectors)
    zeros = [0.0] * count
    return MapPoints(vectors, modality, ["name"] * count, label, [None] * count, zeros, zeros, "")  # type: ignore[arg-type]


def test_a_small_index_has_a_point_for_each_window(world: World, opened: Opened) -> None:
    assert opened.index is not None
    points = points_of_index(opened.index.table, opened.library)
    rows = opened.index.table._table.search().to_arrow().to_pylist()
    wanted = {
        (r["path"], r["modality"], r["start_seconds"], r["end_seconds"], r["label"]): np.array(r["vector"], np.float32)
        for r in rows
    }
    names = zip(points.name, points.modality, points.start_seconds, points.end_seconds, points.label, strict=True)
    found = dict(zip(names, points.vectors, strict=True))
    assert found.keys() == wanted.keys()
    assert len(points) == len(rows) > 100
    assert all(np.allclose(found[key], wanted[key], atol=2e-3) for key in wanted)
    for name, file_id in zip(points.name, points.file_id, strict=True):
        assert file_id is not None
        assert opened.library.source(file_id) == (world.films / name).resolve()
    assert points.what.startswith(f"All {len(rows)} windows of 9 files. A window is 2 s")


def test_a_large_index_has_points_for_some_files_spread_evenly(world: World, opened: Opened) -> None:
    assert opened.index is not None
    points = points_of_index(opened.index.table, opened.library, most=10)
    rows = opened.index.table._table.search().to_arrow().to_pylist()
    paths = sorted({row["path"] for row in rows})
    shown = [paths[i] for i in (0, 2, 4, 6, 8)]
    assert {*points.name} == {*shown}
    assert "5, spread evenly, of 9 files" in points.what
    for name, modality, vector, end in zip(
        points.name, points.modality, points.vectors, points.end_seconds, strict=True
    ):
        own = [row for row in rows if (row["path"], row["modality"]) == (name, modality)]
        mean = np.mean([row["vector"] for row in own], axis=0)
        assert np.allclose(vector, mean / np.linalg.norm(mean), atol=2e-3)
        assert end == own[0]["sample_end_seconds"]
    pairs = {(row["path"], row["modality"]) for row in rows if row["path"] in shown}
    assert {*zip(points.name, points.modality, strict=True)} == pairs
    assert len(points) == len(pairs)


def test_a_run_has_the_picture_and_the_sound_of_each_held_out_clip(trained_run: Path) -> None:
    manifest = Manifest.read(trained_run.parent / "manifest.parquet")
    library = Library({Path(record.path).parent for record in manifest.records})
    tensors = load_file(trained_run / "embeddings.safetensors")
    points = points_of_run(read_run(trained_run), library)
    assert points is not None
    assert len(points) == 48
    for row in range(24):
        record = manifest.records[int(tensors["sample_ids"][row])]
        for place, modality in ((row, "video"), (24 + row, "audio")):
            assert np.array_equal(points.vectors[place], tensors[modality][row])
            assert (points.modality[place], points.name[place]) == (modality, record.name)
            assert points.label[place] == record.label
            assert library.source(points.file_id[place] or "") == Path(record.path).resolve()
            assert points.start_seconds[place] == tensors["start_seconds"][row]
            assert points.end_seconds[place] == pytest.approx(tensors["start_seconds"][row] + 1.0)
    fewer = points_of_run(read_run(trained_run), library, most=8)
    assert fewer is not None
    assert len(fewer) == 8
    assert fewer.what.startswith("4, spread evenly, of 24 held-out clips")


def test_the_most_frequent_labels_get_a_colour_each() -> None:
    labels: list[str | None] = [f"l{i % 10}" for i in range(20)] + [f"l{i}" for i in range(8)] + [None]
    points = made_points(np.zeros((29, 2), np.float32), ["video"] * 29, labels)
    of, names = colours_by_label(points)
    assert names == ["2 other labels", *(f"l{i}" for i in range(8))]
    for label, number in zip(labels, of, strict=True):
        assert number == (0 if label in (None, "l8", "l9") else names.index(label or ""))


def test_groups_are_of_content_and_not_of_pictures_and_sounds() -> None:
    rng = np.random.default_rng(0)
    content = np.repeat(np.arange(8), 10)
    own = np.eye(8, 16, dtype=np.float32)[content] + 0.01 * rng.standard_normal((80, 16)).astype(np.float32)
    apart = np.zeros(16, np.float32)
    apart[12] = 5.0
    points = made_points(np.concatenate([own, own + apart]), ["video"] * 80 + ["audio"] * 80, [None] * 160)
    of, names = colours_by_group(points)
    assert len(names) == 9
    assert 0 not in of
    assert len({*zip(np.tile(content, 2).tolist(), of, strict=True)}) == 8


def test_the_places_are_those_of_pca_and_tsne_comes_later(opened: Opened) -> None:
    assert opened.index is not None
    client = client_of(opened)
    answer = client.get("/map/points").json()
    vectors = points_of_index(opened.index.table, opened.library).vectors
    wanted = PCA(2).fit_transform(vectors.astype(np.float64))
    found = np.stack([answer["x"], answer["y"]], axis=1)
    assert np.abs(np.abs(found) - np.abs(wanted)).max() < 1e-3 * np.abs(wanted).max()
    assert answer["colours"]["label"]["names"] == ["no label", "even", "odd", "other"]
    first = client.get("/map/points?layout=tsne").json()
    assert first["state"] == "working"
    assert first["seconds"] >= 0
    deadline = time.monotonic() + 120
    while (later := client.get("/map/points?layout=tsne").json())["state"] == "working":
        assert client.get("/map/points").json()["x"] == answer["x"], "the page goes on while t-SNE is computed"
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert later["name"] == answer["name"]
    assert later["x"] != answer["x"]
    assert np.isfinite(later["x"]).all()


def test_names_reach_the_page_as_data_alone(opened_run: Opened) -> None:
    client = client_of(opened_run)
    response = client.get("/map/points")
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert EVIL_FILE in answer["name"]
    assert EVIL_LABEL in answer["label"]
    assert not any("/" in name for name in answer["id"])
    page = client.get("/map")
    assert "evil" not in page.text
    assert "script-src 'self';" in page.headers["content-security-policy"]


def test_a_changed_run_gets_a_new_map(opened_run: Opened, run_dir: Path) -> None:
    client = client_of(opened_run)
    before = client.get("/map/points").json()
    tensors = load_file(run_dir / "embeddings.safetensors")
    save_file({name: tensor[:20].copy() for name, tensor in tensors.items()}, run_dir / "embeddings.safetensors")
    after = client.get("/map/points").json()
    assert (len(before["x"]), len(after["x"])) == (48, 40)
    (run_dir / "embeddings.safetensors").write_bytes(b"no tensors")
    broken = client.get("/map/points").json()
    assert broken["state"] == "none"
    assert "cannot be read" in broken["reason"]
    assert str(run_dir.parent) not in broken["reason"]
    (run_dir / "embeddings.safetensors").unlink()
    assert "no embeddings yet" in client.get("/map/points").json()["reason"]


def test_an_index_that_is_gone_gives_a_reason(world: World, tmp_path: Path) -> None:
    copy = shutil.copytree(world.index, tmp_path / "copy.index")
    client = client_of(Opened("copy", Library([world.films]), Index.open(copy), None))
    assert client.get("/map/points").json()["state"] == "ready"
    shutil.rmtree(copy)
    assert client.get("/map/points").json()["state"] == "none"


def test_only_the_scripts_of_the_map_are_served(opened: Opened) -> None:
    client = client_of(opened)
    plotly = client.get("/map/plotly.js")
    assert "plotly.js v" in plotly.text[:200]
    assert "immutable" in plotly.headers["cache-control"]
    assert client.get("/map/map.js").status_code == 200
    for name in ("page.py", "map.html.j2", "..%2Fserver.py"):
        assert client.get(f"/map/{name}").status_code in (404, 422)
    assert client.get("/map/points?layout=x").status_code == 422
