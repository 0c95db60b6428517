"""Does it pay to encode chosen keys anew? Runs on rendered clips at equal time, for the default of ``refresh``.

A run's steps are as many as fit into the time that the plain queue takes for ``--steps``, by the ratio of their step
times, which are measured first, turn by turn (so that equal time does not depend on what else the machine does during
the runs). All runs of a seed begin from the same weights. Every clip is decoded once and kept; each step draws its
augmentation anew. Reported of 250 held-out clips: linear probes on the features (8 classes), and R@10 both ways;
means and standard deviations over seeds.

``python benchmarks/refresh.py --out benchmarks/results/refresh-cpu.json``: about half an hour on two cores.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmacc.clips import AugmentConfig, ClipBatch, ClipSpec, Manifest, decode_clip, list_folders, scan, to_video
from cmacc.clips.synthetic import WorldConfig, write_world
from cmacc.encoders import EncoderConfig
from cmacc.pretraining import DataConfig, DictionaryConfig, ObjectiveConfig, OptimConfig, PretrainConfig
from cmacc.pretraining.clock import PhaseClock
from cmacc.pretraining.learner import Learner
from cmacc.pretraining.loop import autocast_dtype, learning_rate
from cmacc.pretraining.step import training_step
from cmacc.transfer import ranks

TRAINING, HELD_OUT = 750, 250
SPEC = ClipSpec(frame_count=8, frame_rate_hz=8.0, frame_height=40, frame_width=40, audio_seconds=1.0)
REFRESH: dict[str, dict[str, Any]] = {
    "stale": {"refresh": "none"},
    "chosen anew": {"refresh": "selected"},
    "all anew, every 10": {"refresh": "dictionary", "refresh_every": 10},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "no dictionary": {"selector": "none"},
    **{
        f"{selector}, {warm}{', ' if fresh else ''}{fresh}": {
            "selector": selector, "warmup_steps": warmup, **REFRESH.get(fresh, {})
        }
        for warm, warmup in (("from step 0", 0), ("from half", -1))
        for selector, fresh in (("newest", ""), *(("active", name) for name in REFRESH))
    },
}  # fmt: skip


def config_of(variant: dict[str, Any], steps: int, seed: int) -> PretrainConfig:
    """A warm-up of -1 stands for half of the steps."""
    variant = dict(variant)
    if variant.get("warmup_steps") == -1:
        variant["warmup_steps"] = steps // 2
    return PretrainConfig(
        data=DataConfig(
            clip=SPEC,
            augment=AugmentConfig(
                min_crop_area=0.8, brightness=0.2, contrast=0.2, saturation=0.2, time_mask=0.0, frequency_mask=0.0
            ),
        ),
        encoder=EncoderConfig(mel_bins=40, hidden_size=128, embedding_size=64),
        dictionary=DictionaryConfig(size=256, pool_size=512, **variant),
        objective=ObjectiveConfig(temperature=0.1, momentum=0.99),
        optim=OptimConfig(steps=steps, warmup_steps=30),
        seed=seed,
    )


def decoded_world(folder: Path) -> ClipBatch:
    """All clips of the world: the first `TRAINING` to train on, the rest held out."""
    world = WorldConfig(
        clip_count=TRAINING + HELD_OUT, class_count=8, nuisance=0.3, frame_size=40, duration_seconds=2.0
    )
    write_world(world, folder / "world")
    scan(list_folders([folder / "world"])).manifest.write(folder / "manifest.parquet")
    manifest = Manifest.read(folder / "manifest.parquet")
    # The files lie in folders of their class.
    order = torch.randperm(len(manifest), generator=torch.Generator().manual_seed(0)).tolist()
    clips = [decode_clip(manifest.records[i].path, 0.5, SPEC) for i in order]
    return ClipBatch(
        torch.stack([clip.frames for clip in clips]),
        torch.stack([clip.waveform for clip in clips]),
        torch.arange(len(clips)),
        torch.tensor(manifest.label_indices())[order],
        {},
    )


def batch_of(clips: ClipBatch, ids: torch.Tensor) -> ClipBatch:
    return dataclasses.replace(
        clips,
        frames=clips.frames[ids],
        waveforms=clips.waveforms[ids],
        sample_ids=clips.sample_ids[ids],
        labels=clips.labels[ids],
    )


def train(clips: ClipBatch, config: PretrainConfig, steps: int, seconds: list[float] | None = None) -> Learner:
    """The first steps of a run."""
    device = torch.device("cpu")
    learner = Learner.build(config, device, autocast_dtype(config, device))
    size = config.optim.batch_size
    for step in range(steps):
        epoch, place = divmod(step, TRAINING // size)
        order = torch.randperm(TRAINING, generator=torch.Generator().manual_seed(1000 * config.seed + epoch))
        for group in learner.optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step)
        started = time.perf_counter()
        training_step(
            learner, batch_of(clips, order[place * size : (place + 1) * size]), step, epoch, PhaseClock(device)
        )
        if seconds is not None:
            seconds.append(time.perf_counter() - started)
    return learner


@torch.no_grad()
def features_of(learner: Learner, clips: ClipBatch) -> dict[str, np.ndarray]:
    """Backbone features and embeddings of all clips, nothing drawn."""
    found: dict[str, list[torch.Tensor]] = {"video": [], "audio": [], "video_key": [], "audio_key": []}
    learner.encoder.eval()
    for ids in torch.arange(len(clips.sample_ids)).split(100):
        with learner.autocast():
            video, audio = learner.encoder(to_video(clips.frames[ids]), learner.log_mel(clips.waveforms[ids]))
        for name, encoding in (("video", video), ("audio", audio)):
            found[name].append(encoding.feature.float())
            found[f"{name}_key"].append(encoding.embedding.float())
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def scores_of(learner: Learner, clips: ClipBatch) -> dict[str, float]:
    """Held-out probes and retrieval."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels = features_of(learner, clips), clips.labels.numpy()
    scores = {}
    for name in ("video", "audio"):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
        probe.fit(features[name][:TRAINING], labels[:TRAINING])
        scores[f"{name} probe"] = float(probe.score(features[name][TRAINING:], labels[TRAINING:]))
    video, audio = features["video_key"][TRAINING:], features["audio_key"][TRAINING:]
    both_ways = np.concatenate([ranks(video, audio), ranks(audio, video)])
    return scores | {"R@10": float((both_ways <= 10).mean())}


def step_ratios(clips: ClipBatch, names: list[str], rounds: int) -> dict[str, float]:
    """Seconds of a step in units of the plain queue's, medians of short runs that take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            steps: list[float] = []
            variant = {**VARIANTS[name], "warmup_steps": 0} if "warmup_steps" in VARIANTS[name] else VARIANTS[name]
            train(clips, config_of(variant, 40, 0), 40, steps)
            seconds[name].append(statistics.fmean(steps[20:]))  # whole cycles of what happens every 10 steps
    typical = {name: statistics.median(values) for name, values in seconds.items()}
    return {name: value / typical["newest, from step 0"] for name, value in typical.items()}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=450, help="of the plain queue; the others' follow from their time")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="turns of the measurement of step times")
    parser.add_argument("--out", type=Path, help="write the JSON here as well as to stdout's end")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        clips = decoded_world(Path(folder))
        print(f"{len(clips.sample_ids)} clips made and read in {time.perf_counter() - started:.0f} s", flush=True)
    # Before and after the warm-up a step costs the same: the keys are made and chosen meanwhile.
    from_zero = ["no dictionary", *(name for name in VARIANTS if "from step 0" in name)]
    ratios = step_ratios(clips, from_zero, options.rounds)
    print(json.dumps({"step_time_of_newest": ratios}, indent=1), flush=True)
    runs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for name, variant in VARIANTS.items():
            steps = round(options.steps / ratios[name.replace("from half", "from step 0")])
            learner = train(clips, config_of(variant, steps, seed), steps)
            runs.append({"variant": name, "seed": seed, "steps": steps, **scores_of(learner, clips)})
            print(json.dumps(runs[-1]), flush=True)
    untrained = Learner.build(config_of(VARIANTS["no dictionary"], 1, 0), torch.device("cpu"), None)
    report = {"step_time_of_newest": ratios, "untrained": scores_of(untrained, clips), "runs": runs}
    print(f"{'mean ± deviation':36} {'steps':>5} {'video probe':>16} {'audio probe':>16} {'R@10':>16}")
    for name in VARIANTS:
        mine = [run for run in runs if run["variant"] == name]
        cells = [[run[key] for run in mine] for key in ("video probe", "audio probe", "R@10")]
        print(f"{name:36} {mine[0]['steps']:5}" + "".join(f" {np.mean(c):9.3f} ± {np.std(c):.3f}" for c in cells))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
