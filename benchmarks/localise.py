"""Whether the heat maps of ``cmacc localise`` point at what sounds, on clips of the synthetic world, where it is known.

    python benchmarks/localise.py runs/0 runs/1 --train --world-seeds 7 8 --out benchmarks/results/localise-cpu.json

``--train`` makes the runs, as `cmacc demo` trains: seeds 0, 1, ...; without it they must be there. One window in the
middle of every clip: of those that the run holds out, or of other worlds. For each time of the map, the object's
box there is the smallest that contains it at the frames of that time. Told are, for the trained and the untrained
encoders of a run:

- ``times``: share of all times of all clips at which the heat's centre of mass lies in the box;
- ``clips``: share of the clips in which it does so at more than half of the times;
- ``frames``: share of all frames in whose own box it lies, which the map's coarse times bound (``exact``);
- chance for each: the same heat with the boxes of other clips;
- ``other sound``: heat for the sound of another clip, with the clip's own box;
- ``exact``: the share of the frame in the object's box instead of heat;
- ``regression``: what the map knows of the place, by ridge regression from its features, fitted on clips of training.

The ways to make heat are the one of the package, occlusion of blocks of 2 x 2 places, and those that it was compared
with.
"""

import argparse
import importlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmacc.clips import ClipSpec, Manifest, decode_clip, list_folders, scan
from cmacc.clips.synthetic import WorldConfig, describe_clip, write_world
from cmacc.clips.synthetic.motion import trace
from cmacc.pretraining import pretrain, start_run
from cmacc.search.localise import agreement_and_heat, centre_of_mass
from cmacc.transfer import SpatialEncoder, open_encoder

_AT_ONCE = 16


def train(folder: Path, seed: int, steps: int, count: int) -> None:
    """The run of ``cmacc demo``, which has 960 clips and 500 steps."""
    from cmacc.cli.demo import _demo_config

    world = WorldConfig(clip_count=count, class_count=8, nuisance=0.3, frame_size=64, seed=seed)
    write_world(world, folder / "world", workers=1)
    scan(list_folders([folder / "world"]), test_fraction=0.25).manifest.write(folder / "manifest.parquet")
    start_run(_demo_config(folder / "manifest.parquet", steps, seed), folder)
    pretrain(folder)


def files_of(run: Path, split: str, count: int) -> tuple[WorldConfig, list[Path]]:
    """The world of a run, and files of a split."""
    world = WorldConfig(**json.loads((run / "world" / "world.json").read_text()))
    records = Manifest.read(run / "manifest.parquet").records
    paths = [Path(record.path) for record in records if record.split == split]
    return world, paths[:: max(1, len(paths) // count)]  # in the order of their classes


def other_world(run: Path, seed: int, count: int, folder: Path) -> tuple[WorldConfig, list[Path]]:
    """A world like that of the run, but of another seed."""
    world = WorldConfig(**json.loads((run / "world" / "world.json").read_text()))
    world = replace(world, seed=seed, clip_count=count)
    return world, sorted(write_world(world, folder, workers=1).rglob("*.mp4"))


def clips(world: WorldConfig, paths: list[Path], spec: ClipSpec) -> tuple[Tensor, Tensor, NDArray[np.float64]]:
    """Frames, waveforms, and the object's box in every frame: left, top, right, bottom as shares, ``(n, T, 4)``."""
    frames, waveforms, boxes = [], [], []
    for path in paths:
        clip = decode_clip(path, (world.duration_seconds - spec.length_seconds) / 2, spec)
        event = describe_clip(world, int(path.stem.rpartition("_")[2]))
        track = trace(event, clip.frame_seconds.numpy(), world.duration_seconds)
        radius = event.size * track.scale
        boxes.append(np.stack([track.x - radius, track.y - radius, track.x + radius, track.y + radius], 1))
        frames.append(clip.frames)
        waveforms.append(clip.waveform)
    return torch.stack(frames), torch.stack(waveforms), np.stack(boxes)


def in_blocks(size: int) -> Callable[..., Tensor]:
    """The heat of the package, with blocks of another size."""

    def heat(encoder: SpatialEncoder, frames: Tensor, waveforms: Tensor) -> Tensor:
        module = importlib.import_module("cmacc.search.localise")  # the package has a function of this name
        with mock.patch.object(module, "_BLOCK", size):
            return agreement_and_heat(encoder, frames, waveforms)[1]

    return heat


def place_alone(encoder: SpatialEncoder, frames: Tensor, waveforms: Tensor) -> Tensor:
    """Cosine of the sound with the map cut down to one place, at all times; the least of a clip is zero heat."""
    with torch.no_grad():
        heard = encoder.match_audio(encoder.embed_audio(waveforms))
        maps = encoder.map_video(frames)
        _, _, times, height, width = maps.shape
        alone = [
            (encoder.match_video(encoder.pool_map(maps[..., row : row + 1, column : column + 1])) * heard).sum(1)
            for row in range(height)
            for column in range(width)
        ]
    heat = torch.stack(alone, 1).view(-1, 1, height, width).expand(-1, times, -1, -1)
    return heat - heat.amin((2, 3), keepdim=True)


def gradient(encoder: SpatialEncoder, frames: Tensor, waveforms: Tensor) -> Tensor:
    """Gradient of the agreement with respect to the map, times the map."""
    with torch.no_grad():
        heard = encoder.match_audio(encoder.embed_audio(waveforms))
        maps = encoder.map_video(frames)
    maps.requires_grad_(True)
    agreement = (encoder.match_video(encoder.pool_map(maps)) * heard).sum()
    (slope,) = torch.autograd.grad(agreement, maps)
    return (slope * maps.detach()).sum(1)


WAYS: dict[str, Callable[[SpatialEncoder, Tensor, Tensor], Tensor]] = {
    "block of 2": in_blocks(2),
    "block of 1": in_blocks(1),
    "block of 3": in_blocks(3),
    "place alone": place_alone,
    "gradient x map": gradient,
}


def heat_of(
    way: Callable[[SpatialEncoder, Tensor, Tensor], Tensor], encoder: Any, frames: Tensor, waveforms: Tensor
) -> Tensor:
    parts = zip(frames.split(_AT_ONCE), waveforms.split(_AT_ONCE), strict=True)
    return torch.cat([way(encoder, some, sound) for some, sound in parts])


def exact_heat(boxes: NDArray[np.float64], times: int, height: int, width: int, fine: int = 16) -> Tensor:
    """Share of each place, and of the frames of each time, that lies in the box."""
    y, x = ((np.arange(size * fine) + 0.5) / (size * fine) for size in (height, width))
    left, top, right, bottom = (boxes[..., side, None] for side in range(4))
    inside = ((y >= top) & (y <= bottom))[..., :, None] & ((x >= left) & (x <= right))[..., None, :]
    shares = inside.reshape(len(boxes), times, -1, height, fine, width, fine).mean((2, 4, 6))
    return torch.from_numpy(shares)


def regressed(
    encoder: Any, train: tuple[Tensor, Tensor, NDArray[np.float64]], frames: Tensor, ridge: float = 100.0
) -> Tensor:
    """What the map knows, whatever its agreement with the sound: ridge regression from a place to `exact_heat`."""
    with torch.no_grad():
        known, asked = (
            torch.cat([encoder.map_video(some) for some in of.split(_AT_ONCE)]) for of in (train[0], frames)
        )
    wanted = exact_heat(train[2], *known.shape[2:]).flatten().double()
    rows = known.movedim(1, -1).flatten(0, -2).double()
    mean, deviation = rows.mean(0), rows.std(0) + 1e-6
    rows = (rows - mean) / deviation
    inner = rows.T @ rows + ridge * torch.eye(rows.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(inner, rows.T @ (wanted - wanted.mean()))
    return (asked.movedim(1, -1).double() - mean) / deviation @ weights + wanted.mean()


def judge(heat: Tensor, boxes: NDArray[np.float64]) -> dict[str, float]:
    """Shares of times, clips and frames, and each by chance."""
    count, times = heat.shape[:2]
    centres = np.asarray([[centre_of_mass(one) for one in clip] for clip in heat.float().numpy()])
    per_time = boxes.shape[1] // times
    by_time = boxes.reshape(count, times, per_time, 4)
    joined = np.concatenate([by_time[..., :2].min(2), by_time[..., 2:].max(2)], -1)
    for_frames = np.repeat(centres, per_time, axis=1)

    def shares(shift: int) -> tuple[float, float, float]:
        at_times = _inside(centres, np.roll(joined, shift, 0))
        at_frames = _inside(for_frames, np.roll(boxes, shift, 0))
        return float(at_times.mean()), float((at_times.mean(1) > 0.5).mean()), float(at_frames.mean())

    names = ("times", "clips", "frames")
    chance = np.mean([shares(shift) for shift in range(1, count)], axis=0)
    return dict(zip(names, shares(0), strict=True)) | {
        f"{name} by chance": float(value) for name, value in zip(names, chance, strict=True)
    }


def _inside(points: NDArray[np.float64], boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.asarray(((points >= boxes[..., :2]) & (points <= boxes[..., 2:])).all(-1))


def measure(
    run: Path, world: WorldConfig, paths: list[Path], ways: list[str], fit_count: int = 0
) -> list[dict[str, Any]]:
    """Judge the trained and the untrained encoders of a run on these files; with a regression on as many others."""
    opened = open_encoder(str(run))
    train = clips(*files_of(run, "train", fit_count), opened.encoder.spec) if fit_count else None
    frames, waveforms, boxes = clips(world, paths, opened.encoder.spec)
    about = {
        "encoder_seed": opened.facts.seed,
        "steps": opened.facts.checkpoint_step,
        "world_seed": world.seed,
        "clip_count": len(paths),
    }
    results = []
    shape: tuple[int, ...] = ()
    for state, encoder in (("trained", opened.encoder), ("untrained", opened.untrained)):
        for name in ways:
            heat = heat_of(WAYS[name], encoder, frames, waveforms)
            shape = tuple(heat.shape[1:])
            results.append(about | {"encoder": state, "way": name} | judge(heat, boxes))
        heat = heat_of(WAYS["block of 2"], encoder, frames, waveforms.roll(len(paths) // 3, 0))
        results.append(about | {"encoder": state, "way": "block of 2, other sound"} | judge(heat, boxes))
        if train is not None:
            heat = regressed(encoder, train, frames)
            results.append(about | {"encoder": state, "way": "regression"} | judge(heat, boxes))
    exact = judge(exact_heat(boxes, *shape), boxes)
    return [*results, about | {"encoder": "none", "way": "exact", "map": list(shape)} | exact]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of `cmacc demo`")
    parser.add_argument("--train", action="store_true", help="make the runs first, with seeds 0, 1, ...")
    parser.add_argument("--steps", type=int, default=500, help="of --train")
    parser.add_argument("--world-clips", type=int, default=960, help="of --train, a quarter of them held out")
    parser.add_argument(
        "--world-seeds",
        nargs="+",
        type=int,
        default=[],
        help="also clips of these worlds, with the package's way alone",
    )
    parser.add_argument("--clips", type=int, default=240)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, help="write the JSON here as well as to stdout")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {"torch": torch.__version__, "results": []}
    for seed, run in enumerate(options.runs):
        if options.train:
            train(run, seed, options.steps, options.world_clips)
        report["results"] += measure(run, *files_of(run, "test", options.clips), options.ways, 2 * options.clips)
        for world_seed in options.world_seeds:
            with tempfile.TemporaryDirectory() as folder:
                other = other_world(run, world_seed, options.clips, Path(folder))
                report["results"] += measure(run, *other, ["block of 2"])
    text = json.dumps(_rounded(report), indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return report


def _rounded(report: dict[str, Any]) -> dict[str, Any]:
    rows = [
        {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        for row in report["results"]
    ]
    return report | {"results": rows}


if __name__ == "__main__":
    main()
