"""The converter of published pickles: it gives back their arrays, and runs nothing that a pickle asks for."""

import os
import pickle
import pickletools
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmacc.heads.sequences import read_sequences

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "convert_mosi_pickle.py"))
ConversionError, load, main = TOOL["ConversionError"], TOOL["load"], TOOL["main"]
SPLITS = {"train": 4, "valid": 2, "test": 3}


def mosi(seed: int = 0) -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(seed)
    held: dict[str, dict[str, Any]] = {}
    for split, count in SPLITS.items():
        sound = rng.normal(size=(count, 5, 2))
        sound[0, 0, 0] = -np.inf
        held[split] = {
            "text": rng.normal(size=(count, 5, 3)).astype(np.float32),
            "audio": sound,
            "vision": np.asfortranarray(rng.normal(size=(count, 5, 4))).astype(">f4"),
            "labels": rng.uniform(-3, 3, (count, 1, 1)),
            "id": [f"{split}$_${i}" for i in range(count)],
            "raw_text": ["hello"] * count,
        }
    return held


def write(folder: Path, held: object, protocol: int = 4) -> Path:
    path = folder / "mosi.pkl"
    path.write_bytes(pickle.dumps(held, protocol))
    return path


def convert(folder: Path, held: object, *flags: str, protocol: int = 4) -> Path:
    assert main([str(write(folder, held, protocol)), str(folder / "mosi.npz"), *flags]) == 0
    return folder / "mosi.npz"


@pytest.mark.parametrize("protocol", range(6))
def test_a_published_file_becomes_readable(tmp_path: Path, protocol: int, capsys: pytest.CaptureFixture[str]) -> None:
    held = mosi()
    data = read_sequences(convert(tmp_path, held, protocol=protocol))
    for split, rows in data.splits.items():
        for name in ("text", "vision"):
            np.testing.assert_array_equal(data.features[name][rows], held[split][name].astype(np.float32))
        np.testing.assert_array_equal(data.features["audio"][rows][1:], held[split]["audio"][1:].astype(np.float32))
        np.testing.assert_array_equal(data.targets[rows, 0], held[split]["labels"][:, 0, 0].astype(np.float32))
        assert [data.ids[row] for row in rows] == held[split]["id"]
    assert data.replaced == {"text": 0, "audio": 3, "vision": 0}
    assert "left out: train/raw_text, valid/raw_text, test/raw_text" in capsys.readouterr().out


@pytest.mark.parametrize("module", [b"numpy._core.", b"numpy.core."])
def test_both_names_of_numpys_core_are_known(tmp_path: Path, module: bytes) -> None:
    array = np.arange(6.0).reshape(2, 3)
    written = pickle.dumps([array, np.float32(0.5), np.int64(-3)], 2)
    renamed = written.replace(b"numpy._core.", module).replace(b"numpy.core.", module)
    assert module in renamed
    (tmp_path / "x.pkl").write_bytes(renamed)
    loaded = load(tmp_path / "x.pkl")
    np.testing.assert_array_equal(np.asarray(loaded[0]), array)
    assert loaded[1:] == [0.5, -3]


def test_a_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    # As Python 2 wrote it: module __builtin__ is not needed, texts and the bytes of arrays are of one type.
    raw = np.float64([0.1, -2]).tobytes()
    parts = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\ntcnumpy\ndtype\n(S'f8'\nI0\nI1\ntR"
        b"(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nU"
    )
    (tmp_path / "x.pkl").write_bytes(parts + bytes([len(raw)]) + raw + b"tb.")
    np.testing.assert_array_equal(np.asarray(load(tmp_path / "x.pkl")), [0.1, -2])


@pytest.mark.parametrize("ids", ["array", "parts", "objects", "bytes"])
def test_the_forms_of_names(tmp_path: Path, ids: str) -> None:
    held = mosi()
    for split, count in SPLITS.items():
        names = [f"{split}{i}" for i in range(count)]
        held[split]["id"] = {
            "array": np.array(names),
            "parts": np.array([[name, "0.0", "1.5"] for name in names]),
            "objects": np.array([[name, 0.0, 1.5] for name in names], object),
            "bytes": [name.encode() for name in names],
        }[ids]
    parts = "" if ids in ("array", "bytes") else " 0.0 1.5"
    assert read_sequences(convert(tmp_path, held)).ids[:2] == (f"train0{parts}", f"train1{parts}")


def test_lengths_and_other_labels_are_taken_over(tmp_path: Path) -> None:
    held = mosi()
    for split in SPLITS:
        held[split]["regression_labels"] = held[split].pop("labels").reshape(-1)
        held[split]["audio_lengths"] = [3] * SPLITS[split]
    data = read_sequences(convert(tmp_path, held, "--modalities", "audio", "text"))
    assert set(data.features) == {"audio", "text"}
    assert data.lengths["audio"].tolist() == [3] * 9
    assert data.lengths["text"].tolist() == [5] * 9


class Calls:
    """Pickled, it asks for a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._called = function, arguments

    def __reduce__(self) -> Any:
        return self._called


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "mark"
    held = mosi()
    held["train"]["extra"] = Calls(os.system, f"touch {mark}")
    path = write(tmp_path, held)
    assert main([str(path), str(tmp_path / "out.npz")]) == 2
    assert f"{os.name}.system, which arrays do not need; it was not run" in capsys.readouterr().err
    assert not mark.exists()
    assert not (tmp_path / "out.npz").exists()
    pickle.loads(path.read_bytes())  # the check can fail: read as usual, it runs
    assert mark.exists()


@pytest.mark.parametrize(
    "evil",
    [
        Calls(eval, "1"),
        Calls(getattr, "a", "upper"),
        Calls(np.load, "x.npy"),
        Calls(np.lib.format.read_array, "x"),
        np.ma.array([1]),
        Path("x"),
        1j,
    ],
    ids=lambda evil: type(evil).__name__,
)
def test_other_names_are_refused(tmp_path: Path, evil: object) -> None:
    with pytest.raises(ConversionError, match=r"names .*, which arrays do not need"):
        load(write(tmp_path, {"train": evil}))


def test_a_made_up_data_type_does_not_turn_numbers_into_addresses(tmp_path: Path) -> None:
    # An object array whose elements would be taken from bytes: NumPy's own loader follows them as pointers.
    written = pickle.dumps(np.arange(4.0), 2)
    assert written.count(b"f8") == 1
    (tmp_path / "x.pkl").write_bytes(written.replace(b"f8", b"O8"))
    with pytest.raises(ConversionError, match="must be a pickle of plain arrays"):
        load(tmp_path / "x.pkl")


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([1], "must hold a dict for each of train, valid, test, got list"),
        ({"train": {}}, "train: must hold text, got ; name others with --modalities"),
        ({"train": {name: np.zeros((1, 1, 1)) for name in ("text", "audio", "vision")}}, "labels or regression_labels"),
        ({**mosi(), "test": {**mosi()["test"], "text": ["a", "b"]}}, "test/text: must be an array of numbers, got <U1"),
        ({**mosi(), "test": {**mosi()["test"], "text": [[1], [1, 2]]}}, "test/text: must be an array of numbers"),
        ({**mosi(), "test": {**mosi()["test"], "id": 3}}, "test/id: must be a list or an array, got int"),
    ],
)
def test_what_does_not_fit_is_told(
    tmp_path: Path, held: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(write(tmp_path, held)), str(tmp_path / "out.npz")]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_pickle_and_an_existing_target_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, mosi())
    path.write_bytes(path.read_bytes()[:500])
    assert main([str(path), str(tmp_path / "out.npz")]) == 2
    assert "must be a pickle of plain arrays" in capsys.readouterr().err
    (tmp_path / "out.npz").touch()
    assert main([str(path), str(tmp_path / "out.npz")]) == 2
    assert "must be a new file" in capsys.readouterr().err


def test_no_stand_in_is_numpys_own() -> None:
    written = pickletools.genops(pickle.dumps(np.zeros(1), 2))
    named = {str(argument) for code, argument, _ in written if code.name == "GLOBAL"}
    assert named
    for stand_in in TOOL["_STAND_INS"].values():
        assert isinstance(stand_in, str) or stand_in.__module__ == load.__module__
