"""Run folders: begun, resumed and replaced without mixing two runs or two data sets."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cmacc.cli import main
from cmacc.clips import Manifest
from cmacc.pretraining import (
    CheckpointError,
    PretrainConfig,
    RunError,
    change_on_resume,
    last_checkpoint,
    pretrain,
    read_config,
    read_provenance,
    start_run,
)
from cmacc.pretraining.run_folder import _OF_A_RUN, _shaping_hash


@pytest.fixture(scope="module")
def trained(small_config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    start_run(_short(small_config), run_dir)
    pretrain(run_dir)
    return run_dir


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    import shutil

    return Path(shutil.copytree(trained, tmp_path / "run"))


def _short(config: PretrainConfig) -> PretrainConfig:
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=4))


def test_overwriting_leaves_nothing_of_the_old_run(small_config: PretrainConfig, run: Path) -> None:
    """The old card and report beside a new run's weights went into its model card."""
    for name in ("card.json", "card.md", "embeddings.safetensors", "report.html", "inspect.html"):
        (run / name).write_text("of the old run")
    (run / "world").mkdir()
    (run / "notes.txt").write_text("the user's own")
    start_run(_short(small_config), run, overwrite=True)
    assert {path.name for path in run.iterdir()} == {"config.yaml", "provenance.json", "world", "notes.txt"}


def test_every_file_that_a_command_writes_into_a_run_folder_is_known_to_overwriting(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} <= set(_OF_A_RUN)


def test_a_typo_in_the_manifest_costs_no_run(small_config: PretrainConfig, run: Path) -> None:
    data = dataclasses.replace(small_config.data, manifest=run / "mispelt.parquet")
    before = sorted(run.rglob("*"))
    with pytest.raises(ValueError, match=r"mispelt.parquet: no such file"):
        start_run(dataclasses.replace(small_config, data=data), run, overwrite=True)
    assert sorted(run.rglob("*")) == before
    pretrain(run)


def test_a_run_says_where_it_comes_from(small_config: PretrainConfig, trained: Path) -> None:
    provenance = read_provenance(trained)
    assert provenance is not None
    assert provenance.data == Manifest.read(small_config.data.manifest).fingerprint()
    assert torch.__version__.startswith(provenance.versions["torch"])
    assert len(provenance.run_id) == 12
    state = json.loads((last_checkpoint(trained) / "state.json").read_text())
    assert state["provenance"]["run_id"] == provenance.run_id


def test_a_run_does_not_go_on_with_other_data(small_config: PretrainConfig, run: Path, tmp_path: Path) -> None:
    """A new scan that finds one file more shifts every sample id behind it."""
    records = Manifest.read(small_config.data.manifest).records
    shifted = Manifest([dataclasses.replace(records[3], path=tmp_path / "new.mp4", content_hash="new"), *records])
    shifted.write(tmp_path / "shifted.parquet")
    change_on_resume(run, {"data.manifest": tmp_path / "shifted.parquet"})
    known = Manifest.read(small_config.data.manifest).fingerprint()
    with pytest.raises(
        RunError, match=rf"must have fingerprint {known}, with which run .*, got {shifted.fingerprint()}"
    ):
        pretrain(run)


def test_the_same_manifest_elsewhere_is_the_same_data(small_config: PretrainConfig, run: Path, tmp_path: Path) -> None:
    Manifest.read(small_config.data.manifest).write(tmp_path / "moved.csv")
    applied = change_on_resume(run, {"data.manifest": tmp_path / "moved.csv", "data.workers": 0, "save_every": 2})
    assert applied == [f"data.manifest={tmp_path / 'moved.csv'}", "save_every=2"]
    assert pretrain(run).finished
    assert read_config(run / "config.yaml").save_every == 2


def test_what_shapes_a_run_cannot_be_changed_when_it_is_resumed(run: Path) -> None:
    with pytest.raises(RunError, match=r"optim.steps must stay 4 when it is resumed, got 9; start a new run"):
        change_on_resume(run, {"data.workers": 3, "optim.steps": 9})
    assert read_config(run / "config.yaml").data.workers == 0  # nothing of it was applied
    assert change_on_resume(run, {"optim.steps": 4}) == []
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("temperature: 0.1", "temperature: 0.2"))
    with pytest.raises(RunError, match=r"config.yaml must have hash .*, as when the run began"):
        pretrain(run)


def test_resume_refuses_on_the_command_line_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--resume", str(run), "--optim.learning_rate", "0.5"]) == 2
    assert "optim.learning_rate must stay 0.001 when it is resumed, got 0.5" in capsys.readouterr().err
    assert main(["pretrain", "--resume", str(run), "--out", "elsewhere"]) == 2
    assert "must be without --out and --overwrite" in capsys.readouterr().err
    assert main(["pretrain", "--resume", str(run), "--save_every", "7"]) == 0
    assert "changed for the rest of the run: save_every=7" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_refused(small_config: PretrainConfig, run: Path, tmp_path: Path) -> None:
    start_run(_short(small_config), tmp_path / "other")
    os.rename(run / "checkpoints", tmp_path / "other" / "checkpoints")
    own, others = read_provenance(tmp_path / "other"), read_provenance(run)
    assert own is not None
    assert others is not None
    with pytest.raises(CheckpointError, match=rf"must be of run {own.run_id}, got one of run {others.run_id}"):
        pretrain(tmp_path / "other")


@pytest.mark.parametrize("command", ["ablate", "demo"])
def test_several_processes_are_refused_before_anything_is_touched(
    small_config: PretrainConfig,
    run: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As `accelerate launch --num_processes 2` starts them: each would do the whole work in one folder."""
    plan = run / "plan.yaml"
    plan.write_text("problem: {kind: vectors}\nvariants: {a: {dictionary.selector: newest}, b: {}}\n")
    arguments = {
        "ablate": [str(plan), "--out", str(run / "ablation")],
        "demo": ["--out", str(run), "--overwrite"],
    }
    before = sorted(run.rglob("*"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([command, *arguments[command]]) == 2
    assert "this command must run in one process, got WORLD_SIZE=2" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before


def test_a_checkpoint_of_the_version_before_is_read(run: Path) -> None:
    """Its key encoders were called twins, and handles tickets."""
    folder = last_checkpoint(run)
    tensors = load_file(folder / "model.safetensors")
    former = {
        name.replace("key_encoder.", "twin.").replace(".handles", ".tickets"): value for name, value in tensors.items()
    }
    assert former.keys() != tensors.keys()
    save_file(former, folder / "model.safetensors")
    state = json.loads((folder / "state.json").read_text())
    del state["provenance"], state["files"], state["digest"]
    (folder / "state.json").write_text(json.dumps(state | {"format": 2}))
    assert pretrain(run).finished


def test_an_older_run_stays_what_it_is_when_a_setting_changes(run: Path) -> None:
    """Settings that are newer than the run must not enter its config, whose hash is that of its start."""
    path = run / "config.yaml"
    plain = yaml.safe_load(path.read_text())
    del plain["train"], plain["data"]["feature_windows"], plain["encoder"]["frame_pooling"]
    path.write_text(yaml.safe_dump(plain))
    provenance = json.loads((run / "provenance.json").read_text())
    (run / "provenance.json").write_text(json.dumps(provenance | {"config": _shaping_hash(run)}))
    assert change_on_resume(run, {"data.workers": 1}) == ["data.workers=1"]
    assert yaml.safe_load(path.read_text()) == plain | {"data": plain["data"] | {"workers": 1}}
    pretrain(run)
