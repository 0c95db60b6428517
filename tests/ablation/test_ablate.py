"""Runs of a plan: paired, the same again, restartable, the same from several processes; and the comparison of them."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from scipy.stats import binom

from cmacc.ablation import (
    PlanError,
    Row,
    ablate,
    differences_of,
    interval,
    plan_from_plain,
    results_of_runs,
    run_cell,
    sign_test,
    write_results,
)
from cmacc.ablation import plan as plan_module
from cmacc.ablation.clipset import ClipDataset, decode_all
from cmacc.ablation.run import step_seconds
from cmacc.ablation.vectors import VectorDataset, VectorWorld
from cmacc.cli import main
from cmacc.clips import Manifest
from cmacc.clips.progress import silent
from cmacc.pretraining import DictionaryConfig, ObjectiveConfig, OptimConfig, PretrainConfig, RunError

WORLD = {"kind": "vectors", "classes": 6, "zipf_exponent": 0.5, "samples": 256, "held_out": 64, "nuisance": 0.3}
PLAIN: dict[str, Any] = {
    "problem": WORLD,
    "settings": {
        "encoder": {"head": "linear", "embedding_size": 16},
        "dictionary": {"size": 16, "pool_size": 32},
        "optim": {"batch_size": 8, "steps": 12, "warmup_steps": 2},
    },
    "variants": {
        "queue": {"dictionary.selector": "newest"},
        "none": {"dictionary.selector": "none"},
        "active": {"dictionary.selector": "active"},
    },
    "seeds": [0, 1],
    "points": 3,
}


def metrics_of(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Metrics of every run by its key, without what a clock says."""
    return {
        path.stem: [point["metrics"] for point in json.loads(path.read_text())["points"]]
        for path in sorted((folder / "runs").iterdir())
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    ablate(plan_from_plain(PLAIN), folder)
    return folder


def test_every_seed_of_every_variant_is_run(done: Path) -> None:
    plan = plan_from_plain(PLAIN)
    runs = ablate(plan, done, only_planned=True)
    results = results_of_runs(plan, runs, done)
    assert results.missing_runs == 0
    assert {(row.variant, row.seed, row.step) for row in results.rows} == set(
        itertools.product(("queue", "none", "active"), (0, 1), (4, 8, 12))
    )
    of_active = {row.metric for row in results.rows if row.variant == "active"}
    assert {
        "R@1", "R@10", "median_rank", "probe_video", "balanced_audio", "loss", "batch_loss", "top1",
        "mutual_information", "mutual_information_ceiling",
        "key_age", "effective_rank", "distinct_labels", "false_negative_share", "plateau_steps", "left_plateau",
    } <= of_active  # fmt: skip
    assert "key_age" not in {row.metric for row in results.rows if row.variant == "none"}


def test_the_first_step_is_the_same_for_all_variants_of_a_seed() -> None:
    """Paired means: before anything differs, nothing differs. The dictionary is empty at step 0."""
    losses = {}
    for selector, seed in itertools.product(("none", "newest", "active"), (0, 1)):
        config = PretrainConfig(
            dictionary=DictionaryConfig(selector=selector, size=16, pool_size=32),  # type: ignore[arg-type]
            objective=ObjectiveConfig(batch_keys="both"),
            optim=OptimConfig(batch_size=8, steps=1),
            seed=seed,
        )
        world = VectorWorld(classes=6, samples=64, held_out=32)
        (point,) = run_cell(VectorDataset(world, seed, torch.device("cpu")), config, points=1)
        losses[selector, seed] = point.metrics["loss"]
    assert losses["none", 0] == losses["newest", 0] == losses["active", 0] != losses["none", 1]


@pytest.mark.slow
def test_several_processes_and_a_second_time_give_the_same(done: Path, tmp_path: Path) -> None:
    ablate(plan_from_plain(PLAIN), tmp_path, workers=2)
    assert metrics_of(tmp_path) == metrics_of(done)


def test_what_is_there_is_not_made_again_and_what_is_gone_is(done: Path, tmp_path: Path) -> None:
    plan = plan_from_plain(PLAIN)
    said: list[tuple[str, int, int]] = []
    (tmp_path / "runs").mkdir()
    for path in list((done / "runs").iterdir())[1:]:
        (tmp_path / "runs" / path.name).write_text(path.read_text())
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    ablate(plan, tmp_path, progress=lambda *step: said.append(step))
    assert said == [("runs", 5, 6), ("runs", 6, 6)]
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert metrics_of(tmp_path) == metrics_of(done)


def test_another_plan_finds_the_runs_that_it_shares(done: Path) -> None:
    said: list[tuple[str, int, int]] = []
    plan = plan_from_plain(PLAIN | {"variants": {"same as the queue": {"dictionary.selector": "newest"}}})
    ablate(plan, done, progress=lambda *step: said.append(step))
    assert said == [("runs", 2, 2)]


def test_equal_time_gives_a_slower_variant_fewer_steps(done: Path, tmp_path: Path) -> None:
    plan = plan_from_plain(PLAIN | {"budgets": ["steps", "time"]})
    ablate(plan, tmp_path, only_planned=True)
    path = tmp_path / "step_seconds.json"
    known = json.loads(path.read_text())
    assert len(known) == 3
    assert all(seconds > 0 for seconds in known.values())
    # The clock is no test's matter: with times put in by hand the steps follow from them.
    path.write_text(json.dumps(dict(zip(known, (1.0, 0.5, 2.0), strict=True))))
    runs = ablate(plan, tmp_path, only_planned=True)
    steps = {(run.cell.variant, run.budget): run.config.optim.steps for run in runs}
    assert steps == {
        ("queue", "steps"): 12, ("none", "steps"): 12, ("active", "steps"): 12,
        ("queue", "time"): 12, ("none", "time"): 24, ("active", "time"): 6,
    }  # fmt: skip
    fewer = ablate(plan_from_plain(PLAIN | {"budgets": ["time"], "timed": ["none"]}), tmp_path, only_planned=True)
    assert {run.cell.variant for run in fewer} == {"queue", "none"}
    keys = {(run.cell.variant, run.budget, run.config.seed): run.key for run in runs}
    assert keys["queue", "steps", 0] == keys["queue", "time", 0], "the reference is run once"


def test_a_plateau_is_left_when_the_batch_is_told_apart() -> None:
    """With no learning rate to speak of the loss stays at log M, and the run's steps are given."""
    world = VectorWorld(classes=6, samples=512, held_out=64, nuisance=0.2, noise=0.05)
    ends = {}
    for rate in (1e-9, 1e-2):
        config = PretrainConfig(
            dictionary=DictionaryConfig(selector="none"),
            objective=ObjectiveConfig(temperature=0.2),
            optim=OptimConfig(batch_size=16, steps=60, learning_rate=rate, warmup_steps=1),
        )
        *_, end = run_cell(VectorDataset(world, 0, torch.device("cpu")), config, points=2)
        ends[rate] = end.metrics
    assert (ends[1e-9]["left_plateau"], ends[1e-9]["plateau_steps"]) == (0.0, 60.0)
    assert ends[1e-2]["left_plateau"] == 1.0
    assert 20 <= ends[1e-2]["plateau_steps"] < 60
    assert ends[1e-2]["batch_loss"] < ends[1e-9]["batch_loss"]
    assert ends[1e-2]["mutual_information"] <= ends[1e-2]["mutual_information_ceiling"] == pytest.approx(math.log(16))


def test_step_seconds_are_of_each_problem() -> None:
    problem = VectorDataset(VectorWorld(classes=6, samples=64, held_out=32), 0, torch.device("cpu"))
    config = PretrainConfig(
        dictionary=DictionaryConfig(selector="active", size=16, pool_size=32), optim=OptimConfig(batch_size=8, steps=4)
    )
    seconds = step_seconds([(problem, config)] * 2, rounds=2, steps=2)
    assert len(seconds) == 2
    assert all(0 < one < 60 for one in seconds)


@pytest.mark.slow
def test_rendered_clips_are_a_problem_too(tmp_path: Path) -> None:
    plain = {
        "problem": {"kind": "rendered", "clips": 40, "classes": 4, "size": 32, "test_fraction": 0.4},
        "settings": {
            "data": {
                "clip": {"frame_count": 4, "frame_rate_hz": 4.0, "frame_height": 32, "frame_width": 32,
                         "audio_seconds": 1.0},
                "workers": 0,
            },
            "encoder": {"mel_bins": 32, "hidden_size": 16, "embedding_size": 8},
            "dictionary": {"size": 8, "pool_size": 16},
            "optim": {"batch_size": 8, "steps": 4},
        },
        "variants": {"queue": {"dictionary.selector": "newest"}, "fresh": {"dictionary.refresh": "selected"}},
        "seeds": [0],
        "points": 2,
    }  # fmt: skip
    plan = plan_from_plain(plain)
    runs = ablate(plan, tmp_path)
    results = results_of_runs(plan, runs, tmp_path)
    assert results.missing_runs == 0
    assert len({row.metric for row in results.rows} & {"R@10", "probe_video", "probe_audio"}) == 3
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("clips-*")}
    assert len(times) == 1
    ablate(plan, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("clips-*")} == times, "decoded once"


ROWS = [
    Row("", variant, "steps", seed, step, float(step), "R@10", value + (step == 5) * 9)
    for variant, values in {"a": (0.1, 0.2, 0.3, 0.4), "b": (0.2, 0.1, 0.5, 0.4)}.items()
    for seed, value in enumerate(values)
    for step in (5, 10)
]


def test_differences_are_paired_by_seed_and_taken_at_the_end() -> None:
    found = {d.variant: d for d in differences_of(ROWS, reference="a")}
    assert found["b"].difference == pytest.approx(np.mean([0.1, -0.1, 0.2, 0.0]))
    assert (found["b"].wins, found["b"].losses, found["b"].seeds, found["b"].steps) == (2, 1, 4, 10)
    assert found["b"].mean == pytest.approx(0.3)
    assert found["b"].deviation == pytest.approx(np.std([0.2, 0.1, 0.5, 0.4], ddof=1))
    assert found["b"].low < found["b"].difference < found["b"].high
    assert math.isnan(found["a"].difference)
    unpaired = {d.variant: d for d in differences_of([r for r in ROWS if (r.variant, r.seed) != ("a", 2)], "a")}
    assert unpaired["b"].difference == pytest.approx(np.mean([0.1, -0.1, 0.0]))


def test_the_interval_is_that_of_all_resamples() -> None:
    """Against the whole bootstrap distribution of four pairs, enumerated; drawn quantiles differ by a little."""
    values = [0.1, -0.1, 0.2, 0.05]
    means = np.sort([np.mean(drawn) for drawn in itertools.product(values, repeat=4)])
    low, high = interval(values)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.013)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.013)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 0), (6, 0), (3, 2), (2, 7)])
def test_the_sign_test_is_the_binomial_tail(wins: int, losses: int) -> None:
    count = wins + losses
    expected = min(1.0, 2 * binom.cdf(min(wins, losses), count, 0.5)) if count else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected)


def test_what_is_written_can_be_read_and_says_the_same(done: Path, tmp_path: Path) -> None:
    plan = plan_from_plain(PLAIN)
    results = results_of_runs(plan, ablate(plan, done, only_planned=True), done)
    write_results(results, tmp_path)
    table = pq.read_table(tmp_path / "metrics.parquet").to_pylist()
    assert [Row(**row) for row in table] == results.rows
    ends = {(r["variant"], r["seed"]): r["value"] for r in table if (r["step"], r["metric"]) == (12, "R@10")}
    by_hand = [ends["active", seed] - ends["queue", seed] for seed in (0, 1)]
    differences = pq.read_table(tmp_path / "differences.parquet").to_pylist()
    (written,) = [d for d in differences if (d["variant"], d["metric"]) == ("active", "R@10")]
    assert written["difference"] == pytest.approx(np.mean(by_hand))
    assert f"{written['difference']:+.3f}" in (tmp_path / "table.md").read_text()


@pytest.mark.usefixtures("users_checks")
def test_the_command_goes_from_a_plan_to_a_page(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(PLAIN))
    assert main(["ablate", str(plan), "--out", str(done)]) == 0
    assert "| – | steps | active | 12 | 2 |" in capsys.readouterr().out
    assert "active" in (done / "ablation.html").read_text()
    for arguments, message in (
        (["--device", "gpu"], "--device must be cpu, cuda or cuda:N, got 'gpu'"),
        (["--data", "some.parquet"], "problem.kind must be clips where a manifest is given"),
    ):
        assert main(["ablate", str(plan), "--out", str(tmp_path / "out"), *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("users_checks")
@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ({"kind": "films"}, "problem.kind must be one of vectors, rendered, clips, got 'films'"),
        ({"kind": "vectors", "classes": "many"}, "problem.classes must be int, got 'many'"),
        ({"kind": "vectors", "colour": 3}, "unknown setting problem.colour of VectorWorld"),
        ({"kind": "clips"}, "problem.manifest is missing"),
        ({"kind": "vectors", "classes": 1}, "classes must be at least 2, got 1"),
    ],
)
def test_a_problem_that_cannot_be_had_is_refused(problem: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        ablate(plan_from_plain(PLAIN | {"problem": problem}), tmp_path)


def test_a_broken_run_is_named(done: Path, tmp_path: Path) -> None:
    plan = plan_from_plain(PLAIN)
    runs = ablate(plan, tmp_path, only_planned=True)
    (tmp_path / "runs" / f"{runs[0].key}.json").write_text('{"points": ')
    with pytest.raises(PlanError, match=r"cannot be read .*; delete it to have the run made again"):
        results_of_runs(plan, runs, tmp_path)


@pytest.mark.parametrize("changed", ["code", "torch"])
def test_figures_of_other_code_or_another_torch_are_not_taken_for_ones_own(
    monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    (cell, *_) = plan_from_plain(PLAIN).cells
    before = plan_module.run_key(cell.problem, cell.config, 2)
    assert plan_module.run_key(cell.problem, cell.config, 2) == before
    if changed == "code":
        monkeypatch.setattr(plan_module, "code_version", lambda *folders: "another")
    else:
        monkeypatch.setattr(torch, "__version__", "9.9")
    assert plan_module.run_key(cell.problem, cell.config, 2) != before


def test_clips_that_do_not_decode_are_named_and_limited(
    small_config: PretrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = list(Manifest.read(small_config.data.manifest).records)
    training = next(i for i, record in enumerate(records) if record.split == "train")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    records[training] = dataclasses.replace(records[training], path=broken)
    Manifest(records).write(tmp_path / "manifest.parquet")
    data = dataclasses.replace(small_config.data, manifest=tmp_path / "manifest.parquet")
    decode_all(dataclasses.replace(small_config, data=data), tmp_path / "clips.safetensors", silent)
    dataset = ClipDataset(tmp_path / "clips.safetensors", torch.device("cpu"))
    assert list(dataset.skipped) == [str(broken)]
    assert f"skipped: {broken}" in caplog.text
    assert (len(dataset.labels), len(dataset.held_out_labels)) == (35, 12)
    strict = dataclasses.replace(small_config, data=dataclasses.replace(data, max_bad_fraction=0.0))
    with pytest.raises(RunError, match=r"got 0 with 1 of 48 files bad, among them .*broken\.mp4"):
        decode_all(strict, tmp_path / "strict.safetensors", silent)
