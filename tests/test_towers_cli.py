"""Towers from the command line: the recipe from training to report, and whose code runs."""

import json
import re
import sys
from pathlib import Path

import pytest

from cmacc.cli import main
from cmacc.clips import Manifest

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "towers.yaml"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def manifest(small_world: Path, tmp_path: Path) -> str:
    """Half of the small world: 18 files to train on, 6 held out."""
    Manifest(list(Manifest.read(small_world).records)[::2]).write(tmp_path / "m.parquet")
    return str(tmp_path / "m.parquet")


def test_the_recipe_from_training_to_report(manifest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    pretrain = ["pretrain", "--config", str(RECIPE), "--data.manifest", manifest, "--out", run, "--data.workers=0"]
    assert main(pretrain) == 2
    assert "must hold at least optim.batch_size (64) files to train on, got" in capsys.readouterr().err
    short = ["--optim.batch_size=8", "--optim.steps=3", "--data.feature_windows=1", "--data.clip.frame_count=1"]
    assert main([*pretrain, *short]) == 0
    assert "set for the towers: data.clip.frame_height=224, data.clip.frame_width=224" in capsys.readouterr().err
    evaluate = ["evaluate", run, "--task", "labelled", "--protocol", "linear", "--data", manifest, "--out", run]
    assert main([*evaluate, "--windows=1", "--no-untrained", "--workers=0"]) == 0
    rows = json.loads((tmp_path / "run" / "card.json").read_text())["results"]
    assert {(row["protocol"], row["modality"]) for row in rows} == {("linear", m) for m in ("video", "audio", "both")}
    assert main(["report", run]) == 0
    assert "efficientnet_lite0" in (tmp_path / "run" / "report.html").read_text()


def test_an_own_tower_runs_where_it_is_trusted(
    manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The module of docs/towers-more.md."""
    [code] = re.findall(r"```python\n(from torch.*?)```", (ROOT / "docs" / "towers-more.md").read_text(), re.DOTALL)
    (tmp_path / "my_towers.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_towers", raising=False)
    run = str(tmp_path / "run")
    pretrain = ["pretrain", "--data.manifest", manifest, "--out", run, "--data.workers=0", "--optim.batch_size=8"]
    pretrain += ["--optim.steps=3", "--data.clip.frame_count=2", "--data.clip.audio_seconds=1", "--train.video=head"]
    pretrain += ["--train.audio=head", "--encoder.video=python:my_towers:Levels", "--data.feature_windows=1"]
    commands = [
        pretrain,
        ["pretrain", "--resume", run],
        ["evaluate", run, "--data", manifest, "--out", run, "--workers=0"],
        ["inspect", run],
        ["export", run, "--out", str(tmp_path / "export"), "--without-results"],
        ["evaluate", str(tmp_path / "export"), "--data", manifest, "--out", str(tmp_path / "card"), "--workers=0"],
    ]
    for command in commands:
        assert main(command) == 2, command
        refused = capsys.readouterr().err.splitlines()
        assert len(refused) == 1
        assert "would run the code of my_towers; if you trust it, pass --trust-code" in refused[0]
        assert main([*command, "--trust-code"]) == 0, command
        capsys.readouterr()
