"""What sounds alone and pictures alone are worth: `recipes/sounds.yaml` on ESC-10, `recipes/motion.yaml` on UCF101.

    python benchmarks/alone.py run sounds|motion ../shared/data/real OUT [--seeds 0 1 2] [--steps N ...]
    python benchmarks/alone.py table OUT [--out benchmarks/results/alone-cpu.json] [--page docs/objectives.md]

``run`` trains each seed with the recipe on the manifests of ``transfer_data.py``, then measures it and the untrained
encoders of the same seed: ESC-10 by SVM and kNN in its five folds; the six classes of UCF101, split 1, by a linear
probe and kNN; ten windows a file, as `cmacc evaluate` does. With ``--steps``, checkpoints after these steps too, for
the curve. Nothing of ESC-10 (nor of its recordings) and none of UCF101's held-out files is trained on. ``table`` writes
all figures as JSON, and a table into the page, between its two marks.

The interval of a difference is a bootstrap over held-out files (ESC-10), or over groups of files cut from one film
(UCF101), of the mean over seeds.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transfer_data
import yaml

from cmacc.clips.storage import written_aside
from cmacc.pretraining import PretrainConfig, config_from_plain, load_encoder, pretrain, start_run, untrained_encoder
from cmacc.pretraining.cmacc_encoder import CmaccEncoder
from cmacc.pretraining.features import embed
from cmacc.transfer.official import official_task
from cmacc.transfer.protocols import knn, linear, svm
from cmacc.transfer.tasks import TaskData
from objectives import interval, machine, rows, tell

ROOT = Path(__file__).parents[1]
WINDOWS = 10
MARKS = ("<!-- table of benchmarks/alone.py -->", "<!-- end of the table of alone.py -->")
MANIFESTS = {"sounds": "sounds.parquet", "motion": "pictures.parquet"}
PROTOCOLS = {"sounds": (svm, knn), "motion": (linear, knn)}


def task_of(what: str, real: Path, out: Path) -> TaskData:
    """The task that a recipe is measured on."""
    if what == "sounds":
        return official_task("esc10", real / "esc50", journal=out / "scans")
    return official_task(
        "ucf101", real / "ucf101", lists=real / "splits" / "ucf101", parts=(1,), allow_partial=True,
        journal=out / "scans",
    )  # fmt: skip


def measured(encoder: CmaccEncoder, task: TaskData, what: str, cache: Path) -> dict[str, list[float]]:
    """By protocol, 1 or 0 for each held-out file, fold after fold."""
    modality = task.modalities[0]
    ids = task.sample_ids
    found = embed(encoder.eval(), task.manifest, ids, (modality,), windows=WINDOWS, workers=1, cache=cache / "features")
    features = found.by_modality[modality]
    place = {sample_id: number for number, sample_id in enumerate(found.sample_ids.tolist())}
    results: dict[str, list[float]] = {}
    for split in task.splits:
        train, test = (
            rows(features[[place[i] for i in part]], task.class_of[list(part)], task.groups(part))
            for part in (split.train, split.test)
        )
        for protocol in PROTOCOLS[what]:
            values = protocol(train, test)[0].per_item
            results.setdefault(protocol.__name__, []).extend(values.tolist())
    return results


def run(what: str, real: Path, out: Path, seeds: list[int], marks: list[int]) -> None:
    """Train and measure the seeds that are not there."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "data" / MANIFESTS[what]).exists():
        transfer_data.one_modality(real, out / "data")
    task = task_of(what, real, out)
    recipe = config_from_plain(yaml.safe_load((ROOT / "recipes" / f"{what}.yaml").read_text()))
    for seed in seeds:
        path = out / f"{what}-{seed}.json"
        if path.exists():
            continue
        data = dataclasses.replace(recipe.data, manifest=out / "data" / MANIFESTS[what])
        config = dataclasses.replace(recipe, data=data, seed=seed, save_every=max(1, recipe.optim.steps // 4))
        config = dataclasses.replace(config, keep_every=config.save_every)
        run_dir = out / f"{what}-{seed}"
        if not (run_dir / "config.yaml").exists():
            start_run(config, run_dir)
        began = time.monotonic()
        pretrain(run_dir)
        seconds = time.monotonic() - began
        groups = [int(g) for split in task.splits for g in task.groups(split.test)] if what == "motion" else None
        report: dict[str, Any] = {"recipe": what, "seed": seed, "training_seconds": seconds, "groups": groups}
        report["untrained"] = measured(CmaccEncoder.of_run(config, untrained_encoder(config)), task, what, out)
        for step in sorted({*marks, config.optim.steps}):
            report[f"step {step}"] = measured(trained(config, run_dir, step), task, what, out)
        report["steps"] = config.optim.steps
        with written_aside(path) as aside:
            aside.write_text(json.dumps(report))
        print(f"{what}, seed {seed}: trained in {seconds:.0f} s", flush=True)


def trained(config: PretrainConfig, run_dir: Path, step: int) -> CmaccEncoder:
    """The encoders of a checkpoint."""
    pair = untrained_encoder(config)
    load_encoder(pair, run_dir / "checkpoints" / f"step-{step:08d}")
    return CmaccEncoder.of_run(config, pair)


def table(out: Path) -> dict[str, Any]:
    """All figures: means over seeds, their spread, and the differences to the untrained encoders."""
    reports = [json.loads(path.read_text()) for path in sorted(out.glob("*-*.json"))]
    found: dict[str, Any] = {"machine": machine(), "recipes": {}}
    for what in MANIFESTS:
        own = [report for report in reports if report["recipe"] == what]
        if not own:
            continue
        line: dict[str, Any] = {
            "seeds": [report["seed"] for report in own],
            "training_seconds": [round(report["training_seconds"]) for report in own],
            "steps": own[0]["steps"],
            "points": {},
        }
        for protocol in PROTOCOLS[what]:
            name = protocol.__name__
            before = np.array([report["untrained"][name] for report in own])
            groups = np.arange(before.shape[1]) if own[0]["groups"] is None else np.array(own[0]["groups"])
            line[name] = {"untrained": figures(before), "steps": {}}
            # A curve of one seed alone is not drawn: only points that every seed has.
            for point in (key for key in own[0] if key.startswith("step ") and all(key in r for r in own)):
                after = np.array([report[point][name] for report in own])
                line[name]["steps"][point.removeprefix("step ")] = figures(after) | {
                    "difference": float((after - before).mean()),
                    "interval": interval((after - before).mean(0), groups),
                }
        found["recipes"][what] = line
    return found


def figures(values: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Mean and standard deviation over seeds."""
    return {"mean": float(values.mean()), "deviation": float(values.mean(1).std(ddof=1)) if len(values) > 1 else None}


def markdown(report: dict[str, Any]) -> str:
    """The table of the page."""
    names = {"sounds": "`recipes/sounds.yaml`, ESC-10", "motion": "`recipes/motion.yaml`, UCF101-6"}
    lines = ["| recipe | steps | probe | untrained | trained | difference [95 %] |", "|---|---|---|---|---|---|"]
    for what, line in report["recipes"].items():
        for protocol in PROTOCOLS[what]:
            own = line[protocol.__name__]
            for step, after in own["steps"].items():
                low, high = (100 * value for value in after["interval"])
                cells = [names[what], step, protocol.__name__, shown(own["untrained"]), shown(after)]
                cells.append(f"{100 * after['difference']:+.1f} [{low:+.1f}, {high:+.1f}]")
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(found: dict[str, Any]) -> str:
    """``80.0 ± 1.2``."""
    spread = "" if found["deviation"] is None else f" ± {100 * found['deviation']:.1f}"
    return f"{100 * found['mean']:.1f}{spread}"


def main(arguments: list[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run")
    command.add_argument("what", choices=tuple(MANIFESTS))
    command.add_argument("real", type=Path)
    command.add_argument("folder", type=Path)
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    command.add_argument("--steps", type=int, nargs="+", default=[])
    command = commands.add_parser("table")
    command.add_argument("folder", type=Path)
    command.add_argument("--out", type=Path)
    command.add_argument("--page", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "run":
        torch.set_num_threads(1)
        run(options.what, options.real, options.folder, options.seeds, options.steps)
        return
    report = table(options.folder)
    tell(report, markdown(report), options.out, options.page, MARKS)


if __name__ == "__main__":
    main()
