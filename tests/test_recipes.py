"""The recipes: their comments are true, their commands are accepted, and each trains."""

import re
import runpy
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

if TYPE_CHECKING:
    from cmacc.pretraining import PretrainConfig

ROOT = Path(__file__).parents[1]
BENCHMARK = runpy.run_path(str(ROOT / "benchmarks" / "recipes.py"))
NAMES = list(BENCHMARK["RECIPES"])
ON_PAPER = [name for name in NAMES if name != "folder"]


def comment_of(name: str) -> str:
    lines = (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines()
    return "\n".join(line[1:] for line in lines if line.startswith("#"))


def commands_of(name: str) -> list[list[str]]:
    """The indented lines of the comment that are commands of ours or of a launcher, as words."""
    joined = re.sub(r"\\\n", " ", comment_of(name))
    lines = [line for line in joined.splitlines() if re.match(r" {3}(cmacc|torchrun|accelerate) ", line)]
    return [shlex.split(line, comments=True) for line in lines]


def config_of(arguments: list[str]) -> "PretrainConfig":
    from cmacc.cli.training import _config_of, _pretrain_parser

    parser = _pretrain_parser()
    return _config_of(parser, parser.parse_args(arguments))


def settings_of(name: str) -> list[str]:
    files = ["folder"] if name == "folder" else ["paper", name]
    return [word for file in files for word in ("--config", str(ROOT / "recipes" / f"{file}.yaml"))]


@pytest.mark.parametrize("name", NAMES)
def test_the_costs_in_a_comment_are_those_that_the_benchmark_derives(name: str) -> None:
    size = BENCHMARK["RECIPES"][name]
    comment = " ".join(comment_of(name).split())
    for line in BENCHMARK["lines"](size):
        assert line in comment
    config = config_of(settings_of(name))
    assert config.optim.batch_size == size.batch_size
    assert name == "folder" or config.optim.steps == size.steps
    has_keys = config.dictionary.selector != "none" or config.batch_keys != "online"
    assert size.forward_passes == (4 if has_keys else 3)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_config_and_its_pretrain_command_is_accepted(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config_of(["--config", str(path)])
    for words in commands_of(path.stem):
        if words[:2] == ["cmacc", "pretrain"]:
            config_of(words[2:])


def test_sounds_need_no_picture_and_are_compared_whole() -> None:
    config = config_of(["--config", str(ROOT / "recipes" / "sounds.yaml")])
    assert config.objective.modalities == ("audio",)
    assert config.data.augment.window * config.data.clip.audio_seconds == pytest.approx(2)


def test_operations_are_counted_as_they_are_known_for_r3d_18() -> None:
    video, audio = BENCHMARK["gigamacs"]("r3d_18", "resnet18", 112)
    assert round(video, 1) == 40.7  # torchvision's table of its models
    assert BENCHMARK["gigamacs"]("r3d_18", "resnet18", 224)[0] == pytest.approx(4 * video, rel=0.01)
    # ResNet-18 is 1.81 for 3 x 224 x 224; the spectrogram has about a third of the places.
    assert audio == pytest.approx(1.81 * (80 * 201) / (224 * 224), rel=0.1)


def test_recipes_on_the_paper_have_its_sizes() -> None:
    for name in ON_PAPER:
        config = config_of(settings_of(name))
        sizes = (config.optim.batch_size, config.dictionary.size, config.dictionary.pool_size)
        assert sizes == (128, 3840, 38400)
        clip = config.data.clip
        assert (clip.frame_count, clip.frame_height, clip.frame_width) == (16, 112, 112)
        assert (config.encoder.video, config.encoder.audio) == ("r3d_18", "resnet18")
        # What stands in both files, so that each of them is a whole, is the same.
        own = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
        assert own.keys() == {"encoder", "optim"}


@pytest.mark.parametrize("name", ["paper", *NAMES])
def test_the_commands_of_a_comment_are_accepted(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    from cmacc.cli import main

    monkeypatch.chdir(ROOT)
    commands = commands_of(name)
    kinds = {" ".join(words[:2]) if words[0] == "cmacc" else words[0] for words in commands}
    assert kinds == ({"cmacc pretrain"} if name == "paper" else
                     {"cmacc scan", "cmacc pretrain", "torchrun", "accelerate", *kinds & {"cmacc pack"}})  # fmt: skip
    settings = next(words[2:] for words in commands if words[:2] == ["cmacc", "pretrain"])
    for words in commands:
        if words[0] == "torchrun":
            run = get_args_parser().parse_args(words[1:])
            assert (run.module, run.training_script) == (True, "cmacc")
        elif words[0] == "accelerate":
            run = launch_command_parser().parse_args(words[2:])
            assert (run.module, run.training_script, run.num_processes) == (True, "cmacc", 8)
        if words[0] != "cmacc":
            assert words[words.index("cmacc") :] == ["cmacc", "pretrain", "SETTINGS"]
            words = ["cmacc", "pretrain", *settings]
        if words[1] == "pretrain":
            config_of(words[2:])
        else:
            with pytest.raises(SystemExit, match="0"):
                main([words[1], "--help"])
            known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
            assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, "paper"])
def test_two_steps_of_a_recipe_on_small_clips(name: str, small_world: Path, tmp_path: Path) -> None:
    from cmacc.pretraining import pretrain, start_run

    small = {
        "data.manifest": small_world, "data.workers": 0, "data.clip.frame_count": 4, "data.clip.frame_rate_hz": 4,
        "data.clip.frame_height": 32, "data.clip.frame_width": 32, "data.clip.audio_seconds": 1, "optim.batch_size": 4,
        "optim.steps": 2, "optim.warmup_steps": 1, "eval_every": 0, "tracker": "none", "precision": "fp32",
    }  # fmt: skip
    if name != "folder":
        small |= {"dictionary.size": 8, "dictionary.pool_size": 16}
    if name == "paper":  # its other encoder; and what a data set adds to it is not needed
        small |= {"encoder.video": "r2plus1d_18"}
    settings = settings_of(name) if name != "paper" else ["--config", str(ROOT / "recipes" / "paper.yaml")]
    config = config_of([*settings, *(word for key, value in small.items() for word in (f"--{key}", str(value)))])
    start_run(config, tmp_path)
    rows: list[dict[str, float]] = []
    try:
        outcome = pretrain(tmp_path, on_step=lambda done, total, row: rows.append(row))
    finally:
        shutil.rmtree(tmp_path)  # a checkpoint has more than half a gigabyte
    assert outcome.finished
    # With a dictionary as the only negatives, the first step has none, and no loss.
    assert [name for name in rows[0] if name == "loss"] == (["loss"] if config.objective.in_batch else [])
    assert 0 < abs(rows[1]["loss"]) < 20
