"""The main comparison on one GPU, with larger clips, batches and dictionaries than two CPU cores take.

In two steps, since the machine with the GPU may lack the libraries that read files:

1. Where the clips are: ``python benchmarks/evidence_gpu.py decode grid.parquet --clips grid.safetensors``
2. Where the GPU is: ``python benchmarks/evidence_gpu.py run --clips grid.safetensors --out results.json --minutes 9``

The runs take turns by seed (every variant of seed 0 first), and none is begun that would not end within ``--minutes``:
what came of those that were made is written after each. None of this has been run on a GPU yet.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from stand_ins import stand_in_for_missing

stand_in_for_missing("av", "pyarrow", "jsonargparse", "soxr", "fsspec", "yaml")

import torch

from cmacc.ablation.clipset import ClipDataset, decode_all
from cmacc.ablation.run import run_cell
from cmacc.clips import AugmentConfig, ClipSpec
from cmacc.pretraining import DataConfig, DictionaryConfig, ObjectiveConfig, OptimConfig, PretrainConfig

VARIANTS: dict[str, tuple[str, str, str]] = {  # selector, batch keys, refresh
    "newest, both": ("newest", "both", "none"),
    "none, online": ("none", "online", "none"),
    "active fresh, both": ("active", "both", "selected"),
    "newest, momentum": ("newest", "momentum", "none"),
    "active, momentum": ("active", "momentum", "none"),
    "newest, online": ("newest", "online", "none"),
    "active, online": ("active", "online", "none"),
    "random fresh, both": ("random", "both", "selected"),
    "hardest fresh, both": ("hardest", "both", "selected"),
    "random, momentum": ("random", "momentum", "none"),
    "hardest, momentum": ("hardest", "momentum", "none"),
}


def config_of(variant: str, steps: int, seed: int) -> PretrainConfig:
    selector, batch_keys, refresh = VARIANTS[variant]
    return PretrainConfig(
        data=DataConfig(
            clip=ClipSpec(8, 8.0, 40, 48, 1.0),  # all of GRID is then 60 MB, which may travel
            augment=AugmentConfig(
                min_crop_area=1.0, max_aspect_change=1.0, flip_probability=0.0, grey_probability=1.0, brightness=0.2,
                contrast=0.2, gain_db=3.0, time_mask=0.0, frequency_mask=0.0,
            ),
            max_bad_fraction=0.6,
        ),
        dictionary=DictionaryConfig(
            selector=selector,  # type: ignore[arg-type]
            size=256, pool_size=1024, refresh=refresh,  # type: ignore[arg-type]
            refresh_device="accelerator",
        ),
        objective=ObjectiveConfig(batch_keys=batch_keys),  # type: ignore[arg-type]
        optim=OptimConfig(batch_size=64, steps=steps),
        seed=seed,
    )  # fmt: skip


def run(clips: Path, out: Path, steps: int, seeds: int, minutes: float, device: torch.device) -> list[dict[str, Any]]:
    """All runs that fit, seed by seed."""
    ends_at = time.monotonic() + 60 * minutes
    dataset = ClipDataset(clips, device)
    runs: list[dict[str, Any]] = []
    longest = 0.0
    for seed in range(seeds):
        for variant in VARIANTS:
            if time.monotonic() + longest > ends_at:
                print(f"stopped before {variant}, seed {seed}: no time is left")
                return runs
            started = time.monotonic()
            points = run_cell(dataset, config_of(variant, steps, seed), points=4, device=device)
            longest = max(longest, time.monotonic() - started)
            runs.append(
                {"variant": variant, "seed": seed, "steps": steps, "points": [dataclasses.asdict(p) for p in points]}
            )
            shown = {name: round(points[-1].metrics[name], 3) for name in ("R@1", "R@10", "plateau_steps")}
            print(variant, seed, f"{points[-1].seconds:.1f} s", shown, flush=True)
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
            out.write_text(json.dumps({"device": name, "torch": torch.__version__, "runs": runs}, indent=1) + "\n")
    return runs


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    decode = kinds.add_parser("decode")
    decode.add_argument("manifest", type=Path)
    decode.add_argument("--clips", type=Path, required=True)
    running = kinds.add_parser("run")
    running.add_argument("--clips", type=Path, required=True)
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--steps", type=int, default=1000)
    running.add_argument("--seeds", type=int, default=3)
    running.add_argument("--minutes", type=float, default=9.0)
    running.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    if options.kind == "decode":
        config = config_of("newest, both", 1, 0)
        data = dataclasses.replace(config.data, manifest=options.manifest)
        decode_all(dataclasses.replace(config, data=data), options.clips, lambda what, done, total: None)
        return []
    return run(options.clips, options.out, options.steps, options.seeds, options.minutes, torch.device(options.device))


if __name__ == "__main__":
    main()
