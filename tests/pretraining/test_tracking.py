"""Trackers, each read back with its own library's means; nothing is sent anywhere."""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from cmacc.pretraining import ConfigError, PretrainConfig, RunError, change_on_resume, pretrain, start_run, tracking
from cmacc.pretraining.config import TrackerName
from cmacc.pretraining.provenance import read_provenance
from cmacc.pretraining.tracking import tracked

# Values of metrics by step; and a setting that was logged, as text.
Seen = tuple[dict[str, dict[int, float]], str]


@pytest.fixture(autouse=True)
def _quiet_and_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
    }.items():
        monkeypatch.setenv(name, value)


def with_tracker(config: PretrainConfig, tracker: TrackerName) -> PretrainConfig:
    return dataclasses.replace(
        config, tracker=tracker, save_every=2, optim=dataclasses.replace(config.optim, steps=5, warmup_steps=1)
    )


def seen_by_tensorboard(run_dir: Path) -> Seen:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    found = {name: {event.step: event.value for event in events.Scalars(name)} for name in tags["scalars"]}
    # A step that was written twice, and not purged, would be there twice.
    assert all(len(events.Scalars(name)) == len(values) for name, values in found.items())
    [text] = events.Tensors("settings/text_summary")[-1].tensor_proto.string_val
    [line] = [line for line in text.decode().splitlines() if "objective.temperature" in line]
    return found, line.split(": ")[1]


def seen_by_mlflow(run_dir: Path) -> Seen:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run_dir / 'mlflow.db'}")
    [experiment] = [found for found in client.search_experiments() if found.name == "cmacc"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    found = {name: {point.step: point.value for point in points} for name, points in histories.items()}
    return found, run.data.params["objective.temperature"]


def seen_by_wandb(run_dir: Path) -> Seen:
    from wandb.proto import wandb_internal_pb2

    found: dict[str, dict[int, float]] = {}
    ids, setting = set(), ""
    for file in sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in leveldb_records(file.read_bytes()[7:]):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            for update in record.config.update:
                names = [update.key, *update.nested_key]
                setting = update.value_json if "objective.temperature" in names else setting
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            for name, value in items.items():
                found.setdefault(name, {})[int(json.loads(items["_step"]))] = float(json.loads(value))
    provenance = read_provenance(run_dir)
    assert provenance is not None
    assert ids == {provenance.run_id}  # that of both parts
    return {name: values for name, values in found.items() if not name.startswith("_")}, setting


def leveldb_records(data: bytes) -> list[bytes]:
    """Records of LevelDB's log format: blocks of 32 KiB (the first one less its header) of parts of records."""
    records, partial, at, first_block = [], b"", 0, 32768 - 7
    while at + 7 <= len(data):
        left = (first_block - at) % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        partial += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(partial)
            partial = b""
    return records


READERS: dict[TrackerName, Callable[[Path], Seen]] = {
    "tensorboard": seen_by_tensorboard,
    "mlflow": seen_by_mlflow,
    "wandb": seen_by_wandb,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the trackers' own code
@pytest.mark.parametrize("tracker", READERS)
def test_a_killed_run_goes_on_in_the_same_place(
    small_config: PretrainConfig, tmp_path: Path, tracker: TrackerName
) -> None:
    config = with_tracker(small_config, tracker)
    start_run(config, tmp_path)

    class Killed(BaseException):
        pass

    def on_step(done: int, total: int, row: dict[str, float]) -> None:
        if done == 3:  # one step after the checkpoint
            raise Killed

    with pytest.raises(Killed):
        pretrain(tmp_path, on_step=on_step)
    change_on_resume(tmp_path, {"data.max_bad_fraction": 0.5})
    assert pretrain(tmp_path).finished
    found, temperature = READERS[tracker](tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert found.keys() == {name for row in rows for name in row} - {"step"}
    for name, values in found.items():
        expected = {row["step"]: row[name] for row in rows if name in row}
        assert values.keys() == expected.keys()
        if "second" not in name:
            assert all(math.isclose(values[step], expected[step], rel_tol=1e-6) for step in values)
    assert float(temperature) == config.objective.temperature
    assert "failed" not in (tmp_path / "run.log").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_uses_the_server_it_is_told_and_takes_the_names_of_all_metrics(
    small_config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    alone.mkdir()
    with tracked(alone, with_tracker(small_config, "mlflow"), "alone", 0) as track:
        track({"eval/video_to_audio/R@10": 0.25}, 7)
    assert seen_by_mlflow(alone)[0] == {"eval/video_to_audio/R_at_10": {7: 0.25}}
    assert "MLFLOW_TRACKING_URI" not in os.environ  # or the next run of the process would write to this one's file
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{alone / 'mlflow.db'}")
    shared.mkdir()
    for loss in (1.0, 2.0):  # the second time it goes on in the same MLflow run
        with tracked(shared, with_tracker(small_config, "mlflow"), "shared", 0) as track:
            track({"loss": loss}, 0)
    assert not list(shared.iterdir())
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert {run.data.tags["cmacc.run_id"] for run in runs} == {"alone", "shared"}
    [run] = [run for run in runs if run.info.run_name == "shared"]
    assert [point.value for point in client.get_metric_history(run.info.run_id, "loss")] == [1.0, 2.0]


def test_a_tracker_that_fails_does_not_end_a_run(
    small_config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def fail(row: dict[str, float], step: int) -> None:
        tried.append(step)
        if step == 1:
            raise ConnectionError("the server is gone")

    def close() -> None:
        raise ConnectionError("still gone")

    config = with_tracker(small_config, "tensorboard")
    monkeypatch.setitem(tracking._OPEN, "tensorboard", lambda *_: tracking._Opened(fail, close))
    start_run(config, tmp_path)
    assert pretrain(tmp_path).finished
    assert tried == [0, 1]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    [warning] = [line for line in (tmp_path / "run.log").read_text().splitlines() if "WARNING" in line]
    assert "tracker tensorboard failed, and is not used any more in this process: the server is gone" in warning


def test_a_tracker_that_does_not_open_does_not_end_a_run(
    small_config: PretrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no key")

    monkeypatch.setitem(tracking._OPEN, "wandb", refuse)
    with tracked(tmp_path, with_tracker(small_config, "wandb"), "id", 0) as track:
        track({"loss": 1.0}, 0)
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["no key"]


def test_only_the_first_process_tracks(small_config: PretrainConfig, tmp_path: Path) -> None:
    with tracked(tmp_path, with_tracker(small_config, "tensorboard"), "id", 0, is_first=False) as track:
        track({"loss": 1.0}, 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tracker", ["mlflow", "wandb"])
def test_a_missing_library_is_an_error_before_anything_is_written(
    small_config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: TrackerName
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(tracking, "version", missing)
    asked = rf"tracker {tracker}: needs the extra `{tracker}`: pip install 'cmacc\[{tracker}\]'"
    with pytest.raises(ConfigError, match=asked):
        start_run(with_tracker(small_config, tracker), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    start_run(with_tracker(small_config, "none"), tmp_path / "run")
    with pytest.raises(ConfigError, match=asked):
        change_on_resume(tmp_path / "run", {"tracker": tracker})


def test_no_tracker_leaves_no_files(small_config: PretrainConfig, tmp_path: Path) -> None:
    start_run(with_tracker(small_config, "none"), tmp_path)
    assert pretrain(tmp_path).finished
    assert not [name for name in tracking.TRACKER_FILES if (tmp_path / name).exists()]


def test_a_replaced_run_loses_what_its_trackers_wrote(small_config: PretrainConfig, tmp_path: Path) -> None:
    start_run(with_tracker(small_config, "tensorboard"), tmp_path)
    assert pretrain(tmp_path).finished
    for name in ("mlflow.db", "wandb"):
        (tmp_path / name).mkdir()
    with pytest.raises(RunError, match="already contains a run"):
        start_run(with_tracker(small_config, "none"), tmp_path)
    start_run(with_tracker(small_config, "none"), tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "provenance.json"}
