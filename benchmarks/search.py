"""Search in an index: speed, memory and recall against FAISS and usearch.

    pip install faiss-cpu usearch
    OMP_NUM_THREADS=2 python benchmarks/search.py vectors OUT.json

``vectors``: one query at a time, for its ten nearest among 10^4, 10^5 and 10^6 vectors of 128 and 512 numbers.

The vectors are made up, to look like embeddings of videos with sound, 60 windows a file. One is the sum of a direction
of the file (of length 1), one of the file's picture or sound (0.5), a random walk over the windows (0.1 a step, so that
neighbours are alike), one of the window (0.2), and one that all pictures or all sounds have in common (0.7: networks
keep their modalities apart); then scaled to length 1, and rounded to float16. Queries are windows of pictures with
noise (of length 0.3), and what is searched are the sounds. An index of n sounds has n pictures too, in the same table;
the other libraries have the n sounds alone, the same float16 numbers, as float32 in FAISS and as float16 in usearch.

In the results, for each method:

* ``build_seconds``: for cmacc the end of `cmacc embed`: compaction, and above 200,000 rows the approximate index and
  the measurement of its recall. ``write_seconds`` are the commits before it. Both are for sounds and pictures.
* ``bytes``: of what it writes to disk; for cmacc of the table with sounds and pictures.
* ``p50_ms``, ``p95_ms``, ``recall_at_10``: of a query, against all scores in float32.

``cmacc`` gives the ten nearest rows: `Index.rows` and a matrix product while the table is searched exactly, and
`WindowTable.nearest` above. ``cmacc, whole search`` is `Index.search_vectors`: scores of all windows (or of the files
that were found), and segments (``segments_p50_ms``) of them. Before the first, an index is opened (``open_seconds``:
with its rows, if it is exact; the files are in the system's cache) and calibrated (``calibration_seconds``: the first
search). ``build_mebibytes`` and ``search_mebibytes`` say how much the memory of the process grew at the most.
``LanceDB`` is its own comparison of all rows. FAISS's IVF (sqrt(n) lists) and usearch's graph (with its own settings)
look at as little as gives a recall of 0.95, as cmacc does, or at ``effort`` if nothing does. All use as many threads as
OMP_NUM_THREADS says, but LanceDB takes more to read, and usearch one for a query.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cmacc.clips.progress import Progress
from cmacc.encoders import MODALITIES, Modality
from cmacc.search.index import Index
from cmacc.search.query import Query
from cmacc.search.segments import segments
from cmacc.search.table import EXACT_ROWS, Description, WindowTable
from cmacc.search.writer import WindowWriter

THREADS = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
WINDOWS = 60  # of a file
FILES_AT_ONCE = 500
NEAREST = 10
LEAST_RECALL = 0.95
Vectors = NDArray[np.float32]
Halves = NDArray[np.float16]
# Takes a query, gives the numbers of the ten nearest rows.
Ask = Callable[[Vectors], NDArray[np.int64]]


# ------------------------------------------------------------------------------------------------------- the vectors


def made_up(count: int, size: int) -> Iterator[dict[Modality, Halves]]:
    """Windows of some hundred files at a time, ``{modality: (n, size)}``; ``count`` of each modality in all."""
    common = np.random.default_rng(size).standard_normal((len(MODALITIES), size), np.float32)
    for block, begin in enumerate(range(0, count, FILES_AT_ONCE * WINDOWS)):
        files = min(FILES_AT_ONCE, -(-(count - begin) // WINDOWS))
        rng = np.random.default_rng([size, block])

        def normal(*shape: int, rng: np.random.Generator = rng) -> Vectors:
            return rng.standard_normal((*shape, size), np.float32)

        of_file = normal(files, 1)
        found: dict[Modality, Halves] = {}
        for modality, offset in zip(MODALITIES, common, strict=True):
            vectors = of_file + 0.5 * normal(files, 1) + 0.7 * offset
            vectors = vectors + 0.1 * np.cumsum(normal(files, WINDOWS), axis=1) + 0.2 * normal(files, WINDOWS)
            vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
            found[modality] = vectors.reshape(-1, size)[: count - begin].astype(np.float16)
        yield found


def rows_of(vectors: dict[Modality, Halves], first_row: int) -> pa.Table:
    """The same as rows of an index."""
    tables = []
    for modality, some in vectors.items():
        row = first_row + np.arange(len(some))
        path, start = [f"{file:06}.mp4" for file in row // WINDOWS], (row % WINDOWS).astype(float)
        columns = {
            "path": pa.array(path),
            "key": pa.nulls(len(some), pa.string()),
            "sample_start_seconds": np.zeros(len(some)),
            "sample_end_seconds": np.full(len(some), WINDOWS + 1.0),
            "start_seconds": start,
            "end_seconds": start + 2.0,
            "modality": pa.array([modality] * len(some)),
            "label": pa.nulls(len(some), pa.string()),
            "content_hash": pa.array(path),
            "weights": pa.array(["made up"] * len(some)),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(some.ravel()), some.shape[1]),
        }
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)


def numbers(facts: pa.Table) -> NDArray[np.int64]:
    """Which rows these are, from path and time."""
    files = np.array([int(path.removesuffix(".mp4")) for path in facts.column("path").to_pylist()], np.int64)
    return files * WINDOWS + facts.column("start_seconds").to_numpy().astype(np.int64)


def ten_highest(scores: Vectors) -> NDArray[np.int64]:
    """Their places, in no order."""
    return np.argpartition(scores, -NEAREST)[-NEAREST:]


def truth(sounds: Halves, queries: Vectors) -> NDArray[np.int64]:
    """The ten nearest of each query, ``(q, 10)``."""
    scores = np.concatenate([queries @ some.astype(np.float32).T for some in _parts(sounds)], axis=1)
    return np.argpartition(scores, -NEAREST, axis=1)[:, -NEAREST:]


def _parts(vectors: Halves) -> Iterator[Halves]:
    return (vectors[begin : begin + 50_000] for begin in range(0, len(vectors), 50_000))


# ---------------------------------------------------------------------------------------------------- what is measured


def timed(ask: Ask, queries: Vectors, nearest: NDArray[np.int64]) -> dict[str, float]:
    """Time of a query and recall, after a few to warm up."""
    for query in queries[:5]:
        ask(query)
    taken, found = [], []
    for query, wanted in zip(queries, nearest, strict=True):
        started = time.perf_counter()
        rows = ask(query)
        taken.append(time.perf_counter() - started)
        found.append(len(np.intersect1d(rows, wanted)) / NEAREST)
    return {**milliseconds(taken), "recall_at_10": float(np.mean(found))}


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median and 95th percentile."""
    p50, p95 = 1000 * np.quantile(seconds, [0.5, 0.95])
    return {"p50_ms": float(p50), "p95_ms": float(p95)}


class Growth:
    """How much more memory this process had at the worst moment since this was made than at that time."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: now
        self._before = self._mebibytes("VmRSS")

    def mebibytes(self) -> float:
        """Until now."""
        return self._mebibytes("VmHWM") - self._before

    def _mebibytes(self, field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def measure_ours(
    count: int, size: int, queries_count: int, folder: Path
) -> tuple[dict[str, Any], Halves, Vectors, Any]:
    """Results of cmacc and LanceDB; the sounds, the queries, and what each should find."""
    sounds = np.full((count, size), 0, np.float16)
    rng = np.random.default_rng(0)
    asked = np.sort(rng.choice(count, min(queries_count, count), replace=False))
    originals = np.empty((len(asked), size), np.float32)
    description = Description("made up", "made up", "/videos", 2.0, 1.0, size, {})
    writer = WindowWriter(folder, description)
    writing, begin = 0.0, 0
    for block in made_up(count, size):
        end = begin + len(block["audio"])
        sounds[begin:end] = block["audio"]
        here = (asked >= begin) & (asked < end)
        originals[here] = block["video"][asked[here] - begin]
        started = time.perf_counter()
        writer.add(rows_of(block, begin))
        writing += time.perf_counter() - started
        begin = end
    noisy = originals + 0.3 / np.sqrt(size) * rng.standard_normal(originals.shape, np.float32)
    queries = (noisy / np.linalg.norm(noisy, axis=1, keepdims=True)).astype(np.float32)
    nearest = truth(sounds, queries)
    told(f"{count} x {size}: written in {writing:.1f} s")

    growth, started = Growth(), time.perf_counter()
    description = writer.finish(told_once())
    built = {"write_seconds": writing, "build_seconds": time.perf_counter() - started}
    built |= {"build_mebibytes": growth.mebibytes(), "bytes": bytes_of(folder)}
    told(f"{count} x {size}: built, {built}")

    growth, started = Growth(), time.perf_counter()
    index = Index.open(folder)
    near = description.approximate
    if near is None:
        for modality in MODALITIES:
            index.rows(modality)
    whole: dict[str, Any] = {"open_seconds": time.perf_counter() - started}

    def search(query: Vectors) -> NDArray[np.int64]:
        index.search_vectors(Query({("video", None): query}), into="audio", false_alarm_rate=1.0)
        return np.array([], np.int64)

    started = time.perf_counter()
    search(queries[0])
    whole["calibration_seconds"] = time.perf_counter() - started
    of_segments: list[float] = []

    def timed_segments(*arguments: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        found = segments(*arguments, **named)
        of_segments.append(time.perf_counter() - begun)
        return found

    with patch("cmacc.search.index.segments", timed_segments):
        whole |= timed(search, queries, nearest)
    del whole["recall_at_10"]  # it returns segments, not rows
    whole["segments_p50_ms"] = milliseconds(of_segments)["p50_ms"]
    whole["search_mebibytes"] = growth.mebibytes()
    told(f"{count} x {size}: cmacc, whole search, {whole}")

    def by_lancedb(table: WindowTable) -> Ask:
        return lambda query: numbers(table.nearest(query, "audio", NEAREST))

    results: dict[str, Any] = {"cmacc, whole search": whole}
    if near is None:
        rows = index.rows("audio")
        places = numbers(rows.facts)
        results["cmacc"] = built | timed(lambda query: places[ten_highest(rows.vectors @ query)], queries, nearest)
        results["LanceDB"] = timed(by_lancedb(index.table), queries, nearest)
    else:
        found = timed(by_lancedb(index.table), queries, nearest)
        results["cmacc"] = built | {"probes": near.probes, "recall_when_built": near.recall_at_10} | found
    told(f"{count} x {size}: cmacc, {results['cmacc']}")
    return results, sounds, queries, nearest


def bytes_of(path: Path) -> int:
    """Size of a file or folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def measure_others(sounds: Halves, queries: Vectors, nearest: NDArray[np.int64], folder: Path) -> dict[str, Any]:
    """Results of FAISS and usearch."""
    import faiss
    from usearch.index import Index as Graph

    faiss.omp_set_num_threads(THREADS)
    size = sounds.shape[1]
    kept = folder / "other.index"
    results: dict[str, Any] = {}

    def add(name: str, started: float, save: Callable[[str], object], **found: Any) -> None:
        built = time.perf_counter() - started
        save(str(kept))
        results[name] = {"build_seconds": built, "bytes": bytes_of(kept), **found}
        kept.unlink()

    def by_faiss(index: Any) -> Ask:
        return lambda query: index.search(query[None], NEAREST)[1][0]

    floats = sounds.astype(np.float32)
    started = time.perf_counter()
    flat = faiss.IndexFlatIP(size)
    flat.add(floats)
    add("FAISS flat", started, lambda path: faiss.write_index(flat, path))
    results["FAISS flat"] |= timed(by_faiss(flat), queries, nearest)
    told(f"{len(sounds)} x {size}: FAISS flat, {results['FAISS flat']}")
    del flat

    lists = round(len(sounds) ** 0.5)
    started = time.perf_counter()
    ivf = faiss.IndexIVFFlat(faiss.IndexFlatIP(size), size, lists, faiss.METRIC_INNER_PRODUCT)
    ivf.train(floats)
    ivf.add(floats)
    add("FAISS IVF", started, lambda path: faiss.write_index(ivf, path))
    del floats

    def look_into(probes: int) -> None:
        ivf.nprobe = probes

    results["FAISS IVF"] |= least_effort(look_into, by_faiss(ivf), queries, nearest, lists)
    told(f"{len(sounds)} x {size}: FAISS IVF, {results['FAISS IVF']}")
    del ivf

    started = time.perf_counter()
    graph = Graph(ndim=size, metric="ip", dtype="f16")
    graph.add(np.arange(len(sounds)), sounds, threads=THREADS)
    add("usearch", started, graph.save)

    def expand(effort: int) -> None:
        graph.expansion_search = effort

    results["usearch"] |= least_effort(
        expand, lambda query: graph.search(query, NEAREST, threads=1).keys, queries, nearest, 1 << 12
    )
    told(f"{len(sounds)} x {size}: usearch, {results['usearch']}")
    return results


def least_effort(
    choose: Callable[[int], None], ask: Ask, queries: Vectors, nearest: NDArray[np.int64], most: int
) -> dict[str, float]:
    """Times with the least power of two whose recall is high enough."""
    effort = NEAREST
    while True:
        choose(effort)
        found = timed(ask, queries, nearest)
        if found["recall_at_10"] >= LEAST_RECALL or 2 * effort > most:
            return {"effort": effort, **found}
        effort *= 2


def told(line: str) -> None:
    """Progress."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def told_once() -> Progress:
    """Progress of building, told when another part of it begins."""
    last = ""

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if what != last:
            told(f"... {what}")
            last = what

    return progress


# ------------------------------------------------------------------------------------------------------- command line


def vectors(out: Path, rows: list[int], dims: list[int], queries: int, alone: bool) -> dict[str, Any]:
    """All sizes; the results so far are written after each."""
    os.environ["LANCE_CPU_THREADS"] = str(THREADS)  # read when LanceDB is imported, which is not yet
    if not alone:
        try:
            import faiss  # noqa: F401
            import usearch  # noqa: F401
        except ImportError as error:
            sys.exit(f"search.py: {error}; pip install faiss-cpu usearch, which are in no extra, or say --alone")
    report: dict[str, Any] = {"machine": machine(alone), "queries": queries, "results": []}
    for size in dims:
        for count in rows:
            folder = Path(tempfile.mkdtemp(prefix="cmacc-search-", dir=out.resolve().parent))
            try:
                methods, sounds, asked, nearest = measure_ours(count, size, queries, folder / "index")
                if not alone:
                    methods |= measure_others(sounds, asked, nearest, folder)
            finally:
                shutil.rmtree(folder)
            report["results"].append({"vectors": count, "dim": size, "methods": methods})
            out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def machine(alone: bool) -> dict[str, Any]:
    """What the numbers were measured on."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    libraries = ["numpy", "lancedb", *([] if alone else ["faiss-cpu", "usearch"])]
    return {
        "processor": model[0].partition(": ")[2] if model else platform.processor(),
        "threads": THREADS,
        "exact_rows": EXACT_ROWS,
        **{name: metadata.version(name) for name in libraries},
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    of_vectors = parts.add_parser("vectors")
    of_vectors.add_argument("out", type=Path)
    of_vectors.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    of_vectors.add_argument("--dims", type=int, nargs="+", default=[128, 512])
    of_vectors.add_argument("--queries", type=int, default=200)
    of_vectors.add_argument("--alone", action="store_true", help="without FAISS and usearch")
    options = parser.parse_args(arguments)
    return vectors(options.out, options.rows, options.dims, options.queries, options.alone)


if __name__ == "__main__":
    main()
