"""`select_diverse` on a table of ten million rows on disk: seconds, and memory beside the table.

``python benchmarks/diverse.py --out benchmarks/results/diverse-cpu.json``: half a minute on two cores, 1.3 GB of disk
for as long (in the folder of temporary files). Rows are of 1,000 kinds, float16, 64 columns.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmacc.negatives import select_diverse


def held_bytes() -> int:
    """What the process itself holds, without pages of files (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def make_table(path: Path, rows: int, columns: int) -> None:
    table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(rows, columns))
    rng = np.random.default_rng(0)
    kinds = rng.standard_normal((1000, columns), dtype=np.float32)
    for start in range(0, rows, 100_000):
        stop = min(start + 100_000, rows)
        noise = rng.standard_normal((stop - start, columns), dtype=np.float32)
        table[start:stop] = kinds[rng.integers(1000, size=stop - start)] + 0.3 * noise
    table.flush()


def measure(path: Path, count: int, memory_bytes: int) -> dict[str, Any]:
    select_diverse(np.random.default_rng(0).random((1000, 64), dtype=np.float32), 10, progress=False)
    before, peak, stop = held_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.005):
            peak = max(peak, held_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    picks = select_diverse(
        np.load(path, mmap_mode="r"), count, memory_bytes=memory_bytes, generator=torch.Generator().manual_seed(0)
    )
    seconds = time.perf_counter() - started
    stop.set()
    watcher.join()
    return {
        "count": count, "distinct": len(set(picks.tolist())), "seconds": seconds,
        "memory_bytes_allowed": memory_bytes, "memory_bytes_used": peak - before,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--columns", type=int, default=64)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--memory-bytes", type=int, default=256 << 20)
    parser.add_argument("--out", type=Path, help="write the JSON here as well as to stdout")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.npy"
        make_table(path, options.rows, options.columns)
        report = {
            "rows": options.rows, "columns": options.columns, "dtype": "float16", "table_bytes": path.stat().st_size,
            "threads": torch.get_num_threads(),
            "results": [measure(path, count, options.memory_bytes) for count in options.counts],
        }  # fmt: skip
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
