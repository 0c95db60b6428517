"""The terms of the objective compared on real clips, for an equal time each: the tables of docs/objectives.md.

    python benchmarks/objectives.py prepare ../shared/data/real OUT
    python benchmarks/objectives.py run OUT [--seconds 150 75] [--seeds 0 1 2] [--half 0|1] [--only NAME ...]
    python benchmarks/objectives.py table OUT [--out benchmarks/results/objectives-cpu.json] [--page docs/objectives.md]

``prepare`` decodes all clips once, and measures what a step of each objective takes. ``run`` trains every objective
twice with every seed, for as many steps as fit into ``--seconds``: on GRID's training part, and on the pool, the clips
of `transfer_data.py` (GRID's and UCF101's training files with sound, assorted clips and rendered ones). A run that
stands in OUT is not made again; two processes with ``--half 0`` and ``--half 1`` share the work. ``table`` writes all
figures as JSON, and the tables into the page, between its two marks. One thread: set OMP_NUM_THREADS=1.

GRID: retrieval among the 200 held-out clips, and among those with the same command; a linear probe of the digit.
ESC-10: SVM, five folds. UCF101, six classes, split 1: linear and kNN. As in `cmacc.transfer`, but with three windows a
file, or one of GRID. Nothing of ESC-50, and none of the held-out files, is trained on.
"""

import argparse
import csv
import dataclasses
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transfer_data
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from cmacc.ablation.clipset import ClipDataset, decode_all
from cmacc.ablation.run import trainer_on
from cmacc.clips import (
    AugmentConfig,
    ClipSpec,
    Manifest,
    evaluation_loader,
    evaluation_requests,
    grey_video,
    to_video,
)
from cmacc.clips.progress import silent
from cmacc.clips.storage import written_aside
from cmacc.encoders import EncoderConfig
from cmacc.objectives import ObjectiveInputs, Terms, WeightedObjectives
from cmacc.pretraining import DataConfig, DictionaryConfig, ObjectiveConfig, OptimConfig, PretrainConfig
from cmacc.pretraining.clip_views import audio_input
from cmacc.pretraining.cmacc_encoder import CmaccEncoder
from cmacc.pretraining.learner import Learner
from cmacc.transfer.official import official_task
from cmacc.transfer.protocols import Rows, knn, linear, ranks, svm
from cmacc.transfer.tasks import TaskData

CPU = torch.device("cpu")
WINDOWS = 3
RESAMPLES = 2000
MARKS = ("<!-- table of benchmarks/objectives.py -->", "<!-- end of the table -->")

GRID = PretrainConfig(
    data=DataConfig(
        clip=ClipSpec(frame_count=10, frame_rate_hz=10.0, frame_height=32, frame_width=40, audio_seconds=1.0),
        # As in recipes/grid.yaml: the signal is a mouth, which strong augmentation would hide.
        augment=AugmentConfig(
            min_crop_area=1.0, max_aspect_change=1.0, flip_probability=0.0, grey_probability=1.0, brightness=0.2,
            contrast=0.2, gain_db=3.0, time_mask=0.0, frequency_mask=0.0,
        ),
    ),
    encoder=EncoderConfig(mel_bins=32),
    optim=OptimConfig(batch_size=32),
)  # fmt: skip
POOL = PretrainConfig(
    data=DataConfig(
        clip=ClipSpec(frame_count=16, frame_rate_hz=4.0, frame_height=32, frame_width=32, audio_seconds=4.0),
        augment=AugmentConfig(window=0.5, stretch=1.5, time_mask=0.0, frequency_mask=0.0),
    ),
    # As in recipes/sounds.yaml and recipes/motion.yaml: encoders whose features do not depend on time.
    encoder=EncoderConfig(audio="small", video_input="differences", video_pooling="mean"),
    optim=OptimConfig(batch_size=32),
)
BASES = {"grid": GRID, "pool": POOL}
# On GRID, two views that hardly differ would be no task: a view of a term of two views is cropped and masked.
GRID_VIEWS = AugmentConfig(
    min_crop_area=0.5, max_aspect_change=1.2, grey_probability=1.0, brightness=0.4, contrast=0.4, gain_db=6.0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Compared:
    """One line of the tables: weights of terms, and changes of the config."""

    terms: dict[str, float]
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    encoder: dict[str, Any] = dataclasses.field(default_factory=dict)
    grid_views: bool = False
    whole_clips: bool = False


OBJECTIVES: dict[str, Compared] = {
    "cross-modal": Compared({"cross_modal": 1.0}),
    "cross-modal, active dictionary": Compared(
        {"cross_modal": 1.0}, {"dictionary": DictionaryConfig("active", 128, 512)}
    ),
    "within-modal": Compared({"cross_modal": 0.0, "within_modal": 1.0}, grid_views=True),
    "cross-modal + within-modal": Compared({"cross_modal": 1.0, "within_modal": 0.5}),
    "CrossCLR": Compared({"cross_modal": 0.0, "crossclr": 1.0}),
    "STiCA": Compared({"cross_modal": 0.0, "stica": 1.0}),
    "CtP": Compared({"cross_modal": 0.0, "ctp": 1.0}, encoder={"video_map_stride": 8}),
    "face + masked audio": Compared({"cross_modal": 0.0, "face": 1.0, "masked_audio": 1.0}, whole_clips=True),
}


def config_of(base: PretrainConfig, name: str, seed: int, steps: int = 1000) -> PretrainConfig:
    """The settings of a run."""
    own = OBJECTIVES[name]
    augment = GRID_VIEWS if own.grid_views and base is GRID else base.data.augment
    augment = dataclasses.replace(augment, window=1.0) if own.whole_clips else augment
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, augment=augment),
        objective=ObjectiveConfig(terms=Terms(**own.terms)),
        optim=dataclasses.replace(base.optim, steps=steps),
        encoder=dataclasses.replace(base.encoder, **own.encoder),
        seed=seed,
        **own.changes,
    )


def prepare(real: Path, out: Path) -> None:
    """Manifests, and all clips decoded: those to train on, and the windows of both tasks."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "pretrain.parquet").exists():
        transfer_data.main(real, out)
    for name, manifest in (("grid", "grid-digit"), ("pool", "pretrain")):
        base = BASES[name]
        if not (out / f"{name}.safetensors").exists():
            data = dataclasses.replace(base.data, manifest=out / f"{manifest}.parquet", workers=1)
            decode_all(dataclasses.replace(base, data=data), out / f"{name}.safetensors", silent)
    with (real / "grid" / "labels.csv").open(newline="") as file:
        words = {Path(row["file"]).stem: row for row in csv.DictReader(file)}
    manifest = Manifest.read(out / "grid-digit.parquet")
    # In the order of `ClipDataset`, training clips first.
    split = manifest.column("split")
    order = sorted(range(len(manifest)), key=lambda i: split[i] == "test")
    rows = [words[Path(manifest.records[i].path).stem] for i in order]
    (out / "grid-words.json").write_text(json.dumps({w: [row[w] for row in rows] for w in ("command", "digit")}))
    for name, task in tasks(real, out).items():
        path = out / f"{name}.safetensors"
        if path.exists():
            continue
        ids = task.sample_ids
        requests = evaluation_requests(task.manifest, ids, POOL.data.clip.length_seconds, WINDOWS)
        batches = list(evaluation_loader(task.manifest, requests, POOL.data.clip, batch_size=48, workers=1))
        whole = {
            "inputs": torch.cat([b.waveforms.half() if name == "esc10" else b.frames for b in batches]),
            "sample_ids": torch.cat([b.sample_ids for b in batches]),
        }
        if any(b.failures for b in batches):
            raise SystemExit(f"{name}: files that do not decode: {[b.failures for b in batches if b.failures]}")
        with written_aside(path) as aside:
            save_file(whole, aside)
    (out / "real.json").write_text(json.dumps(str(real.resolve())))
    if not (out / "step-seconds.json").exists():
        data = {name: ClipDataset(out / f"{name}.safetensors", CPU) for name in BASES}
        (out / "step-seconds.json").write_text(json.dumps(step_seconds(data), indent=1))


def step_seconds(data: dict[str, ClipDataset]) -> dict[str, dict[str, float]]:
    """By data and objective, the median seconds of a step on one core.

    Measured once for all runs, in rounds, and as time of the processor: steps told from each run's own speed, or from
    the clock on the wall, would be fewer where something else ran beside it.
    """
    spent: dict[str, dict[str, list[float]]] = {name: {objective: [] for objective in OBJECTIVES} for name in data}
    for _ in range(3):
        for name, dataset in data.items():
            for objective in OBJECTIVES:
                trainer = trainer_on(dataset, config_of(BASES[name], objective, 0), CPU)
                marks = [time.process_time() for _ in trainer.steps(9)]
                spent[name][objective] += np.diff(marks)[2:].tolist()
    return {name: {o: statistics.median(values) for o, values in own.items()} for name, own in spent.items()}


def tasks(real: Path, out: Path) -> dict[str, TaskData]:
    """ESC-10, and the six classes of UCF101."""
    return {
        "esc10": official_task("esc10", real / "esc50", journal=out / "scans"),
        "ucf101": official_task(
            "ucf101", real / "ucf101", lists=real / "splits" / "ucf101", parts=(1,), allow_partial=True,
            journal=out / "scans",
        ),
    }  # fmt: skip


def trained(dataset: ClipDataset, base: PretrainConfig, name: str, seed: int, steps: int) -> Learner:
    """A learner after that many steps."""
    trainer = trainer_on(dataset, config_of(base, name, seed, max(1, steps)), CPU)
    if steps:
        for _ in trainer.steps():
            pass
    return trainer.learner


def on_grid(learner: Learner, dataset: ClipDataset, words: dict[str, list[str]]) -> dict[str, list[float]]:
    """By metric, a value for each held-out clip."""
    measured = dataset.measured(learner)
    cut = len(dataset.labels)
    video, audio = measured.matched["video"], measured.matched["audio"]
    found = np.stack([ranks(video, audio), ranks(audio, video)])
    _, command = np.unique(words["command"], return_inverse=True)
    inside = np.zeros(len(video))
    for own in (command[cut:] == c for c in np.unique(command)):
        among = np.stack([ranks(video[own], audio[own]), ranks(audio[own], video[own])])
        inside[own] = (among <= 1).mean(0)
    results: dict[str, NDArray[Any]] = {
        "grid R@1": (found <= 1).mean(0),
        "grid R@10": (found <= 10).mean(0),
        "grid R@1 in class": inside,
    }
    _, digit = np.unique(words["digit"], return_inverse=True)
    for modality, (train, test) in measured.features.items():
        results[f"digit {modality}"] = linear(rows(train, digit[:cut]), rows(test, digit[cut:]))[0].per_item
    return {name: values.tolist() for name, values in results.items()}


def rows(features: NDArray[np.float32], labels: NDArray[np.int64], groups: NDArray[np.int64] | None = None) -> Rows:
    """Rows of one window each, or of several."""
    windows = features if features.ndim == 3 else features[:, None]
    return Rows(windows, labels, np.arange(len(labels)) if groups is None else groups)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out clips without augmentation, as a term draws from them; the same draws for every run."""

    inputs: dict[str, torch.Tensor]
    sample_ids: torch.Tensor

    def another(self, modality: str) -> torch.Tensor:
        raise NotImplementedError

    def plain(self, modality: str) -> torch.Tensor:
        return self.inputs[modality]

    def generators(self, term: str) -> list[np.random.Generator]:
        return [np.random.default_rng([0, sample_id]) for sample_id in self.sample_ids.tolist()]


@torch.no_grad()
def of_terms(learner: Learner, dataset: ClipDataset) -> dict[str, float]:
    """What the terms that draw say of themselves on GRID's held-out clips: means of their metrics."""
    assert isinstance(learner.objective, WeightedObjectives)
    config, encoder = learner.config, learner.encoder.eval()
    log_mel = audio_input(config.encoder, config.data.clip.sample_rate_hz)
    ids = len(dataset.labels) + torch.arange(len(dataset.held_out_labels))
    found: list[dict[str, float]] = []
    for rows_of in ids.split(50):
        batch = dataset.batch(rows_of)
        inputs = {"video": grey_video(to_video(batch.frames)), "audio": log_mel(batch.waveforms)}
        drawn = learner.objective.draw(HeldOut(inputs, rows_of))
        more = {name: (e.modality, e.tensor, e.with_feature_map) for name, e in drawn.inputs.items()}
        encoded = encoder(**inputs, feature_maps_of=("audio",), more=more)  # type: ignore[arg-type]
        queries = {name: encoded[name] for name in inputs}
        told = ObjectiveInputs(queries, {}, {}, rows_of, {name: encoded[name] for name in more}, drawn.given)
        found.append({name: value.item() for name, value in learner.objective(told).metrics.items()})
    encoder.train()
    return {name: statistics.mean(of_batch[name] for of_batch in found) for name in found[0]}


@torch.no_grad()
def on_tasks(learner: Learner, found: dict[str, TaskData], out: Path) -> dict[str, list[float]]:
    """By metric, a value for each held-out file, fold after fold."""
    encoder = CmaccEncoder.of_run(learner.config, learner.encoder).eval()  # type: ignore[arg-type]
    results: dict[str, list[float]] = {}
    for name, task in found.items():
        with safe_open(out / f"{name}.safetensors", "pt") as file:
            inputs, ids = file.get_tensor("inputs"), file.get_tensor("sample_ids")
        embed = encoder.embed_audio if name == "esc10" else encoder.embed_video
        features = torch.cat([embed(part.float() if name == "esc10" else part) for part in inputs.split(48)])
        by_file = features.unflatten(0, (-1, WINDOWS)).numpy()
        place = {sample_id: number for number, sample_id in enumerate(ids[::WINDOWS].tolist())}
        for split in task.splits:
            train, test = (
                rows(by_file[[place[i] for i in part]], task.class_of[list(part)], task.groups(part))
                for part in (split.train, split.test)
            )
            for protocol in (svm,) if name == "esc10" else (linear, knn):
                key = f"{name} {protocol.__name__}"
                results.setdefault(key, []).extend(protocol(train, test)[0].per_item.tolist())
                results.setdefault(f"{name} groups", [])
            if name == "ucf101":
                results["ucf101 groups"] = test.groups.astype(float).tolist()
    learner.encoder.train()
    results.pop("esc10 groups")
    return results


def run(out: Path, seconds: tuple[float, float], seeds: list[int], half: int | None, only: list[str]) -> None:
    """Make the runs that are not there."""
    names = [name for name in ("untrained", *OBJECTIVES) if not only or name in only]
    cells = [(name, seed) for seed in seeds for name in names]
    found = tasks(Path(json.loads((out / "real.json").read_text())), out)
    words = json.loads((out / "grid-words.json").read_text())
    data = {name: ClipDataset(out / f"{name}.safetensors", CPU) for name in BASES}
    costs = json.loads((out / "step-seconds.json").read_text())
    budgets = dict(zip(BASES, seconds, strict=True))
    (out / "runs").mkdir(exist_ok=True)
    for number, (name, seed) in enumerate(cells):
        path = out / "runs" / f"{name}-{seed}.json"
        if path.exists() or (half is not None and number % 2 != half):
            continue
        began = time.monotonic()
        cell: dict[str, Any] = {"objective": name, "seed": seed, "budget_seconds": budgets}
        for where, base in BASES.items():
            steps = 0 if name == "untrained" else round(budgets[where] / costs[where][name])
            learner = trained(data[where], base, name if steps else "cross-modal", seed, steps)
            cell[f"{where} steps"] = steps
            cell |= on_grid(learner, data[where], words) if where == "grid" else on_tasks(learner, found, out)
            if where == "grid" and name in ("CtP", "face + masked audio"):
                cell["terms"] = of_terms(learner, data[where])
        with written_aside(path) as aside:
            aside.write_text(json.dumps(cell))
        print(f"{name}, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)


# The tables, by what was trained on, and their columns by metric.
TABLES = {
    "grid": {
        "grid R@1": "R@1", "grid R@10": "R@10", "grid R@1 in class": "R@1 in class", "digit video": "digit, pictures",
        "digit audio": "digit, sound",
    },
    "pool": {"esc10 svm": "ESC-10, SVM", "ucf101 linear": "UCF101-6, linear", "ucf101 knn": "UCF101-6, kNN"},
}  # fmt: skip
COLUMNS = [metric for columns in TABLES.values() for metric in columns]


def table(out: Path) -> dict[str, Any]:
    """All figures: means over seeds, their spread, and intervals over held-out items."""
    cells = [json.loads(path.read_text()) for path in sorted((out / "runs").glob("*.json"))]
    report: dict[str, Any] = {"machine": machine(), "seeds": sorted({c["seed"] for c in cells}), "objectives": {}}
    budgets = [c["budget_seconds"] for c in cells]
    if any(budget != budgets[0] for budget in budgets):
        raise SystemExit(f"{out}: runs of one table must have the same --seconds, got {budgets}")
    report["budget_seconds"] = budgets[0]
    costs = json.loads((out / "step-seconds.json").read_text())
    base = {c["seed"]: c for c in cells if c["objective"] == "untrained"}
    for name in ("untrained", *OBJECTIVES):
        own = [c for c in cells if c["objective"] == name]
        if not own:
            continue
        line: dict[str, Any] = {"seeds": [c["seed"] for c in own]}
        for where in BASES:
            line[f"{where} steps"] = own[0][f"{where} steps"]
            line[f"{where} step_seconds"] = costs[where].get(name)
        told = [c["terms"] for c in own if "terms" in c]
        line["held-out GRID clips"] = {key: statistics.mean(c[key] for c in told) for key in told[0]} if told else None
        for metric in COLUMNS:
            values = np.array([c[metric] for c in own])
            groups = np.array(own[0]["ucf101 groups"]) if metric.startswith("ucf101") else np.arange(values.shape[1])
            line[metric] = {
                "mean": values.mean().item(),
                "deviation": values.mean(1).std(ddof=1).item() if len(own) > 1 else None,
                "interval": interval(values.mean(0), groups),
            }
            pairs = [np.array(c[metric]) - np.array(base[c["seed"]][metric]) for c in own if c["seed"] in base]
            if pairs and name != "untrained":
                line[metric]["minus untrained"] = np.mean(pairs).item()
                line[metric]["interval of the difference"] = interval(np.mean(pairs, axis=0), groups)
        report["objectives"][name] = line
    return report


def interval(values: NDArray[np.float64], groups: NDArray[Any]) -> list[float]:
    """95 % bootstrap interval of the mean over items, of whole groups."""
    _, group = np.unique(groups, return_inverse=True)
    sums, sizes = np.bincount(group, values), np.bincount(group)
    picks = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[picks].sum(1) / sizes[picks].sum(1)
    return [float(np.quantile(means, q)) for q in (0.025, 0.975)]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {"processor": model or platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def markdown(report: dict[str, Any]) -> str:
    """The tables of the page; in bold, differences to the untrained encoders whose interval is above zero."""
    titles = {"grid": "Trained on GRID:", "pool": "Trained on the pool:"}
    return "\n\n".join(f"{titles[where]}\n\n{_table_of(report, where)}" for where in TABLES)


def _table_of(report: dict[str, Any], where: str) -> str:
    """Values have their interval on a second line, and no other break: eight would not fit a page side by side."""
    heads = ["objective", "ms a step", *TABLES[where].values()]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, line in report["objectives"].items():
        spent = line[f"{where} step_seconds"]
        cells = [name, f"{1000 * spent:.0f}" if spent else ""]
        for metric in TABLES[where]:
            found = line[metric]
            low, high = found["interval"]
            value = f"{100 * found['mean']:.1f}"
            if "minus untrained" in found and found["interval of the difference"][0] > 0:
                value = f"**{value}**"
            spread = f"&nbsp;±&nbsp;{100 * found['deviation']:.1f}" if found["deviation"] is not None else ""
            cells.append(f"{value}{spread}<br>[{100 * low:.1f},&nbsp;{100 * high:.1f}]")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tell(report: dict[str, Any], text: str, out: Path | None, page: Path | None, marks: tuple[str, str]) -> None:
    """Print the text, and put it between two marks of a page; write the report as JSON."""
    print(text)
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    if page is None:
        return
    before, _, rest = page.read_text().partition(marks[0])
    _, _, after = rest.partition(marks[1])
    page.write_text(f"{before}{marks[0]}\n\n{text}\n\n{marks[1]}{after}")


def main(arguments: list[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare")
    command.add_argument("real", type=Path)
    command.add_argument("folder", type=Path)
    command = commands.add_parser("run")
    command.add_argument("folder", type=Path)
    command.add_argument("--seconds", type=float, nargs=2, default=(150.0, 75.0), metavar=("GRID", "POOL"))
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    command.add_argument("--half", type=int, choices=(0, 1))
    command.add_argument("--only", nargs="+", default=[], choices=("untrained", *OBJECTIVES))
    command = commands.add_parser("table")
    command.add_argument("folder", type=Path)
    command.add_argument("--out", type=Path)
    command.add_argument("--page", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "prepare":
        prepare(options.real, options.folder)
    elif options.command == "run":
        run(options.folder, tuple(options.seconds), options.seeds, options.half, options.only)
    else:
        report = table(options.folder)
        tell(report, markdown(report), options.out, options.page, MARKS)


if __name__ == "__main__":
    main()
