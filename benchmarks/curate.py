"""What `cmacc select` and `cmacc dedupe` are worth on real data: labels, thresholds, and time.

* ``select``: classes among N chosen samples, and balanced accuracy of a linear probe on them (logistic regression on
  the vectors, groups held out), for choosing at random, by distance (the product), and by gradient embeddings of the
  cross-modal contrast. Means and deviations over seeds; a seed draws the held-out groups too. ``skewed``: each next
  class, in random order, has half as many candidates.
* ``cosines``: whitened cosines of windows, the lower one of both modalities: of re-encoded copies (`cmacc pack`, short
  side 72, crf 35) at the same time and shifted by a part of the hop, and of random pairs of different groups.
* ``semantic``: samples of UCF101 that SemDeDup removes, and the share of its pairs that are of one group (takes of one
  person at one place) and of one class.
* ``seconds``: `near_duplicates` of random windows with both modalities.

``python benchmarks/curate.py RUN REAL_DATA --out benchmarks/results/curate-cpu.json``: some twenty minutes on two
cores. Vectors are kept in --work. The RUN of the results: GRID, UCF101 with sound and the wild clips, packed with short
side 72, ``cmacc pretrain --config recipes/real.yaml --data.clip.frame_count 8 --data.clip.frame_rate_hz 4
--data.clip.frame_height 48 --data.clip.frame_width 48 --optim.steps 400 --optim.warmup_steps 40``: ten minutes.
"""

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from cmacc.clips import (
    ClipRequest,
    LabelTable,
    Manifest,
    PackSettings,
    evaluation_loader,
    list_folders,
    pack,
    scan,
)
from cmacc.encoders import MODALITIES
from cmacc.negatives import Keys, gradient_factors, select_diverse
from cmacc.pretraining.clip_encoder import MatchingEncoder
from cmacc.pretraining.features import encode, unit_rows
from cmacc.search.duplicates import near_duplicates, semantic_duplicates, whitened
from cmacc.search.samples import Samples
from cmacc.search.table import FACT_TYPES, Rows
from cmacc.transfer import open_encoder

Vectors = dict[str, NDArray[Any]]
COUNTS = (10, 20, 50, 100)
EPSILONS = (0.4, 0.3, 0.2, 0.1, 0.05)
THRESHOLDS = (0.7, 0.8, 0.85, 0.9, 0.95)
PAIRS = 400_000


def manifests(real: Path, work: Path) -> dict[str, Manifest]:
    """UCF101 and ESC-50 with labels and groups, and a mixture with its copies."""
    tables = {
        "ucf": ("ucf101", LabelTable(real / "ucf101/manifest.csv", "label", "split1", "group", "file")),
        "esc": ("esc50", LabelTable(real / "esc50/available.csv", "category", None, "src_file", "file")),
        "grid": ("grid", LabelTable(real / "grid/labels.csv", "digit", path_column="file")),
        "wild": ("wild", None),
    }
    made = {}
    for name, (folder, table) in tables.items():
        path = work / f"{name}.parquet"
        if not path.exists():
            scan(list_folders([real / folder], table)).manifest.write(path)
        made[name] = Manifest.read(path)
    with_sound = [record for record in made["ucf"].records if record.has_audio][::2]
    pictures = [record for record in made["wild"].records if record.has_picture]
    made["orig"] = Manifest([*with_sound, *list(made["grid"].records)[::8], *pictures])
    if not (work / "copies/index.parquet").exists():
        pack(made["orig"], str(work / "copies"), PackSettings(short_side=72, crf=35))
    made["copy"] = Manifest.read(work / "copies/index.parquet")
    return made


@torch.inference_mode()
def window_vectors(encoder: Any, tag: str, manifest: Manifest, work: Path, shift: float = 0.0) -> Vectors:
    """``ids`` of the samples and unit vectors of their windows, one every second."""
    path = work / f"{tag}{f'-{shift}' if shift else ''}.npz"
    if not path.exists():
        spec = encoder.spec
        last = [max(record.duration_seconds - spec.length_seconds, 0) for record in manifest.records]
        requests = [
            ClipRequest(i, float(start)) for i, end in enumerate(last) for start in np.arange(shift, end + shift + 1e-6)
        ]
        ids: list[int] = []
        rows: dict[str, list[NDArray[Any]]] = {modality: [] for modality in encoder.modalities}
        for batch in evaluation_loader(manifest, requests, spec, batch_size=32, workers=0):
            ids += batch.sample_ids.tolist()
            for modality, kept in rows.items():
                features = encode(encoder, modality, batch)
                if isinstance(encoder, MatchingEncoder):
                    features = (encoder.match_video if modality == "video" else encoder.match_audio)(features)
                kept.append(features.float().numpy())
        np.savez(path, ids=ids, **{modality: np.concatenate(kept) for modality, kept in rows.items()})
    kept_vectors = dict(np.load(path))
    present = {m: np.array([getattr(r, f"has_{w}") for r in manifest.records]) for m, w in _WORDS.items()}
    vectors: Vectors = {"ids": kept_vectors["ids"]}
    for modality in MODALITIES:
        if modality in kept_vectors:
            rows_here = unit_rows(kept_vectors[modality]).astype(np.float32)
            vectors[modality] = rows_here * present[modality][vectors["ids"], None]
    return vectors


_WORDS = {"video": "picture", "audio": "audio"}


# ---- select ---------------------------------------------------------------------------------------------------------


def sample_means(vectors: Vectors, count: int) -> Vectors:
    means = {}
    for modality in set(vectors) - {"ids"}:
        sums = np.zeros((count, vectors[modality].shape[1]), np.float32)
        np.add.at(sums, vectors["ids"], vectors[modality])
        means[modality] = unit_rows(sums).astype(np.float32)
    return means


def gradients(means: Vectors, generator: torch.Generator) -> NDArray[Any]:
    """Gradient embeddings of each modality's vectors among 128 random ones of the other."""
    rows = []
    for own, other in (("video", "audio"), ("audio", "video")):
        drawn = torch.randperm(len(means[other]), generator=generator)[:128]
        keys = Keys.from_embedding(torch.from_numpy(means[own]), torch.arange(len(means[own])), 0)
        rows.append(gradient_factors(keys, torch.from_numpy(means[other])[drawn], 0.1, "key").left)
    return torch.cat(rows, dim=1).numpy()


def compare_choices(
    means: Vectors, labels: NDArray[Any], groups: NDArray[Any], seeds: int, skewed: bool
) -> list[dict[str, Any]]:
    """Classes and accuracy of N labels, for each way of choosing."""
    features = np.concatenate([means[modality] for modality in sorted(means)], axis=1)
    scores: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for seed in range(seeds):
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        names = np.unique(groups)
        is_test = np.isin(groups, rng.choice(names, round(0.3 * len(names)), replace=False))
        pool, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
        if skewed:
            classes = rng.permutation(np.unique(labels[pool]))
            sizes = [max(3, int(120 * 0.5**place)) for place in range(len(classes))]
            some = [rng.permutation(pool[labels[pool] == c])[:n] for c, n in zip(classes, sizes, strict=True)]
            pool = np.concatenate(some)
        rows = {"distance": features[pool]}
        if len(means) == 2:
            rows["gradient"] = gradients({m: vectors[pool] for m, vectors in means.items()}, generator)
        scaled = (features - features[pool].mean(0)) / (features[pool].std(0) + 1e-6)
        for count in [count for count in COUNTS if count < len(pool)]:
            chosen = {"random": rng.choice(len(pool), count, replace=False)} | {
                name: select_diverse(one, count, generator=generator, progress=False).numpy()
                for name, one in rows.items()
            }
            for name, picks in chosen.items():
                taken = pool[picks]
                known = np.unique(labels[taken])
                found = np.full(len(test), known[0])
                if len(known) > 1:
                    found = (
                        LogisticRegression(C=0.1, max_iter=200).fit(scaled[taken], labels[taken]).predict(scaled[test])
                    )
                scores.setdefault((count, name), []).append((len(known), balanced_accuracy_score(labels[test], found)))
    return [
        {
            "count": count,
            "by": name,
            "classes": round(float(np.mean([c for c, _ in found])), 2),
            "accuracy": round(float(np.mean([a for _, a in found])), 4),
            "accuracy_deviation": round(float(np.std([a for _, a in found])), 4),
        }
        for (count, name), found in sorted(scores.items())
    ]


# ---- cosines --------------------------------------------------------------------------------------------------------


def lower_cosines(first: Vectors, second: Vectors, ones: NDArray[Any], others: NDArray[Any]) -> NDArray[Any]:
    """Of each pair, the lower cosine of the modalities that both have."""
    lowest = np.full(len(ones), np.inf)
    for modality in MODALITIES:
        left, right = first[modality][ones], second[modality][others]
        both = left.any(1) & right.any(1)
        lowest = np.where(both, np.minimum(lowest, (left * right).sum(1)), lowest)
    return np.where(np.isinf(lowest), -1, lowest)


def compare_copies(originals: Vectors, copies: dict[float, Vectors], manifest: Manifest) -> dict[str, Any]:
    every = [originals, *copies.values()]
    white: list[Vectors] = [{} for _ in every]
    for modality in MODALITIES:
        joined = np.concatenate([one[modality] for one in every])
        present = joined.any(1)
        joined[present] = whitened(joined[present]).numpy()
        for one, part in zip(white, np.split(joined, len(every)), strict=True):
            one[modality] = part
    records = list(manifest.records)
    folder = np.array([next(n for n in ("ucf101", "grid", "wild") if n in Path(r.path).parts) for r in records])
    group = np.array([f"{r.label}/{r.group}" if r.group else str(i) for i, r in enumerate(records)])
    of_window, group = folder[originals["ids"]], group[originals["ids"]]
    rows = np.arange(len(of_window))
    report: dict[str, Any] = {}
    for shift, one in zip(copies, white[1:], strict=True):
        report[f"copies, {shift:g} s later"] = _summary(lower_cosines(white[0], one, rows, rows))
    for name in ("ucf101", "grid", "wild"):
        ones, others = np.random.default_rng(0).choice(np.flatnonzero(of_window == name), (2, PAIRS))
        apart = group[ones] != group[others]
        report[f"random pairs, {name}"] = _summary(lower_cosines(white[0], white[0], ones[apart], others[apart]))
    return report


def _summary(cosines: NDArray[Any]) -> dict[str, Any]:
    quantiles = (0.01, 0.1, 0.5, 0.99, 0.9999)
    return {
        "pairs": len(cosines),
        "quantiles": {str(q): round(float(np.quantile(cosines, q)), 3) for q in quantiles},
        "share_at_threshold": {str(t): float(f"{(cosines >= t).mean():.2e}") for t in THRESHOLDS},
    }


# ---- semantic -------------------------------------------------------------------------------------------------------


def compare_epsilons(vectors: Vectors, manifest: Manifest) -> dict[str, Any]:
    """Removed samples, and the share of pairs of one group and one class."""
    labels = manifest.column("label")
    groups = [f"{label}/{group}" for label, group in zip(labels, manifest.column("group"), strict=True)]
    samples = as_samples(vectors, manifest)
    report = {}
    for epsilon in EPSILONS:
        found = semantic_duplicates(samples, epsilon)
        pairs = [(one.first, one.second) for one in found.stretches]
        report[str(epsilon)] = {
            "removed": len(found.removed),
            "one_group": round(float(np.mean([groups[i] == groups[j] for i, j in pairs])), 3),
            "one_class": round(float(np.mean([labels[i] == labels[j] for i, j in pairs])), 3),
        }
    return {"samples": len(samples), "groups": len(set(groups)), "epsilon": report}


def as_samples(vectors: Vectors, manifest: Manifest) -> Samples:
    """The samples as of an index; samples are numbered as in the manifest."""
    ids = vectors["ids"]
    first = np.searchsorted(ids, ids)
    seconds = np.array(manifest.column("duration_seconds"))[ids]
    rows, of_row = {}, {}
    for modality in MODALITIES:
        present = vectors[modality].any(1)
        columns = {name: pa.nulls(int(present.sum()), kind) for name, kind in FACT_TYPES.items()}
        columns |= {
            "path": pa.array([f"{number:06}" for number in ids[present].tolist()]),
            "sample_start_seconds": pa.array(np.zeros(present.sum())),
            "sample_end_seconds": pa.array(seconds[present]),
            "start_seconds": pa.array((np.arange(len(ids)) - first)[present].astype(np.float64)),
            "end_seconds": pa.array((np.arange(len(ids)) - first)[present] + 2.0),
        }
        rows[modality], of_row[modality] = Rows(pa.table(columns), vectors[modality][present]), ids[present]
    facts = pa.table(
        {
            "path": [f"{number:06}" for number in range(len(manifest))],
            "sample_start_seconds": np.zeros(len(manifest)),
            "sample_end_seconds": np.array(manifest.column("duration_seconds")),
        }
    )
    return Samples(facts, rows, of_row, "/", 1.0)


# ---- seconds --------------------------------------------------------------------------------------------------------


def time_duplicates(windows: int, size: int) -> dict[str, Any]:
    """Samples of fifty windows, a tenth of them copies."""
    rng = np.random.default_rng(0)
    sample, second = np.divmod(np.arange(windows), 50)
    columns = {name: pa.nulls(windows, kind) for name, kind in FACT_TYPES.items()}
    columns |= {
        "path": pa.array([f"{number:06}" for number in sample.tolist()]),
        "sample_start_seconds": pa.array(np.zeros(windows)),
        "sample_end_seconds": pa.array(np.full(windows, 51.0)),
        "start_seconds": pa.array(second.astype(np.float64)),
        "end_seconds": pa.array(second + 2.0),
    }
    rows = {}
    for modality in MODALITIES:
        vectors = rng.standard_normal((windows, size), dtype=np.float32)
        vectors[-windows // 10 :] = vectors[: windows // 10 + (windows % 10 > 0)][: len(vectors[-windows // 10 :])]
        rows[modality] = Rows(pa.table(columns), vectors)
    facts = rows["audio"].facts.take(pa.array(rows["audio"].first[:-1]))
    samples = Samples(facts, rows, dict.fromkeys(MODALITIES, sample), "/", 1.0)
    began = time.perf_counter()
    found = near_duplicates(samples)
    seconds = time.perf_counter() - began
    return {"windows": windows, "size": size, "seconds": round(seconds, 1), "removed": len(found.removed)}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="encoder with both modalities, for cmacc.transfer.open_encoder")
    parser.add_argument("real", type=Path, help="folder of the real data")
    parser.add_argument("--work", type=Path, default=Path("curate-work"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--windows", type=int, default=100_000)
    parser.add_argument("--out", type=Path, help="write the JSON here as well as to stdout")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="sklearn")  # few labels of many classes are what this is about
    data = manifests(options.real, options.work)
    opened = open_encoder(options.run)
    report: dict[str, Any] = {"seeds": options.seeds, "threads": torch.get_num_threads(), "cores": os.cpu_count()}

    def vectors_of(tag: str, encoder: Any, name: str, shift: float = 0.0) -> Vectors:
        return window_vectors(encoder, f"{tag}-{name}", data[name], options.work, shift)

    has_both: Callable[[Vectors], NDArray[Any]] = lambda means: means["video"].any(1) & means["audio"].any(1)  # noqa: E731
    report["select"] = {}
    statistics = open_encoder("statistics").encoder
    for title, tag, encoder, name, modalities in (
        ("UCF101, 3 classes with sound, both", "trained", opened.encoder, "ucf", ("video", "audio")),
        ("UCF101, 6 classes, video", "trained", opened.encoder, "ucf", ("video",)),
        ("ESC-50, audio", "trained", opened.encoder, "esc", ("audio",)),
        ("ESC-50, audio, log-mel statistics", "statistics", statistics, "esc", ("audio",)),
    ):
        means = sample_means(vectors_of(tag, encoder, name), len(data[name]))
        wanted = has_both(means) if len(modalities) == 2 else means[modalities[0]].any(1)
        labels = np.array(data[name].column("label"))[wanted]
        groups = np.char.add(labels.astype(str), np.array(data[name].column("group")).astype(str)[wanted])
        chosen = {modality: means[modality][wanted] for modality in modalities}
        for skewed in (False, True) if name == "ucf" else (False,):
            key = f"{title}{', skewed' if skewed else ''}"
            report["select"][key] = compare_choices(chosen, labels, groups, options.seeds, skewed)
    report["cosines"] = {}
    for tag, encoder, shifts in (
        ("trained", opened.encoder, (0.0, 0.25, 0.5)),
        ("untrained", opened.untrained, (0.0,)),
    ):
        if encoder is not None:
            copies = {shift: vectors_of(tag, encoder, "copy", shift) for shift in shifts}
            report["cosines"][tag] = compare_copies(vectors_of(tag, encoder, "orig"), copies, data["orig"])
    report["semantic"] = compare_epsilons(vectors_of("trained", opened.encoder, "ucf"), data["ucf"])
    report["seconds"] = time_duplicates(options.windows, 128)
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report) + "\n")
    return report


if __name__ == "__main__":
    main()
