"""Sets of feature sequences: alike from every kind of file; what is replaced is counted; what does not fit, refused."""

import logging
import pickle
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors.numpy
import torch

from cmacc.heads.sequences import SequenceData, SequenceError, read_sequences

COUNTS = {"train": 4, "valid": 2, "test": 3}
Arrays = dict[str, np.ndarray]


def planted(seed: int = 0) -> Arrays:
    """Text of up to 5 steps, sound of 3 to 4; the second of the valid items has no sound."""
    rng = np.random.default_rng(seed)
    arrays: Arrays = {}
    for split, count in COUNTS.items():
        steps = 3 if split == "valid" else 4
        arrays[f"{split}/text"] = rng.normal(size=(count, 5, 3)).astype(np.float32)
        arrays[f"{split}/audio"] = rng.normal(size=(count, steps, 2))
        arrays[f"{split}/labels"] = rng.uniform(-3, 3, (count, 1, 1))
        arrays[f"{split}/lengths/text"] = rng.integers(1, 6, count)
    arrays["valid/lengths/audio"] = np.array([3, 0])
    return arrays


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    np.savez(path.with_suffix(".npz"), **arrays)
    return path.with_suffix(".npz")


def write_h5(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    with h5py.File(path.with_suffix(".h5"), "w") as file:
        for name, array in arrays.items():
            file[name] = array.astype(h5py.string_dtype()) if array.dtype.kind == "U" else array
    return path.with_suffix(".h5")


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    safetensors.numpy.save_file(dict(arrays), path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


@pytest.mark.parametrize("write", [write_npz, write_h5, write_safetensors])
def test_every_kind_of_file_gives_what_was_written(tmp_path: Path, write: Callable[[Path, Arrays], Path]) -> None:
    arrays = planted()
    data = read_sequences(write(tmp_path / "set", arrays))
    assert set(data.features) == {"text", "audio"}
    assert data.widths == {"text": 3, "audio": 2}
    assert {name: rows.tolist() for name, rows in data.splits.items()} == {
        "train": [0, 1, 2, 3], "valid": [4, 5], "test": [6, 7, 8],
    }  # fmt: skip
    for split, rows in data.splits.items():
        np.testing.assert_array_equal(data.features["text"][rows], arrays[f"{split}/text"])
        sound = arrays[f"{split}/audio"].astype(np.float32)
        np.testing.assert_array_equal(data.features["audio"][rows][:, : sound.shape[1]], sound)
        assert not data.features["audio"][rows][:, sound.shape[1] :].any()
        np.testing.assert_array_equal(data.lengths["text"][rows], arrays[f"{split}/lengths/text"])
        np.testing.assert_array_equal(data.targets[rows], arrays[f"{split}/labels"].reshape(-1, 1).astype(np.float32))
    # Without lengths, all steps of the split are valid, but not those that fill it up to another split's.
    assert data.lengths["audio"].tolist() == [4, 4, 4, 4, 3, 0, 4, 4, 4]
    place = list(data.features).index("audio")
    assert data.present[:, place].tolist() == [True] * 5 + [False] + [True] * 3
    assert data.present[:, 1 - place].all()
    assert data.replaced == {"text": 0, "audio": 0}
    assert data.ids == ()


@pytest.mark.parametrize("write", [write_npz, write_h5])
def test_items_have_their_names(tmp_path: Path, write: Callable[[Path, Arrays], Path]) -> None:
    ids = {f"{split}/ids": np.array([f"{split}-ä{i}" for i in range(count)]) for split, count in COUNTS.items()}
    data = read_sequences(write(tmp_path / "set", planted() | ids))
    assert data.ids[:2] == ("train-ä0", "train-ä1")
    assert len(data.ids) == 9


def test_the_rows_for_a_head(tmp_path: Path) -> None:
    data = read_sequences(write_npz(tmp_path / "set", planted()))
    rows = data.rows()
    assert set(rows) == {"text", "audio", "text_length", "audio_length", "present", "targets"}
    assert (rows["audio"].dtype, rows["audio_length"].dtype) == (torch.float32, torch.int64)
    assert (rows["present"].dtype, rows["targets"].shape) == (torch.bool, (9, 1))
    np.testing.assert_array_equal(rows["text"].numpy(), data.features["text"])


def test_what_is_not_finite_is_zero_counted_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arrays = planted()
    arrays["train/audio"][1, 2] = [-np.inf, np.nan]
    arrays["test/audio"][0, 0, 0] = 1e300  # infinite in float32
    with caplog.at_level(logging.WARNING):
        data = read_sequences(write_npz(tmp_path / "set", arrays))
    assert data.replaced == {"text": 0, "audio": 3}
    assert data.features["audio"][1, 2].tolist() == [0, 0]
    assert data.features["audio"][6, 0, 0] == 0
    assert "3 values of audio (4.2 %) are not finite and became 0" in caplog.text


def test_rows_of_zeros_are_steps_unless_the_lengths_say_otherwise(tmp_path: Path) -> None:
    arrays = planted()
    arrays["train/audio"][0] = 0
    arrays["train/text"][0] = 0
    data = read_sequences(write_npz(tmp_path / "set", arrays))
    assert data.lengths["audio"][0] == 4
    assert data.present[0].all()


@pytest.mark.parametrize(
    ("of_item", "expected", "dtype"),
    [
        (np.int32([2]), [2], np.int64),  # a class
        (np.float64([0.5]), [[0.5]], np.float32),  # a number
        (np.bool_([[True, False]]), [[1, 0]], np.float32),  # several labels
        (np.int64([[0, 1]]), [[0, 1]], np.float32),
    ],
)
def test_the_kinds_of_labels(tmp_path: Path, of_item: np.ndarray, expected: list[Any], dtype: type) -> None:
    labels = {f"{split}/labels": np.repeat(of_item, count, axis=0) for split, count in COUNTS.items()}
    targets = read_sequences(write_npz(tmp_path / "set", planted() | labels)).targets
    assert targets.dtype == dtype
    assert targets.tolist() == expected * 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train/text": np.zeros((4, 5))}, r"train/text: must be numbers \(4, T, width\).*got float64 \(4, 5\)"),
        ({"train/text": np.zeros((3, 5, 3))}, r"train/text: must be numbers \(4, T, width\).*\(3, 5, 3\)"),
        ({"test/text": np.zeros((3, 5, 2))}, r"test/text: .*same width in all splits, got float64 \(3, 5, 2\)"),
        ({"test/text": np.zeros((3, 0, 3))}, "test/text: .*none of them 0"),
        ({"test/text": np.full((3, 5, 3), "a")}, "test/text: must be numbers"),
        ({"valid/text": None}, "valid must hold labels and the modalities of train .*, got audio and labels"),
        ({"test/labels": None}, "test must hold labels and .* and no labels"),
        ({"valid/video": np.zeros((2, 1, 1))}, "valid must hold labels and the modalities of train"),
        ({"dev/text": np.zeros((2, 1, 1))}, "dev/text: arrays must be named .* one of train, valid, test"),
        ({"train/text/more": np.zeros(4)}, "train/text/more: arrays must be named"),
        ({"train/lengths/txt": np.ones(4, int)}, "train/lengths/txt: must be of a modality, one of text, audio"),
        ({"train/lengths/text": np.array([1, 2, 3, 6])}, r"train/lengths/text: must be 4 integers in \[0, 5\]"),
        ({"train/lengths/text": np.array([1, 2, 3, -1])}, r"train/lengths/text: must be 4 integers in \[0, 5\]"),
        ({"train/lengths/text": np.ones(4)}, "train/lengths/text: must be 4 integers .* got float64"),
        ({"train/lengths/text": np.ones(3, int)}, r"train/lengths/text: must be 4 integers .* got int64 \(3,\)"),
        ({"valid/lengths/text": np.array([1, 0])}, "every item must have at least one modality, got 1 .* row 5"),
        ({"train/labels": np.full((4, 1), np.nan)}, "targets must be finite"),
        ({"train/labels": np.zeros((4, 2))}, "valid/labels: must be of the same kind and size as train/labels"),
        ({"train/labels": np.zeros((4, 2, 2))}, r"train/labels: must be numbers, \(n,\) or \(n, k\)"),
        ({"train/labels": np.zeros(())}, "train/labels: must be numbers"),
        ({"train/ids": np.array(list("abcd"))}, "valid/ids: must be 2 texts, since a split has ids, got float64"),
        ({"train/ids": np.arange(4)}, "train/ids: must be 4 texts"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arrays = {name: array for name, array in (planted() | change).items() if array is not None}
    with pytest.raises(SequenceError, match=rf"set\.npz.*{message}"):
        read_sequences(write_npz(tmp_path / "set", arrays))


def test_negative_integers_are_no_classes(tmp_path: Path) -> None:
    labels = {f"{split}/labels": np.full(count, -1) for split, count in COUNTS.items()}
    with pytest.raises(SequenceError, match=r"class numbers from 0, .* down to -1; .* regress on as floats"):
        read_sequences(write_npz(tmp_path / "set", planted() | labels))


def test_an_item_in_two_splits_is_refused(tmp_path: Path) -> None:
    ids = {f"{split}/ids": np.array([f"{split}-{i}" for i in range(count)]) for split, count in COUNTS.items()}
    ids["test/ids"] = np.array(["test-0", "train-2", "test-2"])
    with pytest.raises(SequenceError, match=r"9 different names, got 9, and 'train-2' twice; .* a leak"):
        read_sequences(write_npz(tmp_path / "set", planted() | ids))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1 / 0",)


def test_no_pickle_is_read(tmp_path: Path) -> None:
    for name in ("set.pkl", "set.p"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
        with pytest.raises(SequenceError, match=r"pickles are not read.*tools/convert_mosi_pickle\.py .*set\.npz"):
            read_sequences(tmp_path / name)
    path = write_npz(tmp_path / "set", planted() | {"train/text": np.array([Evil()], dtype=object)})
    with pytest.raises(SequenceError, match=r"must hold plain arrays.*allow_pickle=False"):
        read_sequences(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(SequenceError, match="must be an archive of NumPy arrays"):
        read_sequences(path)


@pytest.mark.parametrize("write", [write_npz, write_h5, write_safetensors])
def test_a_damaged_file_is_refused(tmp_path: Path, write: Callable[[Path, Arrays], Path]) -> None:
    path = write(tmp_path / "set", planted())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SequenceError, match=r"sequences .*set"):
        read_sequences(path)


def test_a_damaged_member_of_an_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.writestr("train/text.npy", b"\x93NUMPY\x01\x00")
    with pytest.raises(SequenceError, match="must hold plain arrays that can be read"):
        read_sequences(tmp_path / "set.npz")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SequenceError, match=r"must be a file, got nothing"):
        read_sequences(tmp_path / "set.npz")
    with pytest.raises(SequenceError, match=r"must be .npz, .h5 or .safetensors, got .csv"):
        read_sequences(tmp_path / "set.csv")


def test_without_h5py_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_h5(tmp_path / "set", planted())
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(SequenceError, match=r"\.h5 needs the extra `heads`: pip install 'cmacc\[heads\]'"):
        read_sequences(path)


def direct(**change: Any) -> SequenceData:
    settings: dict[str, Any] = {
        "features": {"text": np.ones((3, 2, 1), np.float32)},
        "lengths": {"text": np.array([1, 2, 2])},
        "targets": np.zeros(3, np.int64),
        "splits": {"train": np.array([0, 2]), "test": np.array([1])},
    }
    return SequenceData(**(settings | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": {}, "lengths": {}}, "same modalities, at least one, got none and none"),
        ({"lengths": {"sound": np.ones(3, np.int64)}}, "same modalities, .*got text and sound"),
        ({"lengths": {"text": np.array([1, 2, 3])}}, r"text: must have 3 lengths in \[0, 2\], got \(3,\) up to 3"),
        ({"features": {"text": np.full((3, 2, 1), np.inf, np.float32)}}, "text: features must be finite"),
        ({"features": {"text": np.ones((2, 2, 1), np.float32)}}, r"text: must have shape \(3, T, width\)"),
        ({"targets": np.zeros((3, 0), np.float32)}, r"targets must be finite, of shape \(N, k\)"),
        ({"splits": {"train": np.array([0]), "test": np.array([0])}}, "no row may be in two"),
        ({"splits": {"train": np.zeros(0, np.int64)}}, "splits must not be empty"),
        ({"splits": {"train": np.array([3])}}, r"rows in \[0, 3\), got 3 to 3"),
        ({"ids": ("a", "b")}, "ids must be 3 different names, got 2"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    assert direct().widths == {"text": 1}
    with pytest.raises(SequenceError, match=message):
        direct(**change)


@pytest.mark.parametrize("name", ["present", "targets", "text_length"])
def test_a_modality_must_not_take_the_name_of_another_row(name: str) -> None:
    with pytest.raises(SequenceError, match=f"must not be called .* got {name}"):
        direct(features={name: np.ones((3, 2, 1), np.float32)}, lengths={name: np.ones(3, np.int64)})
