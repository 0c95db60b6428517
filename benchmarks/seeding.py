"""How long k-means++ seeding takes: ours against the textbook's form, scikit-learn and explicit outer products.

Every figure of a run is measured in that run, on one machine, on the same rows, so that the ratios mean something:

* ``ours``: `cmacc.negatives.kmeans_plusplus` as it is called, checks included, by each of its methods;
* ``one_by_one_torch``: the plain loop in torch on the factors, one pass a pick (what the blocks are to beat);
* ``sklearn``: `sklearn.cluster.kmeans_plusplus` with one trial, on flat rows as wide as both factors together: the
  same numbers read and as many multiplications a pick;
* ``explicit``: the loop on the outer products themselves, as BADGE's public code has it, where they fit into 2 GB.

``passes`` counts reads of all factors (the one for the lengths included), ``bytes`` what they move, ``of_bandwidth``
the share of the time that moving them takes at the bandwidth measured here. Rows are gradient embeddings of a made-up
pool (200 classes, Zipf, temperature 0.1; `pool`), at the target's size also Gaussian rows, tight clusters and copies.

``python benchmarks/seeding.py --out benchmarks/results/seeding-cpu.json``: some ten minutes on two cores. On a GPU it
measures that as well; it needs torch, scikit-learn and cmacc's negatives.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from cmacc.negatives import Keys, gradient_factors, kmeans_plusplus
from cmacc.negatives import seeding as engine

TARGET = {"rows": 38_400, "width": 512, "count": 128}
EXPLICIT_BYTES = 2 << 30
# A competitor is run only where a guess from its figure at the target size says that it takes no longer.
LONGEST_SECONDS = 30.0


def pool(rows: int, width: int, kind: str = "gradients") -> tuple[Tensor, Tensor]:
    """Factors to choose among, float32."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    if kind == "gaussian":
        return normal(rows, width), normal(rows, width)
    if kind in ("clusters", "copies"):
        of = torch.randint(100 if kind == "clusters" else 500, (rows,), generator=g)
        centres = [normal(500, width) for _ in range(2)]
        spread = 0.1 if kind == "clusters" else 0.0
        left, right = (centre[of].add_(normal(rows, width), alpha=spread) for centre in centres)
        return left, right
    zipf = 1 / torch.arange(1, 201, dtype=torch.float64) ** 1.0
    classes = normal(200, width)
    of, asked = (torch.multinomial(zipf, n, replacement=True, generator=g) for n in (rows, 128))
    queries = normalize(classes[asked] + normal(128, width), dim=1)
    left = torch.empty(rows, width)
    for part in torch.arange(rows).split(100_000):
        keys = normalize(classes[of[part]] + normal(len(part), width), dim=1)
        bare = Keys.from_embedding(keys, part, 0, penultimate=keys[:, :1])
        left[part] = gradient_factors(bare, queries, 0.1).left
    return left, normal(200, width)[of].add_(normal(rows, width)).relu_()


def one_by_one_torch(left: Tensor, right: Tensor, count: int) -> list[int]:
    """The plain loop: one pass over the factors a pick."""
    lengths = left.square().sum(1) * right.square().sum(1)
    nearest = torch.full_like(lengths, torch.inf)
    picks = [int(torch.randint(len(left), ()))]
    for _ in range(count - 1):
        c = picks[-1]
        squared = lengths + lengths[c] - 2 * (left @ left[c]) * (right @ right[c])
        nearest = torch.minimum(nearest, squared.clamp_min_(0))
        nearest[c] = 0
        cumulative = nearest.double().cumsum(0)
        picks.append(
            int(torch.searchsorted(cumulative, torch.rand((), dtype=torch.float64).to(cumulative) * cumulative[-1]))
        )
    return picks


def explicit(left: Tensor, right: Tensor, count: int) -> list[int]:
    """The loop on the products themselves; their making counts."""
    rows = torch.einsum("na,nb->nab", left, right).flatten(1)
    nearest = torch.full((len(rows),), torch.inf)
    picks = [int(torch.randint(len(rows), ()))]
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, (rows - rows[picks[-1]]).square_().sum(1))
        picks.append(int(torch.multinomial(nearest, 1)))
    return picks


def sklearn_flat(flat: NDArray[np.float32], count: int, threads: int) -> None:
    """On flat rows of both factors' width."""
    from sklearn.cluster import kmeans_plusplus as sklearn_seeding
    from threadpoolctl import threadpool_limits

    with threadpool_limits(threads):
        sklearn_seeding(flat, count, n_local_trials=1, random_state=0)


def best_seconds(work: Callable[[], object], repeats: int, device: str) -> float:
    """The least of several runs: what disturbs a run only adds to it."""
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def bandwidth(device: str) -> float:
    """Bytes a second at which a table larger than any cache is read."""
    table = torch.ones(1 << (28 if device == "cuda" else 26), device=device)
    return table.nbytes / best_seconds(table.sum, 5, device)


def ours(left: Tensor, right: Tensor, count: int, method: str, rate: float) -> dict[str, Any]:
    """Time of the public function; passes from the loop behind it on the same random numbers."""
    seen: list[engine.Seeding] = []
    bare = engine.seed

    def watched(*args: Any, **options: Any) -> engine.Seeding:
        seen.append(bare(*args, **options))
        return seen[-1]

    engine.seed = watched  # type: ignore[assignment]
    try:
        options: dict[str, Any] = {"local_trials": 4} if method == "greedy of 4" else {"method": method}

        def work() -> Tensor:
            return kmeans_plusplus((left, right), count, generator=torch.Generator().manual_seed(0), **options)

        work()
        seconds = best_seconds(work, 3 if method == "blocks" else 1, left.device.type)
    finally:
        engine.seed = bare
    passes = seen[-1].passes + 1
    moved = passes * (left.nbytes + right.nbytes)
    return {
        "what": f"ours, {method}", "seconds": seconds, "passes": passes, "proposals": seen[-1].proposals,
        "bytes": moved, "of_bandwidth": moved / rate / seconds,
    }  # fmt: skip


def cases(quick: bool) -> Iterator[tuple[int, int, int, str]]:
    """(rows, width, count, kind)."""
    if quick:
        yield from ((2000, 32, count, "gradients") for count in (16, 64))
        return
    for kind in ("gradients", "gaussian", "clusters", "copies"):
        yield TARGET["rows"], TARGET["width"], TARGET["count"], kind
    for count in (16, 1024, 4096):
        yield TARGET["rows"], TARGET["width"], count, "gradients"
    for rows in (4_000, 38_400, 200_000, 1_000_000):
        for count in (16, 128, 1024):
            yield rows, 128, count, "gradients"
    yield 1_000_000, 128, 4096, "gradients"


def measure(quick: bool, device: str, threads: int) -> list[dict[str, Any]]:
    """All cases on one device with one number of threads."""
    torch.set_num_threads(threads)
    rate = bandwidth(device)
    sklearn_flat(np.random.default_rng(0).random((100, 8), dtype=np.float32), 2, threads)  # its import is not timed
    results: list[dict[str, Any]] = []
    per_unit: dict[str, float] = {}  # seconds of a competitor for a pick and a number of the table
    before: tuple[Any, ...] = ()
    for rows, width, count, kind in cases(quick):
        if (rows, width, kind) != before:
            before, (left, right) = (rows, width, kind), (t.to(device) for t in pool(rows, width, kind))
        common = {"device": device, "threads": threads, "rows": rows, "width": width, "count": count, "kind": kind}
        at_target = quick or (rows, width, count) == tuple(TARGET.values())
        methods = ["blocks", "one_by_one", "greedy of 4"] if at_target and kind == "gradients" else ["blocks"]
        found = [ours(left, right, count, method, rate) for method in methods]
        others: dict[str, Callable[[], object]] = {"one_by_one_torch": lambda: one_by_one_torch(left, right, count)}  # noqa: B023
        if device == "cpu":
            flat = torch.cat([left, right], 1).numpy()
            others["sklearn"] = lambda: sklearn_flat(flat, count, threads)  # noqa: B023
            if 4 * rows * width * width <= EXPLICIT_BYTES:
                others["explicit"] = lambda: explicit(left, right, count)  # noqa: B023
        for name, other in others.items():
            size = rows * count * (width * width if name == "explicit" else 2 * width)
            if at_target or size * per_unit.get(name, 1e-9) <= LONGEST_SECONDS:
                seconds = best_seconds(other, 1, device)
                if seconds < 3:  # as often as ours, where that does not take long
                    seconds = min(seconds, best_seconds(other, 3, device))
                per_unit.setdefault(name, seconds / size)
                found.append({"what": name, "seconds": seconds})
        for result in found:
            result["times_ours"] = result["seconds"] / found[0]["seconds"]
            results.append(common | result)
            print(line(results[-1]), flush=True)
    return results


def line(result: dict[str, Any]) -> str:
    """One row of the table."""
    extra = (
        f"{result['passes']:5} {result['proposals']:6} {result['bytes'] / 1e9:8.2f} {result['of_bandwidth']:6.0%}"
        if "passes" in result
        else " " * 28
    )
    return (
        f"{result['device']:4} {result['threads']:2} {result['kind']:9} {result['rows']:8} {result['width']:4} "
        f"{result['count']:5}  {result['what']:18} {result['seconds']:9.4f} {result['times_ours']:8.1f} {extra}"
    )


def growth(results: list[dict[str, Any]]) -> dict[str, float]:
    """Exponents of least squares on the logarithms: seconds of ours against rows, and against count."""
    exponents = {}
    for device, threads in sorted({(r["device"], r["threads"]) for r in results}):
        mine = [
            r
            for r in results
            if (r["what"], r["threads"], r["device"], r["kind"]) == ("ours, blocks", threads, device, "gradients")
        ]
        for name, fixed in (("rows", {"count": 128, "width": 128}), ("count", {"rows": 38_400, "width": 512})):
            chosen = [r for r in mine if all(r[k] == v for k, v in fixed.items())]
            if len(chosen) > 2:
                x, y = (np.log([r[k] for r in chosen]) for k in (name, "seconds"))
                exponents[f"{device}, {threads} threads: seconds ~ {name} ^"] = float(np.polyfit(x, y, 1)[0])
    return exponents


def peak_memory() -> dict[str, float]:
    """In a fresh process: the target's factors, and how much more there was at the worst moment."""
    code = f"import importlib.util as u; s = u.spec_from_file_location('benchmark', {str(Path(__file__))!r}); " \
           "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.memory_ratio())"  # fmt: skip
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return {"peak over factors": float(output)}


def memory_ratio() -> float:
    """(factors + what seeding adds at its peak) / factors, from the process's resident memory."""
    left, right = pool(TARGET["rows"], TARGET["width"], "gaussian")
    small = pool(500, 16)
    kmeans_plusplus(small, 10)
    factors = left.nbytes + right.nbytes
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: now
    before = _resident("VmRSS")
    kmeans_plusplus((left, right), TARGET["count"])
    return 1 + (_resident("VmHWM") - before) / factors


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1]) * 1024


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here as well as to stdout's end")
    parser.add_argument("--quick", action="store_true", help="two small cases, to see that it runs")
    parser.add_argument("--device", choices=["cpu", "cuda"], nargs="+", default=None)
    options = parser.parse_args(arguments)
    devices = options.device or (["cuda"] if torch.cuda.is_available() else ["cpu"])
    print("on threads kind rows width count what seconds times-ours passes proposals GB of-bandwidth")
    results = []
    for device in devices:
        for threads in (1,) if device == "cuda" or options.quick else (1, 2):
            results += measure(options.quick, device, threads)
    report = {
        "machine": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if "cuda" in devices else f"{torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
        "bandwidth_gb_per_second": {d: bandwidth(d) / 1e9 for d in devices},
        "growth": growth(results),
        "memory": peak_memory() if "cpu" in devices and sys.platform == "linux" else None,
        "results": results,
    }
    print(json.dumps({k: v for k, v in report.items() if k != "results"}, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
