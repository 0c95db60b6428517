"""Seconds a step of STiCA's crops of the feature map, against the same crops of the pictures (plain multi-crop).

On a CPU, seconds of the processor. A step encodes two views and the sound, and takes the loss back into the weights.
The variants take turns within each round, so that what disturbs the machine disturbs all; printed are the medians of
the rounds.

* ``whole``: no crops, video against audio alone;
* ``map crops``: `STiCA`, whose crops of the map go through the pooling and the head;
* ``picture crops``: the same objective, whose crops of the pictures go through the whole encoder, each resized so that
  its map is as large as the crop of the map.

``--scale small``: the tiny encoders, 32 clips of 16 x 64 x 64, a CPU's runs; ``paper``: r3d_18 and resnet18, 32 clips
of 30 x 112 x 112, for a GPU; ``tiny`` says nothing.

``OMP_NUM_THREADS=1 python benchmarks/stica.py --crops 1 --rounds 3 --out benchmarks/results/stica-cpu.json``:
about two minutes of one core.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cmacc.encoders import AudioVisualEncoder, EncoderConfig, Encoding
from cmacc.objectives import ObjectiveInputs
from cmacc.objectives.stica import STiCA, STiCAConfig

VARIANTS = ("whole", "map crops", "picture crops")
SCALES = {  # encoders, and M, T, H = W
    "tiny": (EncoderConfig(), (4, 4, 32)),
    "small": (EncoderConfig(), (32, 16, 64)),
    "paper": (EncoderConfig(video="r3d_18", audio="resnet18", embedding_size=256), (32, 30, 112)),
}


def map_crops(pair: AudioVisualEncoder, crop: Tensor) -> Encoding:
    """What the encoder makes of a crop of its map."""
    encoding: Encoding = pair.video.project(pair.video.backbone.pool(crop))  # type: ignore[operator]
    return encoding


def picture_crops(pair: AudioVisualEncoder, crop: Tensor, whole: torch.Size, of_map: torch.Size) -> Encoding:
    """What the encoder makes of a crop of the pictures, resized so that its map has the size of a crop of the map."""
    places = [
        max(1, round(part / size * times))
        for part, size, times in zip(crop.shape[2:], whole[2:], of_map[2:], strict=True)
    ]
    wanted = [round(size * count / times) for count, size, times in zip(places, whole[2:], of_map[2:], strict=True)]
    if wanted != list(crop.shape[2:]):
        crop = functional.interpolate(crop, wanted, mode="trilinear")
    encoding: Encoding = pair.video(crop)
    return encoding


def step(pair: AudioVisualEncoder, batch: Mapping[str, Tensor], objective: STiCA, variant: str, seed: int) -> float:
    """One step; its seconds."""
    device = batch["video"].device
    with torch.no_grad():
        of_map = pair.video.backbone.feature_map(batch["video"][:1]).shape  # type: ignore[operator]
    synchronise(device)
    # On a CPU that others use too, its own seconds: of all threads together.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        views = [pair.video(batch[name], with_feature_map=variant == "map crops") for name in ("video", "view")]
        audio = pair.audio(batch["audio"])
        if variant == "picture crops":
            # The objective crops whatever stands in the place of the map.
            views = [
                dataclasses.replace(view, feature_map=batch[name])
                for view, name in zip(views, ("video", "view"), strict=True)
            ]

            def project(modality: str, crop: Tensor) -> Encoding:
                return picture_crops(pair, crop, batch["video"].shape, of_map)
        else:

            def project(modality: str, crop: Tensor) -> Encoding:
                return map_crops(pair, crop)

        loss = objective(
            ObjectiveInputs(
                queries={"video": views[0], "audio": audio},
                keys={},
                negatives={},
                sample_ids=torch.arange(len(audio.embedding), device=device),
                more={"view": views[1]},
                project=project,
                rng=np.random.default_rng(seed),
            )
        ).loss
    loss.backward()
    pair.zero_grad(set_to_none=True)
    synchronise(device)
    return clock() - began


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(scale: str, pooling: str, crops: int, rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of a step by variant, and their ratios."""
    config, (count, frames, pixels) = SCALES[scale]
    torch.manual_seed(0)
    pair = AudioVisualEncoder(dataclasses.replace(config, video_pooling=pooling)).to(device)  # type: ignore[arg-type]
    pair.video.to(memory_format=torch.channels_last_3d)  # as training does
    batch = {name: torch.randn(count, 3, frames, pixels, pixels, device=device) for name in ("video", "view")}
    batch["audio"] = torch.randn(count, config.mel_bins, 200, device=device)
    cropping = STiCA(STiCAConfig(large_crops=crops, small_crops=crops))
    objectives = {name: STiCA(STiCAConfig(alpha=0.0)) if name == "whole" else cropping for name in VARIANTS}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in range(rounds + 1):  # the first warms up
        for name, objective in objectives.items():
            taken = step(pair, batch, objective, name, number)
            if number:
                seconds[name].append(taken)
    found = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [taken / whole for whole, taken in zip(seconds["map crops"], seconds["picture crops"], strict=True)]
    return found | {
        "map_crops_of_whole": found["map crops"] / found["whole"],
        "picture_crops_of_whole": found["picture crops"] / found["whole"],
        "picture_crops_of_map_crops": found["picture crops"] / found["map crops"],
        "least_picture_crops_of_map_crops": min(ratios),
        "most_picture_crops_of_map_crops": max(ratios),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=list(SCALES), default="small")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each variant")
    parser.add_argument("--crops", type=int, nargs="+", default=[1, 2], help="crops of each kind, size and view")
    parser.add_argument("--out", type=Path, help="write the JSON here as well as to stdout's end")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = {}
    for pooling in ("own", "transformer"):
        for crops in options.crops:
            name = f"{pooling}, {8 * crops} crops"
            row = rows[name] = measure(options.scale, pooling, crops, options.rounds, device)
            print(
                f"{name:24}" + "".join(f"{1000 * row[variant]:10.1f} ms {variant}" for variant in VARIANTS), flush=True
            )
    report = {
        "scale": options.scale,
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU seconds, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "rounds": options.rounds,
        "seconds": rows,
    }
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
