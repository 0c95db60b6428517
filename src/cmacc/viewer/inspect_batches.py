"""Active batches that a run's last checkpoint would form, shown as clips beside random batches."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmacc.clips import Manifest, seeds
from cmacc.clips.seeds import seeded_rng
from cmacc.negatives import active_batches
from cmacc.pretraining import PretrainConfig
from cmacc.transfer import embed, open_encoder
from cmacc.viewer.gallery import ClipPictures, Picture

_MOST_CLIPS = 512  # decoding and encoding them takes some ten seconds
_LEAST_CLIPS = 2
_SHOWN_BATCHES = 2
_SHOWN_CLIPS = 12
_KINDS = ("active", "random")


@dataclass(frozen=True)
class BatchClip:
    """A clip of a batch.

    ``same_label``: number of other clips of the batch with its label. ``outdone``: number of other audio clips that are
    more similar to its video than its own audio.
    """

    frames: Picture
    sound: Picture
    label: str | None
    file_name: str
    same_label: int
    outdone: int


@dataclass(frozen=True)
class BatchesOfKind:
    """Metrics of the batches of a kind, and the first of these batches.

    Attributes
    ----------
    likeness
        Mean similarity s(i, j) over the pairs of a batch: the mean of both cosines between the video of one and the
        audio of the other.
    outdone
        Share of pairs in which the other audio is more similar to the video than its own.
    same_label
        Share of pairs with the same label; NaN if none is known. As far as labels describe the content, these are
        false negatives.
    shown
        Clips of the first batches.
    """

    likeness: float
    outdone: float
    same_label: float
    shown: list[list[BatchClip]]


@dataclass(frozen=True)
class InspectedBatches:
    """Batches of ``clips`` clips, by kind: active, random."""

    clips: int
    batch_size: int
    group_size: int
    by_kind: dict[str, BatchesOfKind]


def inspected_batches(
    run_dir: Path, config: PretrainConfig, manifest: Manifest, ids: list[int]
) -> InspectedBatches | None:
    """Active and random batches of at most 512 of the files ``ids``; None if fewer than two can be decoded."""
    rng = seeded_rng(seeds.BATCHES, config.seed)
    taken = sorted(rng.permutation(ids)[:_MOST_CLIPS].tolist())
    features = embed(open_encoder(str(run_dir)).encoder, manifest, taken, ["video", "audio"])
    if len(features.sample_ids) < _LEAST_CLIPS:
        return None
    video, audio = (torch.from_numpy(features.matched[modality][:, 0]) for modality in ("video", "audio"))
    size = min(config.optim.batch_size, len(video))
    group = min(config.batches.group_size or size, size)
    batches = {
        "active": active_batches(video, audio, size, rng, group_size=group),
        "random": active_batches(video, audio, size, rng, known=torch.zeros(len(video), dtype=torch.bool)),
    }
    labels = np.array(manifest.label_indices())[features.sample_ids]
    pictures = ClipPictures(manifest, config.data.clip, config.encoder.mel_bins)

    def of_kind(rows: Tensor) -> BatchesOfKind:
        measured = [_pairs(video[batch], audio[batch], labels[batch.numpy()]) for batch in rows]
        likeness, outdone, same, known = (np.stack(values) for values in zip(*measured, strict=True))
        apart = ~np.eye(size, dtype=bool)
        shown = [
            [
                _clip(pictures, manifest, int(features.sample_ids[row]), float(features.start_seconds[row, 0]),
                      int(same[number, place].sum()), int(outdone[number, place].sum()))
                for place, row in enumerate(batch[:_SHOWN_CLIPS].tolist())
            ]
            for number, batch in enumerate(rows[:_SHOWN_BATCHES])
        ]  # fmt: skip
        return BatchesOfKind(
            likeness=float(likeness[:, apart].mean()),
            outdone=float(outdone[:, apart].mean()),
            same_label=float(same[:, apart].sum() / known.sum()) if known.any() else float("nan"),
            shown=shown,
        )

    return InspectedBatches(len(video), size, group, {kind: of_kind(batches[kind]) for kind in _KINDS})


def _pairs(
    video: Tensor, audio: Tensor, labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """For all pairs of a batch: similarity, whether the other audio outdoes the own, same label, both labels known."""
    cosines = (video @ audio.T).double().numpy()
    apart = ~np.eye(len(cosines), dtype=bool)
    known = (labels[:, None] >= 0) & (labels[None] >= 0) & apart
    return (
        (cosines + cosines.T) / 2,
        (cosines > np.diag(cosines)[:, None]) & apart,
        (labels[:, None] == labels[None]) & known,
        known,
    )


def _clip(
    pictures: ClipPictures, manifest: Manifest, sample_id: int, start_seconds: float, same_label: int, outdone: int
) -> BatchClip:
    record = manifest.records[sample_id]
    window = sample_id, start_seconds
    return BatchClip(pictures.frames(*window), pictures.sound(*window), record.label, record.name, same_label, outdone)
