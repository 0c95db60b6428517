"""The readers of AVE on small copies written here: every odd line, list and leak of the published set, and bad ones."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from cmacc.heads import ave
from cmacc.heads.ave import AveData, read_ave
from cmacc.heads.ave_features import read_ave_features, read_background_features
from cmacc.heads.ave_hdf5 import AveError, FeatureFile, read_order

HEADER = "Category&VideoID&Quality&StartTime&EndTime"
# In the order of the file: a class with commas and brackets, one without any event second, and ids in two rows each.
LINES = [
    "Violin, fiddle&aaa&good&0&10",
    "Church bell&bbb&good&0&0",
    "Frying (food)&ccc&good&2&5",
    "Church bell&aaa&good&0&10",
    "Violin, fiddle&ddd&good&9&10",
    "Frying (food)&bbb&good&0&3",
]
ORDERS = {"train": [5, 0], "val": [2, 1], "test": [4, 3]}


def written(folder: Path, lines: Sequence[str] = LINES, orders: Mapping[str, Sequence[int]] | None = None) -> Path:
    """Annotations and order files."""
    (folder / "Annotations.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for side, rows in (ORDERS if orders is None else orders).items():
        with h5py.File(folder / f"{side}_order.h5", "w") as file:
            file["order"] = np.asarray(rows, np.int64)
    return folder


def with_lists(folder: Path, lists: Mapping[str, Sequence[str]]) -> Path:
    (folder / "Annotations.txt").write_text("\n".join(LINES), encoding="utf-8")
    for side, lines in lists.items():
        (folder / f"{side}Set.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_classes_labels_and_splits(tmp_path: Path) -> None:
    data = read_ave(written(tmp_path))
    assert data.classes == ("Violin, fiddle", "Church bell", "Frying (food)")
    assert data.background == 3
    assert data.video_ids == ("aaa", "bbb", "ccc", "aaa", "ddd", "bbb")
    assert data.labels.dtype == np.int64
    assert data.labels.tolist() == [
        [0] * 10,
        [3] * 10,
        [3, 3, 2, 2, 2, 3, 3, 3, 3, 3],
        [1] * 10,
        [3] * 9 + [0],
        [2] * 3 + [3] * 7,
    ]
    assert {side: rows.tolist() for side, rows in data.splits.items()} == {
        "train": [0, 5],
        "validation": [1, 2],
        "test": [3, 4],
    }
    facts = data.facts
    assert facts.rows == 6
    assert facts.repeated_rows == 2
    assert facts.leaks == {"validation": 1, "test": 1}
    assert (facts.unlisted_rows, facts.unknown_rows, facts.unavailable_rows, facts.dropped_rows) == (0, 0, 0, 0)
    assert facts.untrained_classes == 1  # no training row rings a bell
    assert not facts.official


@pytest.mark.parametrize("first", [HEADER, "\ufeff" + HEADER, ""])
def test_a_header_an_empty_line_and_a_byte_order_mark_are_no_rows(tmp_path: Path, first: str) -> None:
    data = read_ave(written(tmp_path, [first, *LINES]))
    assert data.labels[2].tolist() == [3, 3, 2, 2, 2, 3, 3, 3, 3, 3]
    assert len(data.video_ids) == 6


def test_lists_as_text_find_their_rows_by_class_and_video(tmp_path: Path) -> None:
    lists = {
        "train": [HEADER, LINES[5], LINES[0]],
        "val": [LINES[2], LINES[1]],
        "test": [LINES[4], LINES[3]],
    }
    data = read_ave(with_lists(tmp_path, lists))
    assert data.splits["train"].tolist() == [0, 5]
    assert data.splits["validation"].tolist() == [1, 2]
    assert data.splits["test"].tolist() == [3, 4]


def test_training_rows_of_held_out_videos_are_dropped_on_request(tmp_path: Path) -> None:
    data = read_ave(written(tmp_path, orders={"train": [5, 0, 2], "val": [1], "test": [4, 3]}), drop_leaks=True)
    assert data.splits["train"].tolist() == [2]
    assert data.facts.dropped_rows == 2
    assert data.facts.leaks == {"validation": 1, "test": 1}  # as the lists have it


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Bell&x&good&12&12", r"line 3: start must be in \[0, 10\), got 12"),
        ("Bell&x&good&4&11", r"line 3: end must be in \[start, 10\] = \[4, 10\], got 11"),
        ("Bell&x&good&4&3", r"end must be in .* got 3"),
        ("Bell&x&good&1.5&3", "whole seconds, got '1.5' and '3'"),
        ("Bell&x&good&-1&3", "whole seconds, got '-1' and '3'"),
        ("Bell, x, good, 1, 3", "must be class&id&quality&start&end, got 'Bell, x, good, 1, 3'"),
        ("&x&good&1&3", "must be class&id&quality&start&end"),
        (HEADER, "whole seconds, got 'StartTime'"),  # only the first line can be one
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    written(tmp_path, [*LINES[:2], line])
    with pytest.raises(AveError, match=message):
        read_ave(tmp_path)


def test_files_that_are_no_annotations(tmp_path: Path) -> None:
    with pytest.raises(AveError, match=r"Annotations.txt: must be a readable text file, got No such file"):
        read_ave(tmp_path)
    (tmp_path / "Annotations.txt").write_text("\n")
    with pytest.raises(AveError, match="at least one line"):
        read_ave(tmp_path)
    (tmp_path / "Annotations.txt").write_bytes(b"Caf\xe9&x&good&0&1\n")
    with pytest.raises(AveError, match="must be UTF-8"):
        read_ave(tmp_path)
    (tmp_path / "Annotations.txt").write_text(LINES[0])
    with pytest.raises(AveError, match=r"must hold lists of the splits, trainSet.txt, .* got none"):
        read_ave(tmp_path)


def test_a_half_present_set_is_refused_or_stated(tmp_path: Path) -> None:
    with pytest.raises(AveError, match=r"lists of all splits, got none of validation; allow_partial"):
        read_ave(written(tmp_path, orders={"train": [5, 0], "test": [4, 3]}))
    data = read_ave(tmp_path, allow_partial=True)
    assert data.facts.missing_lists == ("validation",)
    assert data.facts.unlisted_rows == 2
    assert data.splits["validation"].tolist() == []

    with pytest.raises(AveError, match=r"every annotated row must be listed, got 1 that are not"):
        read_ave(written(tmp_path, orders={"train": [5, 0], "val": [1], "test": [4, 3]}))
    with pytest.raises(AveError, match=r"listed row must be annotated, got 2 that are not, the first in row 6 of"):
        read_ave(written(tmp_path, orders={"train": [5, 0, 6, 7], "val": [1, 2], "test": [4, 3]}))
    data = read_ave(tmp_path, allow_partial=True)
    assert data.facts.unknown_rows == 2
    assert data.splits["train"].tolist() == [0, 5]


def test_videos_that_are_not_at_hand(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(AveError, match=r"videos of all listed rows must be available, got 2 rows without, .* is aaa"):
        read_ave(tmp_path, available={"bbb", "ccc", "ddd"})
    data = read_ave(tmp_path, available={"bbb", "ccc", "ddd"}, allow_partial=True)
    assert data.facts.unavailable_rows == 2
    assert {side: rows.tolist() for side, rows in data.splits.items()} == {
        "train": [5],
        "validation": [1, 2],
        "test": [4],
    }


def test_text_lists_with_a_foreign_and_a_repeated_line(tmp_path: Path) -> None:
    lists = {"train": [LINES[5], LINES[0]], "val": [LINES[2], LINES[1]], "test": [LINES[4], "Goat&eee&good&0&1"]}
    with pytest.raises(AveError, match=r"got 1 that are not, the first in line 2 of testSet.txt"):
        read_ave(with_lists(tmp_path, lists))
    with_lists(tmp_path, lists | {"test": [LINES[4], LINES[3], LINES[0]]})
    with pytest.raises(AveError, match=r"testSet.txt, line 3: every row must be listed once"):
        read_ave(tmp_path)


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        ({"train": [0, 5], "val": [1, 2], "test": [3, 4, 5]}, "listed once, got row 5 again"),
        ({"train": [0, 0], "val": [1, 2], "test": [3, 4, 5]}, "listed once, got row 0 again"),
        ({"train": [-1, 5], "val": [1, 2], "test": [3, 4]}, "at least 0, got -1"),
    ],
)
def test_bad_orders(tmp_path: Path, orders: dict[str, list[int]], message: str) -> None:
    written(tmp_path, orders=orders)
    with pytest.raises(AveError, match=message):
        read_ave(tmp_path)


def test_orders_of_another_kind(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["order"] = np.zeros((2, 2))
    with pytest.raises(AveError, match=r"order must be a vector of row numbers, got float64 of shape \(2, 2\)"):
        read_order(tmp_path / "x.h5")


def of_published_size(folder: Path) -> list[str]:
    lines = [f"class {row % 28}&id{row}&good&0&{row % 10 + 1}" for row in range(4143)]
    rows = np.random.default_rng(0).permutation(4143)
    written(folder, lines, {"train": rows[:3339], "val": rows[3339:3741], "test": rows[3741:]})
    return lines


def test_the_whole_set_is_told_by_numbers_and_its_order_by_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = of_published_size(tmp_path)
    data = read_ave(tmp_path)
    assert data.facts.official
    assert not data.facts.published_order
    with pytest.raises(AveError, match=r"order of the published repository, got another order; take Annotations.txt"):
        read_ave_features(tmp_path, data)

    digest = hashlib.sha256("\n".join(line.replace("&good", "") for line in lines).encode()).hexdigest()[:16]
    monkeypatch.setattr(ave, "_PUBLISHED_ANNOTATIONS", digest)
    assert read_ave(tmp_path).facts.published_order
    written(tmp_path, lines[::-1])
    assert not read_ave(tmp_path, allow_partial=True).facts.published_order


def with_features(folder: Path, video: np.ndarray, audio: np.ndarray, kind: str = "") -> AveData:
    for name, values in (("visual", video), ("audio", audio)):
        with h5py.File(folder / f"{name}_feature{kind}.h5", "w") as file:
            file["avadataset"] = values
    return read_ave(written(folder))


def test_features_are_read_by_rows_in_any_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    video, audio = rng.normal(size=(6, 10, 2, 3, 4)), rng.normal(size=(6, 10, 5))
    data = with_features(tmp_path, video, audio)
    features = read_ave_features(tmp_path, data)
    rows = features.read(np.asarray([4, 0, 4]))
    assert rows["video"].dtype == rows["audio"].dtype == torch.float32
    np.testing.assert_array_equal(rows["video"].numpy(), video[[4, 0, 4]].reshape(3, 10, 6, 4).astype(np.float32))
    np.testing.assert_array_equal(rows["audio"].numpy(), audio[[4, 0, 4]].astype(np.float32))
    np.testing.assert_array_equal(rows["labels"].numpy(), data.labels[[4, 0, 4]])
    assert features.bytes_of(3) == sum(part.numel() * part.element_size() for part in rows.values())


def test_features_without_places_have_one(tmp_path: Path) -> None:
    data = with_features(tmp_path, np.ones((6, 10, 4)), np.ones((6, 10, 5)))
    assert read_ave_features(tmp_path, data).read([1, 2])["video"].shape == (2, 10, 1, 4)


def test_background_features_have_background_labels(tmp_path: Path) -> None:
    data = with_features(tmp_path, np.ones((2, 10, 4)), np.ones((2, 10, 5)), kind="_noisy")
    assert read_background_features(tmp_path, data).read([1])["labels"].tolist() == [[3] * 10]


def test_features_that_do_not_fit(tmp_path: Path) -> None:
    data = with_features(tmp_path, np.ones((5, 10, 4)), np.ones((6, 10, 5)))
    with pytest.raises(AveError, match=r"visual_feature.h5: must have 3 to 5 axes and begin with \(6, 10\), .*\(5"):
        read_ave_features(tmp_path, data)
    data = with_features(tmp_path, np.ones((6, 10, 4)), np.ones((6, 10, 5, 1)))
    with pytest.raises(AveError, match=r"audio_feature.h5: must have 3 to 3 axes"):
        read_ave_features(tmp_path, data)
    data = with_features(tmp_path, np.ones((6, 10, 4), np.int64), np.ones((6, 10, 5)))
    with pytest.raises(AveError, match=r"floating-point numbers of shape .* got int64"):
        read_ave_features(tmp_path, data)


def test_files_that_are_no_features(tmp_path: Path) -> None:
    with pytest.raises(AveError, match="must exist"):
        FeatureFile(tmp_path / "none.h5")
    (tmp_path / "pointer.h5").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(AveError, match=r"must be a whole HDF5 file, got 42 bytes .* Git LFS"):
        FeatureFile(tmp_path / "pointer.h5")
    with h5py.File(tmp_path / "two.h5", "w") as file:
        file["a"], file["b"] = np.ones((1, 1, 1)), np.ones((1, 1, 1))
    with pytest.raises(AveError, match="must hold the data set avadataset, got a, b"):
        FeatureFile(tmp_path / "two.h5")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_rows_that_do_not_exist_or_are_not_finite(tmp_path: Path, value: float) -> None:
    with h5py.File(tmp_path / "one.h5", "w") as file:
        file["any"] = np.full((3, 2, 2), [[[1.0]], [[value]], [[1.0]]])
    one = FeatureFile(tmp_path / "one.h5")
    assert one.read([0, 2]).shape == (2, 2, 2)
    assert one.read([]).shape == (0, 2, 2)
    with pytest.raises(AveError, match="must be finite in float32, got another number in row 1"):
        one.read([0, 1])
    with pytest.raises(AveError, match=r"rows must be in \[0, 3\), got 0 to 3"):
        one.read([0, 3])


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(AveError, match=r"needs the extra `heads`: pip install 'cmacc\[heads\]'"):
        read_ave(tmp_path)
