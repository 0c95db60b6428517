"""`cmacc evaluate` for the tasks of `cmacc.heads`: the flags that reach them, and those that are refused."""

import dataclasses
import json
import wave
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from cmacc.cli import main
from cmacc.heads.event_recipes import EVENT_RECIPES
from cmacc.transfer import Card


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write_ave(folder: Path) -> Path:
    """Nine rows with features, of which row 8, of test, has the video of row 0, of training."""
    lines = [f"class {row % 3}&film{row % 8}&good&{row % 4}&{row % 4 + 3}" for row in range(9)]
    (folder / "Annotations.txt").write_text("\n".join(lines))
    rng = np.random.default_rng(0)
    values = {"visual_feature": ("avadataset", rng.normal(size=(9, 10, 2, 4)))}
    values["audio_feature"] = ("avadataset", rng.normal(size=(9, 10, 3)))
    values |= {
        f"{side}_order": ("order", np.asarray(rows))
        for side, rows in (("train", [0, 1, 2, 3, 4, 5]), ("val", [6]), ("test", [7, 8]))
    }
    for name, (key, of_file) in values.items():
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file[key] = of_file
    return folder


def write_tones(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(folder / name), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", "not compressed"))
            tone = np.sin(2 * np.pi * 200 * (1 + number) * np.arange(16_000) / 16_000)
            file.writeframes((10_000 * tone).astype("<i2").tobytes())
    return folder


def test_events_from_the_published_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "features", "--task", "ave", "--data", str(write_ave(tmp_path)), "--out", str(tmp_path)]
    how = ["--protocol", "linear", "linear_weak", "--seeds", "2", "5", "--epochs", "2", "--drop-leaks"]
    assert main([*arguments, *how]) == 0
    captured = capsys.readouterr()
    assert "linear_weak" in captured.out
    assert "ave, linear, seed 5, epoch 2/2" in captured.err
    card = Card.read(tmp_path / "card.json")
    assert [(row.protocol, row.metric, list(row.by_split)) for row in card.results] == [
        (name, metric, ["seed 2", "seed 5"])
        for name in ("linear", "linear_weak")
        for metric in ("accuracy", "event AUROC")
    ]
    assert all({"epochs=2", "dropped training rows=1"} <= set(row.settings) for row in card.results)
    assert main([*arguments, *how]) == 2
    assert "holds linear of task ave, linear_weak of task ave already" in capsys.readouterr().err

    assert main(["evaluate", "--compare", str(tmp_path)]) == 0
    beside = capsys.readouterr().out
    assert "| 1 | features |" in beside
    assert "| CMBS |" in beside
    assert "| 79.3 % | cmbs; supervised; rule M2" in beside
    assert "protocol: cmbs there, linear here (row 1)" in beside


def test_events_by_default_are_measured_with_all_supervised_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = EVENT_RECIPES["linear"]
    for name in ("cmbs", "cace_net"):
        monkeypatch.setitem(EVENT_RECIPES, name, dataclasses.replace(linear, name=name))
    arguments: list[Any] = ["evaluate", "features", "--task", "ave", "--data", str(write_ave(tmp_path))]
    assert main([*arguments, "--out", str(tmp_path), "--epochs", "1", "--workers", "0"]) == 0
    rows = json.loads((tmp_path / "card.json").read_text())["results"]
    assert [row["protocol"] for row in rows if row["metric"] == "accuracy"] == ["linear", "cmbs", "cace_net"]
    assert {tuple(row["by_split"]) for row in rows} == {("seed 0", "seed 1", "seed 2")}


def test_emotion_and_instruments_from_their_folders(tmp_path: Path) -> None:
    names = [f"03-01-0{emotion}-01-01-01-0{actor}.wav" for actor in (1, 2) for emotion in (3, 4)]
    notes = [f"{name}/{number}.wav" for name in ("oboe", "flute") for number in range(2)]
    for task, files, more in (
        ("emotion", names, ["--set", "ravdess", "--allow-partial"]),
        ("instruments", notes, []),
    ):
        data = write_tones(tmp_path / task, files)
        out = tmp_path / f"{task}-card"
        arguments = ["evaluate", "statistics", "--task", task, "--data", str(data), "--out", str(out), "--folds", "2"]
        assert main([*arguments, *more, "--protocol", "knn", "--windows", "1", "--workers", "0"]) == 0
        card = Card.read(out / "card.json")
        assert {(row.task, row.protocol, row.count) for row in card.results} == {(task, "knn", 4)}
        assert all(list(row.by_split) == ["fold 1", "fold 2"] for row in card.results)
        assert card.data[task].is_partial == (task == "emotion")


def test_instruments_by_default_show_what_the_projection_loses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{name}/{number}.wav" for name in ("oboe", "flute", "clarinet") for number in range(2)]
    arguments = ["evaluate", "random", "--task", "instruments", "--data", str(write_tones(tmp_path / "notes", names))]
    arguments += ["--out", str(tmp_path), "--folds", "2", "--windows", "1", "--workers", "0"]
    assert main(arguments) == 0
    rows = Card.read(tmp_path / "card.json").results
    assert [(row.protocol, row.modality, row.metric) for row in rows] == [
        ("linear", "audio", "accuracy"),
        ("knn", "audio", "accuracy"),
        *(("prototypes", side, metric) for side in ("audio", "audio_joint") for metric in ("accuracy", "triplets")),
    ]
    assert " in the projection: " in capsys.readouterr().out.splitlines()[-2]
    assert main([*arguments, "--protocol", "zero_shot"]) == 2
    assert "must have a text side in the space of its audio features, got CmaccEncoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "ave", "pairs"], "--task ave must be asked for alone, got ave, pairs; run the command for each"),
        (["--task", "ave", "--folds", "3"], "--folds is for other tasks alone, got --task ave"),
        (["--task", "ave", "--windows", "3"], "--windows is for other tasks alone"),
        (["--task", "ave", "--protocol", "knn"], "task ave: protocol must be one of linear, cmbs, cace_net, linear_we"),
        (["--task", "ave", "--seeds", "1", "1"], "task ave: --seeds must be different numbers of at least 0"),
        (["--task", "ave"], "nowhere must be a folder, got nothing there"),
        (["--task", "labelled", "--protocol", "cmbs"], "task labelled: protocol must be one of linear, svm, knn"),
        (["--task", "labelled", "--seeds", "1"], "--seeds is for tasks ave and fusion alone, got --task labelled"),
        (["--drop-leaks"], "--drop-leaks is for task ave alone, got --task pairs"),
        (["--set", "savee"], "--set is for task emotion alone, got --task pairs"),
        (["--task", "emotion"], "--task emotion: --set must name the data set, got none"),
        (["--task", "ave", "--windows", "0"], "--windows is for other tasks alone"),
    ],
)
@pytest.mark.usefixtures("users_checks")
def test_flags_that_do_not_suit_the_task(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = str(tmp_path / "nowhere"), str(tmp_path / "card")
    assert main(["evaluate", "random", *flags, "--data", data, "--out", out]) == 2
    assert message in capsys.readouterr().err
