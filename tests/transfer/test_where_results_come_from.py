"""Results say what they are of, and are refused where they are of something else: cards, exports, kept features."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cmacc.cli import main
from cmacc.clips import ClipSpec, Manifest
from cmacc.pretraining import PretrainConfig, pretrain, read_provenance, start_run
from cmacc.pretraining import features as features_module
from cmacc.transfer import (
    Card,
    CardError,
    EvaluateOptions,
    Modality,
    TaskError,
    card_of_run,
    embed,
    evaluate,
    export_run,
    open_encoder,
    read_export,
)

ONE_WINDOW = EvaluateOptions(windows=1, workers=0, with_untrained=False)


def _trained(config: PretrainConfig, run_dir: Path, seed: int) -> Path:
    optim = dataclasses.replace(config.optim, steps=3)
    start_run(dataclasses.replace(config, seed=seed, optim=optim), run_dir)
    pretrain(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def runs(small_config: PretrainConfig, small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of three steps with their cards."""
    folders = []
    for seed in (0, 1):
        folders.append(_trained(small_config, tmp_path_factory.mktemp("runs") / f"seed-{seed}", seed))
        evaluate(str(folders[-1]), ["pairs"], small_world, folders[-1], options=ONE_WINDOW)
    return folders


def test_another_runs_results_do_not_go_into_the_model_card(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = Path(shutil.copytree(runs[0], tmp_path / "mixed"))
    assert main(["export", str(mixed), "--out", str(tmp_path / "own")]) == 0
    assert "median_rank" in (tmp_path / "own" / "README.md").read_text()
    shutil.copy(runs[1] / "card.json", mixed / "card.json")
    own, other = (Card.read(run / "card.json").encoder.weights for run in runs)
    with pytest.raises(CardError, match=rf"must be of weights {own}, run .* at step 3, got results of weights {other}"):
        card_of_run(mixed)
    assert main(["export", str(mixed), "--out", str(tmp_path / "mixed-export")]) == 2
    assert "pass --without-results" in capsys.readouterr().err
    assert not (tmp_path / "mixed-export").exists()
    assert main(["export", str(mixed), "--out", str(tmp_path / "plain"), "--without-results"]) == 0
    assert "No results were measured" in (tmp_path / "plain" / "README.md").read_text()


def test_exports_and_cards_state_the_data_of_the_training_and_not_todays(
    small_config: PretrainConfig, small_world: Path, tmp_path: Path
) -> None:
    manifest = small_world.with_name("later-changed.parquet")  # beside it, since its paths are relative
    shutil.copy(small_world, manifest)
    data = dataclasses.replace(small_config.data, manifest=manifest)
    run = _trained(dataclasses.replace(small_config, data=data), tmp_path / "run", 0)
    trained_on = Manifest.read(manifest).fingerprint()
    Manifest(list(Manifest.read(manifest).records)[3:]).write(manifest)  # scanned again after files were deleted
    assert Manifest.read(manifest).fingerprint() != trained_on
    export_run(run, tmp_path / "export")
    provenance = read_provenance(run)
    assert provenance is not None
    for name in (run, tmp_path / "export"):
        facts = open_encoder(str(name)).facts
        assert (facts.pretraining_data, facts.run_id) == (trained_on, provenance.run_id)
    assert f"`{trained_on}`" in (tmp_path / "export" / "README.md").read_text()
    # A run of the version before kept nothing, and today's fingerprint would be a guess.
    (run / "provenance.json").unlink()
    assert open_encoder(str(run)).facts.pretraining_data is None
    export_run(run, tmp_path / "unknown")
    assert read_export(tmp_path / "unknown").pretraining_data is None


def test_pairs_are_not_measured_on_what_was_trained_on(runs: list[Path], small_world: Path, tmp_path: Path) -> None:
    records = [dataclasses.replace(record, split=None) for record in Manifest.read(small_world).records]
    Manifest(records).write(tmp_path / "all.parquet")
    with pytest.raises(TaskError, match=r"at least 2 files .* in split 'test', got 0; hold files out .* --all-files"):
        evaluate(str(runs[0]), ["pairs"], tmp_path / "all.parquet", tmp_path / "card", options=ONE_WINDOW)
    asked = dataclasses.replace(ONE_WINDOW, all_files=True)
    card = evaluate(str(runs[0]), ["pairs"], tmp_path / "all.parquet", tmp_path / "card", options=asked)
    assert all(row.count == len(records) and list(row.by_split) == ["all"] for row in card.results)
    with pytest.raises(TaskError, match="--all-files is for tasks pairs and zero_shot alone, got labelled"):
        evaluate(str(runs[0]), ["labelled"], small_world, tmp_path / "labelled", options=asked)


class Loudness(nn.Module):
    """An encoder that counts the clips it is given."""

    modalities: tuple[Modality, ...] = ("audio",)
    device = torch.device("cpu")
    spec = ClipSpec(2, 4.0, 16, 16, 1.0)

    def __init__(self) -> None:
        super().__init__()
        self._clips = 0

    def embed_video(self, frames: Tensor) -> Tensor:
        raise AssertionError("not asked for")

    def embed_audio(self, waveforms: Tensor) -> Tensor:
        self._clips += len(waveforms)
        return waveforms.abs().mean(1, keepdim=True)


@pytest.mark.parametrize("changed", ["code", "torch"])
def test_kept_features_are_of_this_code_and_this_torch(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    manifest, encoder = Manifest.read(small_world), Loudness()

    def embedded() -> int:
        before = encoder._clips
        embed(encoder, manifest, range(3), ["audio"], cache=tmp_path)
        return encoder._clips - before

    assert [embedded(), embedded()] == [3, 0]
    plain = features_module.version
    if changed == "code":
        monkeypatch.setattr(features_module, "code_version", lambda *folders: "another")
    else:
        monkeypatch.setattr(features_module, "version", lambda name: "9.9" if name == "torch" else plain(name))
    assert [embedded(), embedded()] == [3, 0]


def test_a_card_of_the_version_before_is_read(runs: list[Path], tmp_path: Path) -> None:
    """It called directions ``video->audio`` and skipped files left out, and knew of no run id, code or commit."""
    card = Card.read(runs[0] / "card.json")
    plain = json.loads((runs[0] / "card.json").read_text())
    for row in plain["results"]:
        row["modality"] = row["modality"].replace("_to_", "->")
    for name in ("run_id", "code", "commit", "data", "config"):
        del plain["provenance"][name]
    del plain["encoder"]["run_id"]
    plain["left_out"] = plain.pop("skipped") | {"pairs": {"broken.mp4": "no picture"}}
    (tmp_path / "card.json").write_text(json.dumps(plain))
    former = Card.read(tmp_path / "card.json")
    assert former.results == card.results
    assert former.skipped == {"pairs": {"broken.mp4": "no picture"}}
    assert {row.modality for row in card.results} == {"video_to_audio", "audio_to_video"}
    assert not np.isnan([row.value for row in card.results]).any()
