"""The line of the certificate on the loader: workers and processes do not change which clips are in a batch."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cmacc.clips import Manifest, TrainingPlan, list_folders, scan, training_loader
from cmacc.pretraining.clip_stream import training_plan
from cmacc.pretraining.verify.lines import Line, Subject, Trace, compare

_STEPS = 3
_WORKERS = (1, 2)


def loader_order(subject: Subject) -> list[Line]:
    """Batches of a tiny synthetic world, decoded by 0, 1 and 2 workers, and in parts as by several processes."""
    names = ("loader, workers = none", "loader, parts of processes = whole batches")
    if not _can_write_videos():
        return [Line.skipped(name, "PyAV is not installed") for name in names]
    config = subject.config
    ranks = 2 ** (max(2, subject.processes).bit_length() - 1)
    with TemporaryDirectory(prefix="cmacc-verify-") as folder:
        manifest = _world(Path(folder), config.optim.batch_size + 4, config.data.clip.length_seconds)
        plan = training_plan(manifest, range(len(manifest)), config)
        wanted = _batches(subject, plan, 0)
        by_workers = [_batches(subject, plan, workers) for workers in _WORKERS]
        parts = [_batches(subject, plan, 0, rank, ranks) for rank in range(ranks)]
    compares = f"sample ids, frames and sound of {_STEPS} batches"
    lines = [compare(names[0], f"{compares}, by 0, 1 and 2 workers", found, wanted, 0.0) for found in by_workers]
    joined = {key: torch.cat([part[key] for part in parts], dim=1) for key in wanted}
    return [
        max(lines, key=lambda line: not line.passed),
        compare(names[1], f"{compares}, by {ranks} processes", joined, wanted, 0.0),
    ]


def _can_write_videos() -> bool:
    try:
        import av
    except ImportError:
        return False
    return isinstance(getattr(av, "__version__", None), str)  # not a stand-in, as in benchmarks/gpu.py


def _world(folder: Path, clip_count: int, clip_seconds: float) -> Manifest:
    from cmacc.clips.synthetic import WorldConfig, write_world

    world = WorldConfig(
        clip_count=clip_count,
        class_count=4,
        nuisance=0.0,
        frame_size=32,
        duration_seconds=min(60.0, max(2.0, math.ceil(clip_seconds) + 1.0)),
    )
    write_world(world, folder / "world", workers=1)
    return scan(list_folders([folder / "world"])).manifest


def _batches(subject: Subject, plan: TrainingPlan, workers: int, rank: int = 0, ranks: int = 1) -> Trace:
    data = subject.config.data
    loader = training_loader(
        plan,
        data.clip,
        first_step=0,
        last_step=_STEPS,
        workers=workers,
        rank=rank,
        ranks=ranks,
        start_method=data.start_method,
    )
    batches = list(loader)
    names = ("sample_ids", "frames", "waveforms")
    return {name: torch.stack([getattr(batch, name) for batch in batches]) for name in names}
