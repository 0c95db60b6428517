"""`select_diverse` on tables in files: the same picks as from memory, within the memory that it was given."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cmacc.negatives import kmeans_plusplus, select_diverse


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("factors", [False, True])
def test_a_memory_map_gives_the_picks_of_a_tensor(tmp_path: Path, dtype: type, factors: bool) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((3000, width)).astype(dtype) for width in (24, 10)][: 1 + factors]
    mapped = []
    for number, array in enumerate(arrays):
        np.save(tmp_path / f"{number}.npy", array)
        mapped.append(np.load(tmp_path / f"{number}.npy", mmap_mode="r"))
    tensors = [torch.from_numpy(array) for array in arrays]
    given = [tensor[:7] + 1 for tensor in tensors]

    def points(tables: list) -> tuple | torch.Tensor | np.ndarray:
        return tuple(tables) if factors else tables[0]

    wanted = kmeans_plusplus(points(tensors), 50, generator=_generator(), initial_centers=points(given))
    for memory_bytes in (1 << 30, 1 << 26):
        picks = select_diverse(
            points(mapped),
            50,
            initial_centers=points(given),
            generator=_generator(),
            memory_bytes=memory_bytes,
            progress=False,
        )
        assert picks.tolist() == wanted.tolist()


def test_initial_centers_count_against_the_memory() -> None:
    table = np.zeros((1000, 128), dtype=np.float64)
    with pytest.raises(ValueError, match=r"memory_bytes must be at least .* and 50000 initial centers, got"):
        select_diverse(table, 5, initial_centers=np.zeros((50_000, 128)), memory_bytes=1 << 26)


@pytest.mark.slow
def test_memory_stays_within_its_bound(tmp_path: Path) -> None:
    """512 MB of rows on disk, 128 MB allowed: what the process itself holds grows by no more than that."""
    table = np.lib.format.open_memmap(tmp_path / "t.npy", mode="w+", dtype=np.float16, shape=(2_000_000, 128))
    block = np.random.default_rng(0).standard_normal((20_000, 128)).astype(np.float16)
    for start in range(0, len(table), len(block)):
        table[start : start + len(block)] = np.roll(block, start // len(block), axis=1)
    table.flush()
    code = """
import sys, threading, time, numpy as np, torch
from cmacc.negatives import select_diverse
torch.set_num_threads(1)
def held():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024
select_diverse(np.random.rand(1000, 128).astype(np.float16), 100, progress=False)
before, peak = held(), [0]
def watch():
    while True:
        peak[0] = max(peak[0], held()); time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
picks = select_diverse(np.load(sys.argv[1], mmap_mode="r"), 300, memory_bytes=128 << 20, progress=False)
print(len(set(picks.tolist())), peak[0] - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "t.npy"], capture_output=True, text=True, check=True, timeout=300
    )
    distinct, grown = map(int, result.stdout.split())
    assert distinct == 300
    assert grown < 128 << 20


@pytest.mark.usefixtures("users_checks")
def test_errors() -> None:
    table = np.random.default_rng(0).standard_normal((5000, 8)).astype(np.float32)
    with pytest.raises(
        ValueError, match=r"select_diverse: memory_bytes must be at least \d+ for 5000 rows .*, got 1000"
    ):
        select_diverse(table, 5, memory_bytes=1000)
    with pytest.raises(ValueError, match=r"select_diverse: count must be in 1\.\.5000 .*, got 5001"):
        select_diverse(table, 5001)
    with pytest.raises(ValueError, match=r"select_diverse: points must be of a float type, got int64"):
        select_diverse(np.ones((5, 2), dtype=np.int64), 1)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"select_diverse: initial_centers must have the columns of points, \[8\], got \[7\]"
    ):
        select_diverse(table, 5, initial_centers=table[:, :7])
    table[4321, 2] = np.inf
    with pytest.raises(ValueError, match=r"select_diverse: points must be finite, got NaN or infinity in row 4321"):
        select_diverse(table, 5)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)
