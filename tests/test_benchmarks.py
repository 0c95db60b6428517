"""The benchmarks run, on cases that are too small to say anything."""

import dataclasses
import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from cmacc.heads.fusion_task import FusionOptions, evaluate_fusion
from cmacc.pretraining.verify import Line

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.usefixtures("users_checks")
def test_seeding_compares_all_on_the_same_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main = runpy.run_path(str(BENCHMARKS / "seeding.py"))["main"]
    report = main(["--quick", "--device", "cpu", "--out", str(tmp_path / "out.json")])
    for count in (16, 64):
        found = {r["what"]: r for r in report["results"] if r["count"] == count}
        assert set(found) == {
            "ours, blocks", "ours, one_by_one", "ours, greedy of 4", "one_by_one_torch", "sklearn", "explicit",
        }  # fmt: skip
        assert found["ours, one_by_one"]["passes"] == count
        assert found["ours, blocks"]["passes"] < count / 2
    assert (tmp_path / "out.json").stat().st_size > 1000
    assert "one_by_one_torch" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("users_checks")
def test_step_overhead_measures_every_phase() -> None:
    main = runpy.run_path(str(BENCHMARKS / "step_overhead.py"))["main"]
    report = main(["--scale", "tiny", "--rounds", "3", "--variants", "newest", "active, fresh"])
    for row in report["seconds"].values():
        # Medians: those of the parts may add up to a little more than that of the whole.
        phases = ("transform", "encode", "keys", "select", "loss", "update")
        assert sum(row[phase] for phase in phases) <= 1.2 * row["step"]
        assert row["select"] > 0
    assert report["seconds"]["active, fresh"]["refresh"] > report["seconds"]["newest"]["refresh"]


@pytest.mark.slow
def test_loading_measures_speed_and_memory(tmp_path: Path) -> None:
    main = runpy.run_path(str(BENCHMARKS / "loading.py"))["main"]
    report = main(["--quick", "--out", str(tmp_path / "out.json")])
    assert {(row["workers"], row["clips_per_video"]) for row in report["speed"]} == {(0, 1), (0, 4), (1, 1), (1, 4)}
    assert all(row["clips_per_second"] > 0 for row in report["speed"])
    assert [row["what"] for row in report["memory"]] == ["ours", "list"]
    assert all(0 < row["worker_uss_mib"] < row["main_rss_mib"] for row in report["memory"])
    assert (tmp_path / "out.json").stat().st_size > 500


@pytest.mark.slow
def test_scanning_counts_the_openings(tmp_path: Path) -> None:
    main = runpy.run_path(str(BENCHMARKS / "scanning.py"))["main"]
    report = main(["--files", "2", "--rounds", "1", "--out", str(tmp_path / "out.json")])
    assert report["opens_by_ffmpeg"] == {"in parts": 5, "at once": 1}
    assert report["ratio"] > 0
    assert (tmp_path / "out.json").stat().st_size > 200


@pytest.mark.slow
def test_decoding_gives_every_reader_the_same_work(tmp_path: Path) -> None:
    main = runpy.run_path(str(BENCHMARKS / "decoding.py"))["main"]
    report = main(["--quick", "--out", str(tmp_path / "out.json")])
    cases = {"raw", "raw, keyframe every 25", "raw, no sound", "packed"}
    rates = {(r["case"], r["reader"], r["clips_per_open"]): r.get("clips_per_second", 0) for r in report["rates"]}
    compared = {(r["case"], r["reader"]): r for r in report["compared"]}
    for case in cases:
        for reader in ("cmacc", "PyAV loop"):
            assert rates[case, reader, 1] > 0
            assert rates[case, reader, 4] > 0
            assert compared[case, reader]["frames_per_clip"] == [16]
            assert compared[case, reader]["wrong_frames"] == 0
            assert compared[case, reader]["mean_levels"] < 1
        assert abs(compared[case, "cmacc"].get("sound_gain", 1) - 1) < 0.01
    assert report["ratios"]["packed / raw, 1 an opening"]["cmacc"] > 1
    others = {name for name in ("torchcodec, approximate", "decord") if name not in report["not_installed"]}
    assert others <= {reader for _, reader in compared}
    assert (tmp_path / "out.json").stat().st_size > 1000


@pytest.mark.slow
def test_every_candidate_chooses_and_is_compared(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    benchmark = runpy.run_path(str(BENCHMARKS / "candidates.py"))
    report = benchmark["main"](
        ["--steps", "6", "--seeds", "1", "--workers", "1", "--regimes", "plain", "--out", str(tmp_path / "out.json")]
    )
    assert {run["selector"] for run in report["runs"]} == set(benchmark["selectors"](0.1))
    assert len(report["runs"]) == len(benchmark["selectors"](0.1))
    assert "k-centre" in capsys.readouterr().out
    assert (tmp_path / "out.json").stat().st_size > 1000


@pytest.mark.slow
def test_every_part_of_the_gpu_script_runs_and_leaves_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "none")  # the smoke of `verify` sets it
    lines = [Line("first", "", 0.0, 0.0, True), Line.skipped("second", "no compiler")]
    monkeypatch.setattr("cmacc.pretraining.verify.verify", lambda **_: lines)  # which has tests of its own
    main = runpy.run_path(str(BENCHMARKS / "gpu.py"))["main"]
    # In this process: seven would import torch again, for half of the time.
    reports = {}
    for part in ("checks", "verify", "training", "selection", "throughput", "evidence"):
        reports |= main(["--smoke", "--device", "cpu", "--part", part])
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == reports[part]
    # As it is used: each part in a process, its result in a file.
    monkeypatch.setitem(main.__globals__, "PARTS", {"data": main.__globals__["PARTS"]["data"]})
    alone = main(["--smoke", "--device", "cpu", "--budget-minutes", "30", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "gpu-data.json").read_text()) == alone["data"]
    assert alone["data"]["result"]["bytes_per_clip"] > 0
    assert reports["checks"]["result"]["seeds with the CPU's picks, of 10"] == 10
    assert reports["throughput"]["result"]["steps"][0]["utilisation"] > 0
    assert set(reports["evidence"]["result"]["minus newest"]) == {"none", "active", "active, fresh"}
    found = {name: line["result"] for name, line in reports["verify"]["result"].items()}
    assert found == {"first": "ok", "second": "skipped: no compiler"}
    trained = reports["training"]["result"]
    assert set(trained["processes"]["clips_per_second"]) == {"1", "2"}
    assert trained["targets"]["best utilisation, at least 0.4"] > 0
    for name, row in trained["choosing"]["tiny"]["rows"].items():
        assert row["of peer"] == pytest.approx(1.0) or name != "peer"
        assert row["clips_per_second"] > 0
    for name, found in trained["memory"]["components"].items():
        assert found["measured"] == pytest.approx(found["formula"], rel=0.2 if name == "scores" else 1e-3), name


def test_a_part_of_the_gpu_script_that_takes_too_long_is_said_to(tmp_path: Path) -> None:
    main = runpy.run_path(str(BENCHMARKS / "gpu.py"))["main"]
    reports = main(["--smoke", "--device", "cpu", "--budget-minutes", "0.0001", "--out", str(tmp_path)])
    assert all("took longer" in report["failed"] for report in reports.values())


@pytest.mark.slow
@pytest.mark.usefixtures("users_checks")
def test_every_way_of_choosing_runs_on_vectors_and_on_clips(tmp_path: Path) -> None:
    choosing = runpy.run_path(str(BENCHMARKS / "choosing.py"))
    clips = tmp_path / "clips.safetensors"
    choosing["render"](32, clips, {"class_count": 4}, 1, held_out=8)
    ways = {
        "vectors": ("none, DCL", "SogCLR 0.9", "HCL 0.5", "HCL 0.5, DCL", "JEST, DCL", "JEST reference, DCL"),
        "rendered": ("group, newest, DCL", "batches half g4, DCL", "windows, DCL", "overlap, DCL"),
    }
    small = {"dictionary.size": 16, "dictionary.pool_size": 16, "optim.batch_size": 8}
    for problem, variants in ways.items():
        for variant in variants:
            found = choosing["run"](
                {"problem": problem, "regime": "plain", "variant": variant, "seed": 0, "steps": 6, "settings": small,
                 "clips": str(clips), "device": "cpu", "points": 1}
            )  # fmt: skip
            assert found["points"][-1]["step"] == 6
            assert 0 <= found["points"][-1]["R@10"] <= 1


def test_what_stands_in_for_a_missing_library_is_of_no_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """scikit-learn asks isinstance(x, pyarrow.Table) wherever something called pyarrow was imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    stand_ins = importlib.import_module("stand_ins")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    assert stand_ins.stand_in_for_missing("no_such_library") == {"no_such_library"}
    mocked = importlib.import_module("no_such_library.deeper")
    assert not isinstance(3, mocked.Table)
    assert mocked.compute(3) is not None


def test_the_evidence_tables_are_those_of_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import dataclasses

    import pyarrow as pa
    import pyarrow.parquet as pq

    from cmacc.ablation import Row, differences_of

    rows = [
        Row("hot", variant, "steps", seed, 10, 2.0, metric, value + seed / 100)
        for variant, value in (("queue", 0.5), ("active", 0.6))
        for seed in (0, 1, 2)
        for metric in ("R@10", "probe_video")
    ]
    found = [dataclasses.asdict(one) for one in differences_of(rows, "queue")]
    pq.write_table(pa.Table.from_pylist(found), tmp_path / "try-differences.parquet")
    main = runpy.run_path(str(BENCHMARKS / "evidence_table.py"))["main"]
    report = main([str(tmp_path), "--out", str(tmp_path / "out.json")])
    line = next(line for line in capsys.readouterr().out.splitlines() if "active" in line)
    assert line.startswith(
        "| equal steps | active | 10 | 200.0 | 0.610 ± 0.010 | +0.100 [+0.100, +0.100] | 3 : 0, 0.25 |"
    )
    assert len(report["plans"]["try"]) == 4
    again = [row | {"regime": regime} for regime in ("hot", "cold") for row in found]
    pq.write_table(pa.Table.from_pylist(again), tmp_path / "try-differences.parquet")
    main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert "| regime | queue | active |" in lines
    assert "| cold | 0.510 ± 0.010 | +0.100 [+0.100, +0.100] 3 : 0 |" in lines


@pytest.mark.slow
def test_covering_reads_the_same_sound_both_ways(tmp_path: Path) -> None:
    main = runpy.run_path(str(BENCHMARKS / "covering.py"))["main"]
    report = main(["--quick", "--out", str(tmp_path / "out.json")])
    rows = {row["files"]: row for row in report["rows"]}
    assert {"mp4", "ogg"} <= set(rows)
    assert rows["ogg"]["largest_difference_of_sound"] == 0
    assert all(row["windows"] == 5 for row in (rows["mp4"], rows["ogg"]))
    assert (tmp_path / "out.json").stat().st_size > 500


def test_searches_are_compared_with_all_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmacc.search.writer.EXACT_ROWS", 1000)  # rows of the table; it has two for each vector
    main = runpy.run_path(str(BENCHMARKS / "search.py"))["main"]
    arguments = ["--rows", "300", "600", "--dims", "64", "--queries", "10", "--alone"]
    exact, approximate = main(["vectors", str(tmp_path / "out.json"), *arguments])["results"]
    assert set(exact["methods"]) == {"cmacc", "cmacc, whole search", "LanceDB"}
    assert set(approximate["methods"]) == {"cmacc", "cmacc, whole search"}
    assert exact["methods"]["cmacc"]["recall_at_10"] > 0.98  # 1 but for neighbours that rounding swaps
    assert approximate["methods"]["cmacc"]["recall_at_10"] >= 0.95
    assert approximate["methods"]["cmacc"]["recall_when_built"] >= 0.95
    for methods in (exact["methods"], approximate["methods"]):
        for found in methods.values():
            assert 0 < found["p50_ms"] <= found["p95_ms"]
    assert not list(tmp_path.glob("cmacc-search-*"))


@pytest.mark.usefixtures("users_checks")
def test_localise_judges_heat_by_the_objects_box(tmp_path: Path) -> None:
    localise = runpy.run_path(str(BENCHMARKS / "localise.py"))
    report = localise["main"](
        [str(tmp_path / "run"), "--train", "--steps", "1", "--world-clips", "48", "--clips", "4",
         "--ways", "block of 2", "place alone", "gradient x map", "--out", str(tmp_path / "out.json")]
    )  # fmt: skip
    found = {(row["encoder"], row["way"]): row for row in report["results"]}
    assert len(found) == len(report["results"]) == 11
    assert found["none", "exact"]["times"] > 0.95 > found["none", "exact"]["times by chance"]
    assert found["none", "exact"]["map"] == [4, 4, 4]
    assert all(0 <= row["clips"] <= 1 for row in report["results"])
    assert (tmp_path / "out.json").stat().st_size > 1000


def test_the_tables_of_objectives_hold_means_and_intervals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    objectives, alone = (importlib.import_module(name) for name in ("objectives", "alone"))
    runs = tmp_path / "compared" / "runs"
    runs.mkdir(parents=True)
    budget = {"grid": 4.5, "pool": 4.5}
    costs = {where: {"CtP": 0.5} for where in budget}
    (runs.parent / "step-seconds.json").write_text(json.dumps(costs))
    for name, right in (("untrained", 10), ("CtP", 30)):
        for seed in (0, 1):
            values = [1.0] * (right + seed) + [0.0] * (40 - right - seed)
            steps = 0 if name == "untrained" else 9
            cell = {"objective": name, "seed": seed, "budget_seconds": budget, "grid steps": steps, "pool steps": steps}
            cell |= {"terms": {"ctp/iou": 0.25 + 0.5 * seed}} if steps else {}
            cell |= dict.fromkeys(objectives.COLUMNS, values) | {"ucf101 groups": [float(i // 4) for i in range(40)]}
            (runs / f"{name}-{seed}.json").write_text(json.dumps(cell))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{objectives.MARKS[0]}\nold\n{objectives.MARKS[1]}\nafter\n")
    objectives.main(["table", str(tmp_path / "compared"), "--page", str(page), "--out", str(tmp_path / "out.json")])
    line = json.loads((tmp_path / "out.json").read_text())["objectives"]["CtP"]
    assert (line["grid steps"], line["pool step_seconds"]) == (9, 0.5)
    assert line["held-out GRID clips"] == {"ctp/iou": 0.5}
    found = line["esc10 svm"]
    assert found["mean"] == pytest.approx(30.5 / 40)
    assert found["minus untrained"] == pytest.approx(0.5)
    low, high = found["interval of the difference"]
    assert 0.3 < low < 0.5 < high < 0.7
    text = page.read_text()
    assert text.startswith("before\n")
    lines = [line for line in text.splitlines() if line.startswith("| CtP | 500 | ")]
    assert [line.count("<br>") for line in lines] == [5, 3]
    cell = re.compile(r"\*\*76\.[23]\*\*&nbsp;±&nbsp;1\.8<br>\[\d+\.\d,&nbsp;\d+\.\d\]")
    assert all(cell.fullmatch(found) for line in lines for found in line[14:-2].split(" | "))
    assert "old" not in text
    report = {"recipe": "sounds", "seed": 0, "training_seconds": 1.0, "groups": None, "steps": 8}
    right = {name: [1.0] * 30 + [0.0] * 10 for name in ("svm", "knn")}
    wrong = {name: [0.0] * 40 for name in right}
    (tmp_path / "sounds-0.json").write_text(json.dumps(report | {"untrained": wrong, "step 8": right}))
    alone.main(["table", str(tmp_path)])
    assert "| `recipes/sounds.yaml`, ESC-10 | 8 | svm | 0.0 | 75.0 | +75.0 [" in capsys.readouterr().out


def test_the_table_of_heads_has_the_figures_of_the_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    heads = importlib.import_module("heads")
    arrays = heads.planted(60, 0)
    assert np.abs(arrays["labels"]).max() <= 3
    parts = {"train": range(40), "valid": range(40, 50), "test": range(50, 60)}
    np.savez(tmp_path / "planted.npz", **heads.split_arrays(arrays, parts))
    cards, how = tmp_path / "cards", FusionOptions(seeds=(0, 1), epochs=1)
    card = evaluate_fusion(tmp_path / "planted.npz", cards / "fusion_planted", methods=("late",), options=how)
    [found] = [row for row in card.results if row.metric == "pearson"]
    for seed, value in enumerate((0.4, 0.5)):
        row = dataclasses.replace(found, task="emotion", protocol="svm", metric="UAR", untrained=0.3, value=value)
        folder = cards / f"emotion_face-+-masked-audio_{seed}"
        folder.mkdir()
        dataclasses.replace(card, results=(row,)).write(folder / "card.json")
    heads.main(["table", str(tmp_path), "--out", str(tmp_path / "out.json")])
    report = json.loads((tmp_path / "out.json").read_text())
    first, second = report["lines"]
    assert (first["value"], first["interval"]) == (found.value, [found.low, found.high])
    assert (first["by_split"], first["splits"]) == (list(found.by_split.values()), "seeds")
    assert second["value"] == pytest.approx(0.45)
    assert (second["head"], second["splits"]) == ("`svm`, face + masked audio", "encoders")
    last = heads.markdown(report).splitlines()[-1]
    assert "| UAR | 0.450&nbsp;±&nbsp;0.071 | " in last
    assert "| 2&nbsp;encoders | 0.300 | " in last
