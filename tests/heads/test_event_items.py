"""Published features as items, read by the batch: against arrays that the files were written from."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cmacc.heads.ave_hdf5 import AveError
from cmacc.heads.event_items import published_set
from cmacc.transfer.tasks import TaskError

# Row 2 is in no list, and 0 and 3 are of one video.
LINES = ["bark&aaa&good&0&10", "bell&bbb&good&2&5", "bark&ccc&good&1&3", "bell&aaa&good&0&1", "bark&ddd&good&9&10"]
ORDERS = {"train": [4, 0], "val": [1], "test": [3]}


def write_h5(path: Path, key: str, values: NDArray[np.generic]) -> None:
    with h5py.File(path, "w") as file:
        file[key] = values


def written(
    folder: Path, lines: list[str] = LINES, background: int = 2, places: int = 3
) -> dict[str, NDArray[np.float64]]:
    """The files of a small AVE; the features in them."""
    rng = np.random.default_rng(0)
    (folder / "Annotations.txt").write_text("\n".join(LINES))
    for side, rows in ORDERS.items():
        write_h5(folder / f"{side}_order.h5", "order", np.asarray(rows))
    values = {}
    for name, count in (("", len(LINES)), ("_noisy", 2)):
        values[f"visual{name}"] = rng.normal(size=(count, 10, 2, places if name else 3, 4))
        values[f"audio{name}"] = rng.normal(size=(count, 10, 5))
    for name, of_file in values.items():
        kind, _, noisy = name.partition("_")
        write_h5(folder / f"{kind}_feature{'_noisy' if noisy else ''}.h5", "avadataset", of_file)
    return values


def test_items_are_the_rows_of_the_files_in_the_order_asked(tmp_path: Path) -> None:
    values = written(tmp_path)
    events = published_set(tmp_path, allow_partial=True)
    assert events.rows.tolist() == [0, 1, 3, 4]
    assert {side: events.split(side) for side in ("train", "validation", "test")} == {
        "train": [0, 3],
        "validation": [1],
        "test": [2],
    }
    assert (list(events.background), len(events.items)) == ([4, 5], 6)
    ids = [5, 2, 0, 4, 2]
    found = events.items.rows(ids)
    video = np.concatenate([values["visual"][[0, 1, 3, 4]], values["visual_noisy"]])[ids].reshape(5, 10, 6, 4)
    audio = np.concatenate([values["audio"][[0, 1, 3, 4]], values["audio_noisy"]])[ids]
    labels = np.full((5, 10), 2)
    labels[[1, 4], 0] = 1  # row 3
    labels[2] = 0  # row 0
    np.testing.assert_array_equal(found["video"].numpy(), video.astype(np.float32))
    np.testing.assert_array_equal(found["audio"].numpy(), audio.astype(np.float32))
    np.testing.assert_array_equal(found["labels"].numpy(), labels)
    for some in ([0, 3], [5]):
        assert all(len(column) == len(some) for column in events.items.rows(some).values())
    np.testing.assert_allclose(events.pooled.rows(ids)["video"].numpy(), video.mean(2), atol=1e-6)
    assert torch.equal(events.pooled.rows(ids)["audio"], found["audio"])


def test_labels_and_videos_of_a_split(tmp_path: Path) -> None:
    written(tmp_path)
    events = published_set(tmp_path, allow_partial=True)
    assert events.labels("test").tolist() == [[1] + [2] * 9]
    assert events.videos("train").tolist() == [0, 1]
    (tmp_path / "test_order.h5").unlink()
    write_h5(tmp_path / "test_order.h5", "order", np.asarray([3, 2]))
    assert published_set(tmp_path, drop_leaks=True).videos("test").tolist() == [0, 1]
    (tmp_path / "train_order.h5").unlink()
    write_h5(tmp_path / "train_order.h5", "order", np.asarray([0, 3, 4]))
    (tmp_path / "test_order.h5").unlink()
    write_h5(tmp_path / "test_order.h5", "order", np.asarray([2]))
    assert published_set(tmp_path).videos("train").tolist() == [0, 0, 1]


def test_hashes_tell_features_and_labels_apart(tmp_path: Path) -> None:
    values = written(tmp_path)
    first = published_set(tmp_path, allow_partial=True)
    before = first.features_hash  # computed when first asked for
    values["audio"][3, 7, 1] += 1
    write_h5(tmp_path / "audio_feature.h5", "avadataset", values["audio"])
    second = published_set(tmp_path, allow_partial=True)
    assert first.fingerprint() == second.fingerprint()
    assert second.features_hash != before
    (tmp_path / "Annotations.txt").write_text("\n".join([*LINES[:4], "bark&ddd&good&8&10"]))
    third = published_set(tmp_path, allow_partial=True)
    assert third.fingerprint() != second.fingerprint()
    assert third.features_hash != second.features_hash  # the heads are trained on labels, too
    assert published_set(tmp_path, allow_partial=True, drop_leaks=True).fingerprint() != third.fingerprint()


def test_without_videos_without_events(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "visual_feature_noisy.h5").unlink()
    events = published_set(tmp_path, allow_partial=True)
    assert (len(events.background), len(events.items)) == (0, 4)


def test_what_the_files_must_be(tmp_path: Path) -> None:
    written(tmp_path, places=2)
    with pytest.raises(AveError, match="every annotated row must be listed, got 1 that are not"):
        published_set(tmp_path)
    with pytest.raises(TaskError, match=r"feature_noisy.h5 must have shape \(10, 2, 3, 4\) as those of visual_fe"):
        published_set(tmp_path, allow_partial=True)
    (tmp_path / "test_order.h5").unlink()
    (tmp_path / "visual_feature_noisy.h5").unlink()
    with pytest.raises(TaskError, match="must hold rows of split test that can be used, got none"):
        published_set(tmp_path, allow_partial=True)
