"""What the training loader costs: clips a second, and the memory that its workers take of their own.

* Speed: clips a second with 0, 1 and 2 workers, of files that give 1 or 4 clips each time they are opened; in each
  round the variants take turns, and the median of the rounds counts. Files are GRID's where they are on the machine
  (``../shared/data/real/grid/clips``), else rendered ones.
* Memory: of 2 workers, after they have looked up 100,000 rows of manifests of up to a million, for ours and for a
  Dataset that holds Python lists, the usual way. The rows lead to the same few files by paths of about 80 characters.
  USS is what a worker has for itself, PSS counts shared pages by its share of them. Nothing is decoded for these
  figures, since it is looking a file up that has a forked worker copy the pages of Python objects.

``python benchmarks/loading.py --out benchmarks/results/loading-cpu.json``: about five minutes on two cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, Dataset

from cmacc.clips import Clip, ClipSpec, Manifest, MediaRecord, TrainingPlan, probe, training_loader
from cmacc.clips.synthetic import WorldConfig, write_world

GRID = Path(__file__).parents[2] / "shared" / "data" / "real" / "grid" / "clips"
SPEC = ClipSpec(16, 16.0, 112, 112, 2.0)
TINY = ClipSpec(1, 16.0, 8, 8, 0.1, 8_000)
MIB = 2**20


class PathList(Dataset[int]):
    """The usual way: Python objects a file, here a path, a duration and a label. Looks at a file's, decodes nothing."""

    def __init__(self, paths: list[str], durations: list[float], labels: list[str]) -> None:
        self.samples = list(zip(paths, durations, labels, strict=True))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> int:
        path, duration, label = self.samples[index]
        return len(path) + int(duration) + len(label)


def films(folder: Path, count: int) -> list[Path]:
    """Real files where there are some, else rendered ones."""
    real = sorted(GRID.glob("*.mp4"))[:count]
    if real:
        return real
    write_world(WorldConfig(clip_count=count, class_count=4, duration_seconds=3.0), folder, workers=1)
    return sorted(folder.rglob("*.mp4"))


def manifest_of(paths: list[Path]) -> Manifest:
    infos = [probe(path) for path in paths]
    return Manifest(
        MediaRecord(p, i.duration_seconds, i.fps, i.width, i.height, i.has_audio, i.audio_rate_hz, "a")
        for p, i in zip(paths, infos, strict=True)
    )


def speeds(paths: list[Path], rounds: int, batch_size: int, worker_counts: list[int]) -> list[dict[str, Any]]:
    """Clips a second of a short run, from its begin: the start of its workers is part of it, and is told beside it."""
    manifest = manifest_of(paths)
    variants = [(workers, k) for workers in worker_counts for k in (1, 4)]
    found: dict[tuple[int, int], list[tuple[float, float]]] = {variant: [] for variant in variants}
    steps = 4 * (len(paths) // batch_size)
    for number in range(rounds):
        for workers, k in variants:
            plan = TrainingPlan(manifest, tuple(range(len(paths))), SPEC.length_seconds, batch_size, number, k)
            began = time.perf_counter()
            times = [
                time.perf_counter() for _ in training_loader(plan, SPEC, first_step=0, last_step=steps, workers=workers)
            ]
            found[workers, k].append((times[0] - began, batch_size * steps / (times[-1] - began)))
    return [
        {
            "workers": workers,
            "clips_per_video": k,
            "clips_per_second": statistics.median(rate for _, rate in rows),
            "clips_per_second_of_rounds": [rate for _, rate in rows],
            "first_batch_seconds": statistics.median(start for start, _ in rows),
        }
        for (workers, k), rows in found.items()
    ]


def long_manifest(paths: list[Path], count: int, folder: Path) -> Manifest:
    """Rows of a few real files, by names of about 80 characters that lead to them."""
    targets = []
    for number, path in enumerate(paths):
        name = f"{folder}/{'x' * max(1, 76 - len(str(folder)) - 10)}_{number:04d}.mp4"
        os.link(path, name) if path.stat().st_dev == folder.stat().st_dev else Path(name).write_bytes(path.read_bytes())
        targets.append(Path(name))
    few = manifest_of(targets)
    manifest = Manifest()
    manifest.table = few.table.take(np.arange(count) % len(paths))
    return manifest


def memory_of(what: str, manifest: Path, start_method: str, touched: int) -> dict[str, Any]:
    """In a process of its own, so that one measurement's leftovers are not the next one's."""
    command = [sys.executable, __file__, "--measure", what, str(manifest), start_method, str(touched)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(what: str, manifest_path: str, start_method: str, touched: str) -> dict[str, Any]:
    """Look ``touched`` rows up, and see what the workers have taken."""
    manifest = Manifest.read(manifest_path)
    count = len(manifest)
    began = time.perf_counter()
    batches: Any
    if what == "ours":
        plan = TrainingPlan(manifest, tuple(range(count)), TINY.length_seconds, 100, 0)
        batches = training_loader(
            plan,
            TINY,
            first_step=0,
            last_step=10**9,
            workers=2,
            start_method=start_method,  # type: ignore[arg-type]
        )
        batches._dataset._decode = Looker(batches._dataset.files)
    else:
        dataset = PathList(*(manifest.column(name) for name in ("path", "duration_seconds", "label")))
        del manifest
        order = np.random.default_rng(0).permutation(count)
        indices = [order[i : i + 100].tolist() for i in range(0, count, 100)] * (-(-2 * int(touched) // count))
        batches = DataLoader(dataset, batch_sampler=indices, num_workers=2, multiprocessing_context=start_method)
    iterator = iter(batches)
    next(iterator)
    ready_seconds = time.perf_counter() - began
    for _ in range(int(touched) // 100):
        next(iterator)
    workers = [c for c in psutil.Process().children() if "resource_tracker" not in " ".join(c.cmdline())]
    used = [worker.memory_full_info() for worker in workers]
    return {
        "what": what,
        "rows": count,
        "start_method": start_method,
        "worker_uss_mib": max(u.uss for u in used) / MIB,
        "worker_pss_mib": max(u.pss for u in used) / MIB,
        "main_rss_mib": psutil.Process().memory_info().rss / MIB,
        "first_batch_seconds": ready_seconds,
    }


class Looker:
    """Stands in for the decoder: finds the file as it does, and gives a clip of nothing."""

    def __init__(self, files: Any) -> None:
        self.files = files

    def __call__(self, sample_id: int, starts: list[float]) -> list[Any]:
        self.files.source(sample_id)
        return [
            Clip(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.zeros(800), start, torch.zeros(1), 0.0)
            for start in starts
        ]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="sizes that say nothing, to see that it runs")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the JSON here as well as to stdout's end")
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return {}
    row_counts = [1_000] if options.quick else [10_000, 100_000, 1_000_000]
    methods = ["fork"] if options.quick else ["fork", "spawn"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = films(folder / "world", 8 if options.quick else 128)
        speed = speeds(paths, 1, 2, [0, 1]) if options.quick else speeds(paths, 3, 16, [0, 1, 2])
        memory = []
        for count in row_counts:
            rows = folder / f"{count}"
            rows.mkdir()
            long_manifest(paths[:4], count, rows).write(rows / "rows.parquet")
            for start_method in methods:
                for what in ("ours", "list"):
                    memory.append(memory_of(what, rows / "rows.parquet", start_method, min(count, 100_000)))
                    print(json.dumps(memory[-1]), flush=True)
    report = {
        "files": "shared/data/real/grid/clips" if paths[0].parent == GRID else "rendered",
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "torch": torch.__version__,
        "speed": speed,
        "memory": memory,
        "list_of_ours": [
            {
                "rows": ours["rows"],
                "start_method": ours["start_method"],
                "worker_uss": usual["worker_uss_mib"] / ours["worker_uss_mib"],
                "worker_pss": usual["worker_pss_mib"] / ours["worker_pss_mib"],
            }
            for ours, usual in zip(memory[::2], memory[1::2], strict=True)
        ],
        "worker_uss_growth_mib": {
            f"{what}, {method}": max(sizes) - min(sizes)
            for what in ("ours", "list")
            for method in methods
            if (sizes := [m["worker_uss_mib"] for m in memory if (m["what"], m["start_method"]) == (what, method)])
        },
    }
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
