"""What it gives to open a file once for all that is read of it: files examined a second, and how often they are opened.

``python benchmarks/scanning.py --out benchmarks/results/scanning-cpu.json``: under a minute on one core. The two ways
take turns, file by file, on real clips of GRID (``../shared/data``) where they are on the machine, else on rendered
ones. Hash, findings and prints, which both ways have in common, are counted in.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import av

from cmacc.clips.catalog import examine
from cmacc.clips.synthetic import WorldConfig, write_world

GRID = Path(__file__).parents[2] / "shared" / "data" / "real" / "grid" / "clips"
WAYS: dict[str, Callable[[Path], Any]] = {
    "in parts": examine._read_in_parts,
    "at once": examine._read,
}


def films(folder: Path, count: int) -> list[Path]:
    """Real files where there are some, else rendered ones."""
    real = sorted(GRID.glob("*.mp4"))[:count]
    if real:
        return real
    write_world(WorldConfig(clip_count=count, class_count=4, duration_seconds=3.0), folder, workers=1)
    return sorted(folder.rglob("*.mp4"))


def ffmpeg_opens(path: Path, way: str) -> int:
    """How often FFmpeg opens the file in one examination; the hash opens it once more."""
    with mock.patch.object(av, "open", side_effect=av.open) as opened, mock.patch.object(examine, "_read", WAYS[way]):
        examine.examine(path)
    return opened.call_count


def seconds(paths: list[Path], rounds: int) -> dict[str, list[float]]:
    """Wall time over all files in each round; the first round, which warms caches, is dropped."""
    spent: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds + 1):
        totals = dict.fromkeys(WAYS, 0.0)
        for path in paths:
            for way, read in WAYS.items():
                with mock.patch.object(examine, "_read", read):
                    begun = time.perf_counter()
                    examine.examine(path)
                    totals[way] += time.perf_counter() - begun
        for way, total in totals.items():
            spent[way].append(total)
    return {way: totals[1:] for way, totals in spent.items()}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the JSON here as well as to stdout")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        paths = films(Path(name), options.files)
        load = os.getloadavg()[0]
        spent = seconds(paths, options.rounds)
        report = {
            "files": "shared/data/real/grid/clips" if paths[0].parent == GRID else "rendered",
            "file_count": len(paths),
            "load_before": load,
            "av": av.__version__,
            "opens_by_ffmpeg": {way: ffmpeg_opens(paths[0], way) for way in WAYS},
            "files_per_second": {way: [len(paths) / total for total in totals] for way, totals in spent.items()},
            "ratio": statistics.median(a / b for a, b in zip(spent["in parts"], spent["at once"], strict=True)),
        }
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
