"""Heads on pretrained towers: speed of towers, retrieval learned from little data, and heads at the paper's scale.

    python benchmarks/towers.py speed OUT.json
    python benchmarks/towers.py learn ../shared/data/real FOLDER OUT.json
    python benchmarks/towers.py scratch ../shared/data/real FOLDER OUT.json
    python benchmarks/towers.py table OUT.json
    python benchmarks/towers.py scale OUT.json

``speed``: parameters, clips per second frozen and trained, and the peak memory of towers, each in a process of its own.
Networks of transformers have the size of their base models and random weights.

``learn``: heads on EfficientNet-Lite0 and Google's speech embedding, on real clips. One set is UCF101's three classes
with sound (the groups of split 1 held out) and the assorted clips; the other is GRID (a quarter held out). Retrieval
among held-out clips, for random and active batches and for dictionaries, three seeds each; and ESC-10 with the trained
audio head. ``scratch`` adds cmacc's own small encoders, trained for the time that features and heads took together.

``scale``: steps per second of heads on synthetic features, with M = 1,024 and K = N = 38,400.
"""

import argparse
import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmacc.ablation.problem import Measured, plain_rows
from cmacc.ablation.run import run_cell
from cmacc.clips import ClipSpec, LabelTable, Manifest, list_folders, scan
from cmacc.encoders import MODALITIES, AudioVisualEncoder, EncoderConfig, Modality
from cmacc.pretraining import (
    BatchesConfig,
    DataConfig,
    DictionaryConfig,
    ObjectiveConfig,
    OptimConfig,
    PretrainConfig,
    TrainConfig,
    Trainer,
    pretrain,
    start_run,
    trained_encoder,
    untrained_encoder,
)
from cmacc.pretraining.cmacc_encoder import CmaccEncoder
from cmacc.pretraining.features import embed
from cmacc.pretraining.fitting import fitted_to_towers
from cmacc.pretraining.kept_features import FeatureTable
from cmacc.pretraining.learner import Learner
from cmacc.pretraining.table import TableProblem
from cmacc.transfer import evaluate, ranks

PACKAGED = "python:cmacc.encoders.towers.packaged:"
TOWERS = EncoderConfig(video=f"{PACKAGED}efficientnet_lite0", audio=f"{PACKAGED}speech_embedding")
HEADS = TrainConfig(video="head", audio="head")
SOUNDING = ("BabyCrawling", "BodyWeightSquats", "BoxingPunchingBag")
SEEDS = (0, 1, 2)
# Chosen within the training files of UCF101, a third of their groups apart, three draws: of 50 to 400 steps, and of
# temperatures from 0.02 to 0.5 with and without the positive in the denominator.
_STEPS = 100
_OBJECTIVE = ObjectiveConfig(temperature=0.05, decoupled=False)
CPU = torch.device("cpu")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": model[0].partition(": ")[2] if model else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


# ------------------------------------------------------------------------------------------------------------- speed

# Name, modality, and what a clip is where the tower takes any.
MEASURED: dict[str, tuple[str, Modality]] = {
    "cmacc tiny": ("tiny", "video"),
    "EfficientNet-Lite0": (TOWERS.video, "video"),
    "timm ViT-Ti/16": ("timm:vit_tiny_patch16_224", "video"),
    "torchvision ResNet-18": ("torchvision:resnet18", "video"),
    "torchvision R3D-18": ("torchvision:r3d_18", "video"),
    "VideoMAE base": ("hf:VideoMAE", "video"),
    "cmacc tiny audio": ("tiny", "audio"),
    "speech embedding": (TOWERS.audio, "audio"),
    "wav2vec 2.0 base": ("hf:Wav2Vec2", "audio"),
    "AST base": ("hf:AST", "audio"),
}


def speed(out: Path) -> None:
    """The table of towers."""
    rows = {}
    for name in MEASURED:
        done = subprocess.run([sys.executable, __file__, "one", name], capture_output=True, text=True, check=True)
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, rows[name], flush=True)
    written(out, {"machine": machine(), "towers": rows})


def one(name: str) -> None:
    """One row of the table, on stdout."""
    tower, modality = MEASURED[name]
    with tempfile.TemporaryDirectory() as folder:
        if tower.startswith("hf:"):
            tower = _random_model(tower.removeprefix("hf:"), Path(folder))
        config = EncoderConfig(**{modality: tower})
        before = _memory()
        pair = AudioVisualEncoder(config)
        encoder = getattr(pair, modality)
        takes = getattr(encoder.backbone, "takes", None)

        def wanted(setting: str, default: Any) -> Any:
            return getattr(takes, setting, None) or default

        size = wanted("frame_height", 64)
        rate, seconds = wanted("sample_rate_hz", 16_000), wanted("audio_seconds", 2.0)
        frames = wanted("frame_count", 8)
        inputs = (
            torch.randn(4, 3, frames, size, size) if modality == "video" else 0.1 * torch.randn(4, int(rate * seconds))
        )
        if tower == "tiny" and modality == "audio":
            inputs = torch.randn(4, 80, 201)
        trains = getattr(encoder.backbone, "can_train", True)

        def frozen() -> None:
            with torch.inference_mode():
                encoder(inputs)

        def trained() -> None:
            encoder(inputs).embedding[:, 0].sum().backward()

        encoder.eval()
        row = {
            "parameters": sum(p.numel() for p in encoder.backbone.parameters()),
            "clip": f"{frames} x {size} x {size}" if modality == "video" else f"{seconds:g} s at {rate} Hz",
            "feature_size": encoder.feature_size,
            "frozen_clips_per_second": len(inputs) / _best(frozen),
            "frozen_mebibytes": _memory() - before,
        }
        if trains:
            encoder.train()
            row["trained_clips_per_second"] = len(inputs) / _best(trained)
            row["trained_mebibytes"] = _memory() - before
    print(json.dumps(row))


def _random_model(kind: str, folder: Path) -> str:
    """The base model of that kind, untrained, as a folder of transformers."""
    import transformers

    build: dict[str, Callable[[], tuple[Any, Any]]] = {
        "VideoMAE": lambda: (
            transformers.VideoMAEModel(transformers.VideoMAEConfig()),
            transformers.VideoMAEImageProcessor(),
        ),
        "Wav2Vec2": lambda: (
            transformers.Wav2Vec2Model(transformers.Wav2Vec2Config()),
            transformers.Wav2Vec2FeatureExtractor(),
        ),
        "AST": lambda: (transformers.ASTModel(transformers.ASTConfig()), transformers.ASTFeatureExtractor()),
    }
    for part in build[kind]():
        part.save_pretrained(folder)
    return f"hf:{folder}"


def _best(run: Callable[[], None], rounds: int = 3) -> float:
    """Least seconds of a call, after one to warm up."""
    run()
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return min(taken)


def _memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ------------------------------------------------------------------------------------------------------------- learn


class FeatureSet(FeatureTable):
    """Kept features of training files, and of held-out ones to measure."""

    in_float32 = True

    def __init__(self, training: dict[Modality, Any], held_out: dict[Modality, Any], labels: Tensor, asked: Tensor):
        super().__init__(training, labels, CPU)
        self._held_out = {modality: torch.from_numpy(rows) for modality, rows in held_out.items()}
        self.held_out_labels = asked

    @torch.no_grad()
    def measured(self, learner: Learner) -> Measured:
        """Embeddings averaged over the windows of a file."""
        encoder = learner.encoder.eval()
        matched = {}
        for modality, rows in self._held_out.items():
            embedding = getattr(encoder, modality)(rows.flatten(0, 1)).embedding.unflatten(0, rows.shape[:2])
            matched[modality] = plain_rows(nn.functional.normalize(embedding.mean(1), dim=1))
        encoder.train()
        features = {
            m: (plain_rows(self._features[m].mean(1)), plain_rows(self._held_out[m].mean(1))) for m in MODALITIES
        }
        return Measured(features, matched)


def manifests(real: Path, out: Path) -> dict[str, Path]:
    """The two sets, with what is held out in split test."""
    import pyarrow as pa

    found = {"ucf101 and assorted": out / "sounding.parquet", "grid": out / "grid.parquet"}
    if not all(path.exists() for path in found.values()):
        out.mkdir(parents=True, exist_ok=True)
        ucf101 = real / "ucf101"
        table = LabelTable(ucf101 / "manifest.csv", "label", "split1", "group", "file")
        sounding = scan(list_folders([ucf101 / name for name in SOUNDING], table), min_seconds=0.5).manifest
        assorted = scan(list_folders([real / "wild"]), min_seconds=0.5).manifest
        joined = Manifest.of_table(pa.concat_tables([sounding.table, assorted.table]))
        joined.write(found["ucf101 and assorted"])
        words = LabelTable(real / "grid" / "labels.csv", "digit")
        scan(list_folders([real / "grid" / "clips"], words), test_fraction=0.25, min_seconds=0.5).manifest.write(
            found["grid"]
        )
    return found


def config_of(manifest: Path, **changes: Any) -> PretrainConfig:
    """Heads on the two towers."""
    data = DataConfig(manifest=manifest, clip=ClipSpec(frame_count=4, frame_rate_hz=2.0), workers=1, feature_windows=4)
    config, _ = fitted_to_towers(
        PretrainConfig(data=data, encoder=TOWERS, train=HEADS, objective=_OBJECTIVE, precision="fp32")
    )
    return dataclasses.replace(config, **changes)


def feature_set(manifest: Path, cache: Path) -> tuple[FeatureSet, float, dict[str, int]]:
    """The features of a set, the seconds that the training files took, and the numbers of files."""
    from cmacc.pretraining.clip_stream import usable_files

    config, read = config_of(manifest), Manifest.read(manifest)
    towers = CmaccEncoder.of_run(config, untrained_encoder(config)).eval().backbones
    usable, _ = usable_files(read, config)
    asked = read.ids_where(
        lambda record: (
            record.split == "test" and record.has_audio and record.has_picture and "silent" not in record.findings
        )
    )
    kept = cache / f"{manifest.stem}-seconds.json"
    started = time.perf_counter()
    training, held_out = (
        embed(towers, read, ids, MODALITIES, windows=4, workers=1, cache=cache) for ids in (usable, asked)
    )
    if not kept.exists():
        kept.write_text(json.dumps((time.perf_counter() - started) * len(usable) / (len(usable) + len(asked))))
    labels = torch.tensor(read.label_indices(), dtype=torch.int64)
    dataset = FeatureSet(
        training.by_modality,
        held_out.by_modality,
        labels[torch.from_numpy(training.sample_ids)],
        labels[torch.from_numpy(held_out.sample_ids)],
    )
    counts = {"training": len(training.sample_ids), "held_out": len(held_out.sample_ids)}
    return dataset, float(json.loads(kept.read_text())), counts


def variants(count: int) -> dict[str, dict[str, Any]]:
    """What is compared: batches and dictionaries, with M = 64 and 256 and K = N as large as the data allow."""
    found: dict[str, dict[str, Any]] = {}
    for size in (64, 256):
        optim = {"optim": OptimConfig(batch_size=size, steps=_STEPS)}
        found[f"M={size}, random batches"] = optim
        found[f"M={size}, active batches"] = optim | {"batches": BatchesConfig(selector="active", group_size=8)}
        keys = (count - size) // size * size
        if keys >= size:
            for selector in ("newest", "active"):
                dictionary = DictionaryConfig(selector=selector, size=keys, pool_size=keys, allow_repeats=True)
                found[f"M={size}, {selector} dictionary, K=N={keys}"] = optim | {"dictionary": dictionary}
    return found


def learn(real: Path, folder: Path, out: Path) -> None:
    """Retrieval from little data."""
    results: dict[str, Any] = {"machine": machine(), "seeds": SEEDS}
    for name, manifest in manifests(real, folder).items():
        dataset, extraction, counts = feature_set(manifest, folder / "cache")
        rows: dict[str, Any] = {}
        for variant, changes in variants(counts["training"]).items():
            found, seconds = [], []
            for seed in SEEDS:
                point = run_cell(dataset, config_of(manifest, seed=seed, **changes), points=1)[-1]
                found.append({key: point.metrics[key] for key in ("R@1", "R@10", "median_rank")})
                seconds.append(point.seconds)
            rows[variant] = {"metrics": found, "seconds": seconds}
            print(name, variant, summary(found), f"{np.mean(seconds):.1f} s", flush=True)
        untrained = [run_cell_untrained(dataset, config_of(manifest, seed=seed)) for seed in SEEDS]
        results[name] = counts | {
            "feature_seconds": extraction, "heads": rows, "untrained heads": untrained,
            "chance": {
                "R@1": 1 / counts["held_out"],
                "R@10": 10 / counts["held_out"],
                "median_rank": (counts["held_out"] + 1) / 2,
            },
        }  # fmt: skip
        written(out, results)
    results["esc10"] = esc10(real, folder)
    written(out, results)


def scratch(real: Path, folder: Path, out: Path) -> None:
    """The same sets from scratch, for the time that features and heads took in the results at ``out``."""
    results = json.loads(out.read_text())
    for name, manifest in manifests(real, folder).items():
        of_set = results[name]
        budget = of_set["feature_seconds"] + float(np.mean(of_set["heads"]["M=64, random batches"]["seconds"]))
        runs = [from_scratch(manifest, folder / f"{manifest.stem}-scratch-{seed}", seed, budget) for seed in SEEDS]
        print(name, "from scratch", summary([run["metrics"] for run in runs]), f"{budget:.0f} s", flush=True)
        of_set["from scratch"] = runs
        written(out, results)


def summary(found: list[dict[str, float]]) -> str:
    """Means over the seeds."""
    return ", ".join(f"{key} {np.mean([row[key] for row in found]):.3f}" for key in found[0])


def run_cell_untrained(dataset: FeatureSet, config: PretrainConfig) -> dict[str, float]:
    """Retrieval by heads before the first step."""
    trainer = Trainer(TableProblem(dataset, config, CPU), config, CPU)
    return retrieval(dataset.measured(trainer.learner).matched)


def retrieval(matched: dict[Modality, Any]) -> dict[str, float]:
    """Both directions together, as `cmacc.ablation.scores` has them."""
    found = np.stack([ranks(matched["video"], matched["audio"]), ranks(matched["audio"], matched["video"])])
    return {
        "R@1": float((found <= 1).mean()),
        "R@10": float((found <= 10).mean()),
        "median_rank": float(np.median(found, axis=1).mean()),
    }


def from_scratch(manifest: Path, run: Path, seed: int, budget: float) -> dict[str, Any]:
    """cmacc's own small encoders, trained for a time in seconds with their schedule fitted to it."""
    data = DataConfig(
        manifest=manifest,
        clip=ClipSpec(frame_count=8, frame_rate_hz=4.0, frame_height=64, frame_width=64),
        clips_per_video=4,
    )

    def trained(steps: int) -> float:
        config = PretrainConfig(data=data, optim=OptimConfig(batch_size=32, steps=steps), seed=seed, save_every=10**6)
        start_run(config, run, overwrite=True)
        started = time.perf_counter()
        pretrain(run)
        return time.perf_counter() - started

    short, longer = trained(5), trained(25)
    steps = max(30, round(25 + (budget - longer) / ((longer - short) / 20)))
    seconds = trained(steps)
    from cmacc.pretraining import read_config

    config = read_config(run / "config.yaml")
    pair, _ = trained_encoder(run, config)
    read = Manifest.read(manifest)
    asked = read.ids_where(
        lambda record: (
            record.split == "test" and record.has_audio and record.has_picture and "silent" not in record.findings
        )
    )
    found = embed(CmaccEncoder.of_run(config, pair.eval()), read, asked, MODALITIES, windows=4, workers=1)
    return {"metrics": retrieval(found.matched_by_file()), "steps": steps, "seconds": seconds}


class AudioHead(nn.Module):
    """The audio tower for ESC-10: its feature, what the trained head makes of it, or both."""

    modalities = ("audio",)

    def __init__(self, encoder: CmaccEncoder, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder, self.parts = encoder, parts
        self.spec = dataclasses.replace(encoder.spec, audio_seconds=5.0, frame_count=1, short_files="loop")
        self.device = CPU

    def embed_video(self, frames: Tensor) -> Tensor:
        """Not supported."""
        raise NotImplementedError

    def embed_audio(self, waveforms: Tensor) -> Tensor:
        """The parts, one after the other."""
        feature = self.encoder.embed_audio(waveforms)
        encoding = self.encoder.pair.audio.project(feature)
        return torch.cat([getattr(encoding, part) for part in self.parts], dim=1)


def esc10(real: Path, folder: Path) -> dict[str, Any]:
    """ESC-10 with the audio tower, and with the head that was trained on UCF101 and the assorted clips."""
    results: dict[str, Any] = {}
    for seed in SEEDS:
        config = config_of(
            folder / "sounding.parquet", seed=seed, optim=OptimConfig(batch_size=64, steps=_STEPS), save_every=10**6
        )
        run = folder / f"heads-{seed}"
        start_run(config, run, overwrite=True)
        pretrain(run, cache=folder / "cache")
        encoder = CmaccEncoder.of_run(config, trained_encoder(run, config)[0]).eval()
        for name, parts in (
            ("tower", ("feature",)), ("head", ("penultimate",)), ("tower and head", ("feature", "penultimate"))
        ):  # fmt: skip
            if name == "tower" and seed > 0:
                continue  # the same for every seed
            card = evaluate(
                AudioHead(encoder, parts).eval(), ["esc10"], real / "esc50", folder / f"esc10-{name}-{seed}",
                protocols=["linear", "svm"], overwrite=True,
            )  # fmt: skip
            accuracy = {row.protocol: row.value for row in card.results if row.metric == "accuracy"}
            results.setdefault(name, []).append(accuracy)
            print("esc10", name, seed, accuracy, flush=True)
    return results


def table(out: Path) -> None:
    """The results of ``learn`` and ``scratch`` as Markdown, for docs/towers-measured.md."""
    results = json.loads(out.read_text())
    metrics = ("R@1", "R@10", "median_rank")

    def row(name: str, found: list[dict[str, float]], seconds: str) -> None:
        cells = []
        for metric in metrics:
            values = np.array([run[metric] for run in found]) * (1 if metric == "median_rank" else 100)
            spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.1f}{spread}")
        print(f"| {name} | {' | '.join(cells)} | {seconds} |")

    for name, of_set in ((key, value) for key, value in results.items() if "heads" in value):
        print(f"\n{name}: {of_set['training']} files, {of_set['held_out']} held out\n")
        print("| | R@1 | R@10 | median rank | seconds |\n|---|---|---|---|---|")
        row("chance", [{"R@10": 10 / of_set["held_out"]} | of_set["chance"]], "")
        row("untrained heads", of_set["untrained heads"], "")
        for variant, of_variant in of_set["heads"].items():
            row(variant, of_variant["metrics"], f"{np.mean(of_variant['seconds']):.1f}")
        if runs := of_set.get("from scratch"):
            seconds = f"{np.mean([run['seconds'] for run in runs]):.0f}"
            row("from scratch", [run["metrics"] for run in runs], seconds)
    print("\nESC-10 | " + " | ".join(("linear", "svm")))
    for name, found in results.get("esc10", {}).items():
        values = {key: np.array([run[key] for run in found]) * 100 for key in ("linear", "svm")}
        print(name, {key: f"{v.mean():.1f} ± {v.std(ddof=1) if len(v) > 1 else 0:.1f}" for key, v in values.items()})


# ------------------------------------------------------------------------------------------------------------- scale


def scale(out: Path, batch_size: int = 1024, keys: int = 38_400, steps: int = 6) -> None:
    """Steps per second of heads on synthetic features of the towers' sizes."""
    generator = np.random.default_rng(0)
    count = keys + 2 * batch_size
    latent = generator.standard_normal((count, 1, 64)).astype(np.float32)

    def side(size: int) -> Any:
        mixed = latent @ generator.standard_normal((64, size)).astype(np.float32)
        return mixed + generator.standard_normal((count, 2, size)).astype(np.float32)

    table = FeatureTable({"video": side(1280), "audio": side(288)}, torch.full((count,), -1), CPU)
    rows: dict[str, Any] = {}
    for name, selector in (("no dictionary", "none"), ("newest", "newest"), ("active", "active")):
        dictionary = DictionaryConfig(selector=selector, size=keys, pool_size=keys, refresh="none", allow_repeats=True)
        fill = 0 if selector == "none" else keys // batch_size
        config = PretrainConfig(
            encoder=TOWERS, train=HEADS, dictionary=dictionary, precision="fp32",
            optim=OptimConfig(batch_size=batch_size, steps=fill + steps),
        )  # fmt: skip
        trainer = Trainer(TableProblem(table, config, CPU), config, CPU)
        done = [step.metrics for step in trainer.steps()][fill:]
        phases = sorted(key for key in done[0] if key.startswith("seconds/"))
        rows[name] = {key: float(np.median([row[key] for row in done])) for key in phases}
        rows[name]["clips_per_second"] = batch_size / rows[name]["seconds/step"]
        print(name, rows[name], flush=True)
    written(out, {"machine": machine(), "M": batch_size, "K=N": keys, "steps": rows})


def written(out: Path, results: dict[str, Any]) -> None:
    """Write the results so far."""
    aside = out.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(results, indent=1) + "\n")
    aside.replace(out)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for part in ("speed", "table"):
        parts.add_parser(part).add_argument("out", type=Path)
    for part in ("learn", "scratch"):
        learning = parts.add_parser(part)
        for name in ("real", "folder", "out"):
            learning.add_argument(name, type=Path)
    scaling = parts.add_parser("scale")
    scaling.add_argument("out", type=Path)
    scaling.add_argument("--batch-size", type=int, default=1024)
    scaling.add_argument("--keys", type=int, default=38_400)
    parts.add_parser("one").add_argument("name")
    options = parser.parse_args()
    if options.part == "speed":
        speed(options.out)
    elif options.part == "learn":
        learn(options.real, options.folder, options.out)
    elif options.part == "table":
        table(options.out)
    elif options.part == "scratch":
        scratch(options.real, options.folder, options.out)
    elif options.part == "scale":
        scale(options.out, options.batch_size, options.keys)
    else:
        one(options.name)


if __name__ == "__main__":
    main()
