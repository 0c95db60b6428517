"""Features of frozen backbones as a training problem: every file is decoded once, and the heads alone are trained.

1. The backbones encode a few evenly spread windows of every file, without augmentation. `embed` keeps the features on
   disk, under a hash of weights, files and windows.
2. All features are read into memory. A visit of a file draws one of its windows, the same for video and audio.
3. The encoders of the run are the heads, so dictionaries, pools and batches of any size cost next to nothing.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from cmacc.clips import Manifest, seeds
from cmacc.clips.progress import Progress, silent
from cmacc.clips.seeds import seeded_rng
from cmacc.encoders import MODALITIES, Encoder, EncoderPair, Modality
from cmacc.pretraining.clip_stream import RunError, check_bad_fraction, excluded_line, note_bad_file, usable_files
from cmacc.pretraining.cmacc_encoder import CmaccEncoder
from cmacc.pretraining.config import PretrainConfig
from cmacc.pretraining.features import embed
from cmacc.pretraining.learner import untrained_encoder

log = logging.getLogger("cmacc")

_FILES_AT_ONCE = 256
_STAGE = "features of files"


@dataclass(frozen=True)
class RowBatch:
    """M rows of a table of features: their sample ids and labels, ``(M,)`` int64."""

    sample_ids: Int[Tensor, " batch"]
    labels: Int[Tensor, " batch"]

    def to(self, device: torch.device) -> "RowBatch":
        """Copy the tensors to ``device``."""
        return RowBatch(self.sample_ids.to(device), self.labels.to(device))


class FeatureViews:
    """One window per visit of every row; it depends only on (seed, visit, row)."""

    def __init__(
        self,
        features: dict[Modality, Float[Tensor, "samples windows _"]],
        seed: int,
        shuffle_pairs: bool,
    ) -> None:
        self._features, self._shuffle_pairs = features, shuffle_pairs
        count, windows = features["video"].shape[:2]
        # One draw for all rows of a visit: a generator for each sample would take longer than the step.
        self._windows: Callable[..., Tensor] = lru_cache(maxsize=16)(
            lambda *visit: torch.from_numpy(seeded_rng(seeds.WINDOW, seed, *visit).integers(windows, size=count))
        )

    def of(self, batch: RowBatch, visit: int) -> dict[Modality, Tensor]:
        """Features ``(M, f)`` by modality."""
        rows = batch.sample_ids
        windows = self._windows(visit).to(rows.device)[rows]
        return {
            "video": self._features["video"][rows, windows],
            "audio": self._features["audio"][self._of_audio(rows, windows)],
        }

    def another(self, modality: Modality, batch: RowBatch, visit: int) -> Tensor:
        """The features of another window of each row or, as a control, of other rows of the batch."""
        rows = batch.sample_ids
        windows = self._windows(visit, 1).to(rows.device)[rows]
        own = self._of_audio(rows, windows) if modality == "audio" else (rows, windows)
        if self._shuffle_pairs:
            own = (own[0].roll(2, dims=0), own[1].roll(2, dims=0))  # as in `ClipViews`
        return self._features[modality][own]

    def plain(self, modality: Modality, batch: RowBatch, visit: int) -> Tensor:
        """The features themselves: they are those of windows without augmentation."""
        return self.of(batch, visit)[modality]

    def kept(self, batch: RowBatch, visit: int) -> dict[str, Tensor]:
        """Rows and windows, from which `again` finds the features."""
        rows = batch.sample_ids
        windows = self._windows(visit).to(rows.device)[rows]
        audio_rows, audio_windows = self._of_audio(rows, windows)
        return {"rows": rows, "windows": windows, "audio_rows": audio_rows, "audio_windows": audio_windows}

    def again(self, modality: Modality, kept: Callable[[str], Tensor]) -> Tensor:
        """The same features of one modality."""
        own, of = self._features[modality], "audio_" if modality == "audio" else ""
        return own[kept(f"{of}rows").to(own.device), kept(f"{of}windows").to(own.device)]

    def _of_audio(self, rows: Tensor, windows: Tensor) -> tuple[Tensor, Tensor]:
        """The rows and windows of the audio: the same or, as a control, those of other files of the batch."""
        return (rows.roll(1, dims=0), windows.roll(1, dims=0)) if self._shuffle_pairs else (rows, windows)


class FeatureTable:
    """Kept features of n files, W windows each, as a `cmacc.pretraining.table.Table`.

    Parameters
    ----------
    features
        ``(n, W, f)`` by modality.
    labels
        ``(n,)`` int64, -1 if unknown.
    device
        Device that trains, where all features are kept.
    bad_files
        ``{path: reason}`` of files that did not decode.
    files
        Hash of the files that the rows stand for; empty if they stand for none.
    """

    def __init__(
        self,
        features: dict[Modality, NDArray[np.float32]],
        labels: Int[Tensor, " samples"],
        device: torch.device,
        bad_files: dict[str, str] | None = None,
        files: str = "",
    ) -> None:
        self._features = {modality: torch.from_numpy(rows).to(device) for modality, rows in features.items()}
        self._device = device
        self.labels = labels
        self.bad_files = bad_files or {}
        self.files = files

    def encoder(self, config: PretrainConfig) -> EncoderPair:
        """The heads of the run's encoders."""
        return heads_of(untrained_encoder(config))

    def views(self, config: PretrainConfig) -> FeatureViews:
        """One window per visit."""
        return FeatureViews(self._features, config.seed, config.data.shuffle_pairs)

    def batch(self, sample_ids: Int[Tensor, " batch"]) -> RowBatch:
        """A batch of these rows."""
        return RowBatch(sample_ids.to(self._device), self.labels[sample_ids].to(self._device))


def heads_of(pair: EncoderPair) -> EncoderPair:
    """The pair with its backbones replaced by the identity, in place: it takes features, and has the heads' weights."""
    for modality in MODALITIES:
        encoder: Encoder = getattr(pair, modality)
        encoder.backbone = nn.Identity()
        encoder.mark_frozen([], encoder.frozen_digest)  # else it would still hold the backbone's modules
    return EncoderPair(pair.video, pair.audio)


def keep_features(
    manifest: Manifest,
    config: PretrainConfig,
    device: torch.device,
    *,
    cache: Path | None = None,
    progress: Progress = silent,
) -> FeatureTable:
    """Encode the files of a run with its frozen backbones, or read the features from the cache.

    Parameters
    ----------
    manifest, config
        The files and the settings of the run.
    device
        Device of the backbones and of the table.
    cache
        Folder of kept features; None: they are computed at every start.
    progress
        Called with ("features of files", files done, total files).

    Raises
    ------
    RunError
        Too few files are usable, or too many do not decode.
    TowerError
        A tower cannot be opened.
    """
    sample_ids, excluded = usable_files(manifest, config)
    if line := excluded_line(excluded, len(sample_ids)):
        log.warning(line)
    encoder = CmaccEncoder.of_run(config, untrained_encoder(config)).to(device).eval()
    backbones, parts = encoder.backbones, []
    bad_files: dict[str, str] = {}
    # In parts that are kept one by one: a start that is stopped, or a file that is added at the end, does not cost the
    # features of all others.
    for first in range(0, len(sample_ids), _FILES_AT_ONCE):
        part_ids = sample_ids[first : first + _FILES_AT_ONCE]
        progress(_STAGE, first, len(sample_ids))
        part = embed(
            backbones,
            manifest,
            part_ids,
            MODALITIES,
            windows=config.data.feature_windows,
            workers=config.data.workers,
            cache=cache,
            progress=_by_file(progress, first, len(part_ids), len(sample_ids)),
        )
        for sample_id, reason in part.failures.items():
            note_bad_file(bad_files, str(manifest.records[sample_id].path), reason)
        check_bad_fraction(bad_files, len(sample_ids), config.data.max_bad_fraction)
        if len(part.sample_ids):
            parts.append(part)
    progress(_STAGE, len(sample_ids), len(sample_ids))
    count = sum(len(part.sample_ids) for part in parts)
    if count < config.optim.batch_size:
        raise RunError(
            f"manifest {config.data.manifest}: at least optim.batch_size ({config.optim.batch_size}) files to train on "
            f"must decode, got {count} of {len(sample_ids)}"
        )
    kept = torch.from_numpy(np.concatenate([part.sample_ids for part in parts]))
    return FeatureTable(
        {modality: np.concatenate([part.by_modality[modality] for part in parts]) for modality in MODALITIES},
        torch.tensor(manifest.label_indices(), dtype=torch.int64)[kept],
        device,
        bad_files,
        hashlib.sha256(kept.numpy().tobytes()).hexdigest()[:16],
    )


def _by_file(progress: Progress, first: int, count: int, total: int) -> Progress:
    """Windows of a part of the files, told as files of all."""
    return lambda _, done, windows: progress(_STAGE, first + done * count // max(1, windows), total)
