"""Read and check a run folder for the report.

Only ``config.yaml`` and ``metrics.jsonl`` are required. A run that is still training has no results yet, and its report
only shows the training.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cmacc.clips import Manifest, ManifestError
from cmacc.pretraining import ConfigError, PretrainConfig, read_config
from cmacc.transfer import Card, CardError
from cmacc.viewer.page import ReportError

_FORMER_DIRECTIONS = {"v2a": "video_to_audio", "a2v": "audio_to_video"}
_TENSORS = ("video", "audio", "sample_ids", "start_seconds")


@dataclass(frozen=True)
class Series:
    """One metric over the steps at which it was measured and finite: ``steps`` and ``values``, both ``(n,)``."""

    steps: NDArray[np.float64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Pairs:
    """Embeddings of n held-out clips, one row per clip.

    Attributes
    ----------
    video, audio
        ``(n, d)``, L2-normalised.
    sample_ids
        ``(n,)``: row of the clip in the manifest.
    start_seconds
        ``(n,)``: start of the clip in its file.
    """

    video: NDArray[np.float32]
    audio: NDArray[np.float32]
    sample_ids: NDArray[np.int64]
    start_seconds: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.video)


@dataclass(frozen=True)
class RunFolder:
    """The contents of a run folder.

    Attributes
    ----------
    metrics
        All metrics of ``metrics.jsonl`` by name.
    step_count
        Number of finished steps.
    skipped_lines
        Number of unreadable lines of ``metrics.jsonl``.
    card, pairs
        None if nothing was evaluated.
    manifest
        The manifest of ``pairs``; None if there is none, and ``manifest_fault`` then says why.
    """

    path: Path
    config: PretrainConfig
    config_text: str
    metrics: dict[str, Series]
    step_count: int
    skipped_lines: int
    card: Card | None
    pairs: Pairs | None
    manifest: Manifest | None
    manifest_fault: str


def read_run(run_dir: Path) -> RunFolder:
    """Read everything that a report shows.

    Raises
    ------
    ReportError
        The folder holds no run or no metrics yet, or a file in it cannot be read.
    """
    if not run_dir.is_dir():
        raise ReportError(f"run folder {run_dir}: must be a folder made by `cmacc pretrain`, got nothing there")
    try:
        config = read_config(run_dir / "config.yaml")
        card = Card.read(run_dir / "card.json") if (run_dir / "card.json").exists() else None
    except (ConfigError, CardError) as error:
        raise ReportError(f"report of {run_dir}: {error}") from error
    metrics, step_count, skipped_lines = _read_metrics(run_dir / "metrics.jsonl")
    pairs = _read_pairs(run_dir / "embeddings.safetensors")
    manifest, fault = _find_manifest(config, card, pairs) if pairs is not None else (None, "")
    return RunFolder(
        path=run_dir,
        config=config,
        config_text=(run_dir / "config.yaml").read_text(),
        metrics=metrics,
        step_count=step_count,
        skipped_lines=skipped_lines,
        card=card,
        pairs=pairs,
        manifest=manifest,
        manifest_fault=fault,
    )


def _read_metrics(path: Path) -> tuple[dict[str, Series], int, int]:
    """Series by name, finished steps, and unreadable lines: a killed or running process can leave half a line."""
    columns: dict[str, tuple[list[float], list[float]]] = {}
    step_count = skipped = 0
    text = path.read_text(errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, TypeError, KeyError):
            skipped += 1
            continue
        step_count = max(step_count, step + 1)
        for name, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                steps, values = columns.setdefault(present_metric(name), ([], []))
                steps.append(float(step))
                values.append(float(value))
    if step_count == 0:
        raise ReportError(
            f"run folder {path.parent}: must hold at least one step in metrics.jsonl, got none; train it first "
            f"(`cmacc pretrain --resume {path.parent}`)"
        )
    series = {name: Series(np.asarray(steps), np.asarray(values)) for name, (steps, values) in columns.items()}
    return series, step_count, skipped


def present_metric(name: str) -> str:
    """The current name of a metric, for files of cmacc 0.1.0.

    Examples
    --------
    >>> present_metric("batch_loss_v2a"), present_metric("mi_ceiling"), present_metric("seconds/step")
    ('video_to_audio/batch_loss', 'mutual_information_ceiling', 'seconds/step')
    """
    if name == "mi_ceiling":
        return "mutual_information_ceiling"
    metric, _, direction = name.rpartition("_")
    if direction not in _FORMER_DIRECTIONS:
        return name
    return f"{_FORMER_DIRECTIONS[direction]}/{'mutual_information' if metric == 'mi' else metric}"


def _read_pairs(path: Path) -> Pairs | None:
    if not path.exists():
        return None
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ReportError(f"embeddings {path}: cannot be read ({error}); run `cmacc evaluate` again") from error
    missing = [name for name in _TENSORS if name not in tensors]
    if missing:
        raise ReportError(f"embeddings {path}: must hold {', '.join(_TENSORS)}, lacks {', '.join(missing)}")
    pairs = Pairs(
        video=tensors["video"].astype(np.float32),
        audio=tensors["audio"].astype(np.float32),
        sample_ids=tensors["sample_ids"].astype(np.int64),
        start_seconds=tensors["start_seconds"].astype(np.float64),
    )
    shapes = {name: tensors[name].shape for name in _TENSORS}
    same_rows = len({shape[0] if shape else -1 for shape in shapes.values()}) == 1
    if pairs.video.ndim != 2 or pairs.video.shape != pairs.audio.shape or not same_rows or len(pairs) == 0:
        raise ReportError(
            f"embeddings {path}: video and audio must be (n, d), the others (n,), n at least 1, got {shapes}"
        )
    return pairs


def _find_manifest(config: PretrainConfig, card: Card | None, pairs: Pairs) -> tuple[Manifest | None, str]:
    """The manifest of the pairs' sample ids. A changed manifest is refused: clips would get wrong names."""
    fault = ""
    evaluated = card.data.get("pairs") if card else None
    for path in (Path(evaluated.path), config.data.manifest) if evaluated else (config.data.manifest,):
        try:
            manifest = Manifest.read(path)
        except (ManifestError, OSError) as error:
            fault = fault or str(error)
            continue
        if evaluated and manifest.fingerprint() != evaluated.fingerprint:
            fault = fault or f"manifest {path} has changed since the evaluation; run `cmacc evaluate` again"
        elif pairs.sample_ids.min() < 0 or pairs.sample_ids.max() >= len(manifest):
            fault = fault or f"manifest {path} has {len(manifest)} rows, fewer than the embeddings point into"
        else:
            return manifest, ""
    return None, fault
