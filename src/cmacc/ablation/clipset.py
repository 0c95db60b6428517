"""Clips in memory: every file is decoded once, and stored as uint8 frames and float16 audio in one file.

Runs then share the decoding, which would otherwise take most of their time. The price is that there is only one window
per file, the middle one, so that the visits of a sample only differ in their augmentation.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cmacc.ablation.problem import Measured, plain_rows
from cmacc.clips import (
    ClipBatch,
    Manifest,
    evaluation_loader,
    evaluation_requests,
    grey_video,
    list_folders,
    scan,
    to_video,
)
from cmacc.clips.progress import Progress, within
from cmacc.clips.storage import written_aside
from cmacc.clips.synthetic import WorldConfig, write_world
from cmacc.encoders import MODALITIES, AudioVisualEncoder
from cmacc.pretraining import PretrainConfig, untrained_encoder
from cmacc.pretraining.clip_stream import check_bad_fraction, excluded_line, note_bad_file, usable_files
from cmacc.pretraining.clip_views import ClipViews, audio_input
from cmacc.pretraining.learner import Learner

_MEASURED_AT_ONCE = 100

log = logging.getLogger("cmacc")


class ClipSetError(ValueError):
    """Clips that are not available, or a file of decoded clips that cannot be read; the message says which."""


@dataclass(frozen=True)
class RenderedClips:
    """Clips of the synthetic world (`cmacc.clips.synthetic`), a quarter of them held out.

    Parameters
    ----------
    clips, classes, zipf_exponent, duplicate_share, nuisance, size, seconds
        Settings of the world: number of clips and classes, skew of the classes, share of copies, strength of the
        nuisances, frame size in pixels, and length.
    test_fraction
        Share of held-out clips.
    """

    clips: int = 1000
    classes: int = 8
    zipf_exponent: float = 0.0
    duplicate_share: float = 0.0
    nuisance: float = 0.3
    size: int = 40
    seconds: float = 2.0
    test_fraction: float = 0.25


@dataclass(frozen=True)
class ManifestClips:
    """The clips of a manifest from ``cmacc scan``. Split ``test`` is held out, the others are trained on."""

    manifest: str


def render(world: RenderedClips, folder: Path, progress: Progress) -> Path:
    """Write the files of the world and their manifest, and return the path of the manifest."""
    config = WorldConfig(
        clip_count=world.clips,
        class_count=world.classes,
        zipf_exponent=world.zipf_exponent,
        duplicate_share=world.duplicate_share,
        nuisance=world.nuisance,
        frame_size=world.size,
        duration_seconds=world.seconds,
    )
    write_world(config, folder / "world", progress=within(progress, "rendering"))
    listing = list_folders([folder / "world"])
    manifest = folder / "manifest.parquet"
    scan(listing, test_fraction=world.test_fraction).manifest.write(manifest)
    return manifest


def decode_all(config: PretrainConfig, out: Path, progress: Progress) -> None:
    """Decode the middle window of every file of ``config.data.manifest`` that can be trained or tested on.

    Raises
    ------
    ClipSetError
        Nothing is held out.
    RunError
        More than ``data.max_bad_fraction`` of the files do not decode; fewer are logged, and named in the file.
    """
    manifest = Manifest.read(config.data.manifest)
    training, excluded = usable_files(manifest, config)
    if line := excluded_line(excluded, len(training)):
        log.warning(line)
    held_out = [
        i
        for i, record in enumerate(manifest.records)
        if record.split == "test" and record.has_audio and record.has_picture and "silent" not in record.findings
    ]
    if len(held_out) < 2:
        raise ClipSetError(
            f"manifest {config.data.manifest}: must hold at least 2 files with video and audio in split 'test', got "
            f"{len(held_out)}; `cmacc scan --test-fraction 0.2` puts files there"
        )
    spec = config.data.clip
    requests = evaluation_requests(manifest, [*training, *held_out], spec.length_seconds)
    batches: list[ClipBatch] = []
    skipped: dict[str, str] = {}
    for batch in evaluation_loader(manifest, requests, spec, batch_size=50, workers=config.data.workers):
        batches.append(batch)
        for sample_id, reason in batch.failures.items():
            note_bad_file(skipped, str(manifest.records[sample_id].path), reason)
        progress("clips decoded", min(len(requests), 50 * len(batches)), len(requests))
    check_bad_fraction(skipped, len(requests), config.data.max_bad_fraction)
    ids = torch.cat([batch.sample_ids for batch in batches])
    is_training = torch.isin(ids, torch.tensor(training))
    order = torch.cat([is_training.nonzero().flatten(), (~is_training).nonzero().flatten()])
    tensors = {
        "frames": torch.cat([batch.frames for batch in batches])[order],
        "waveforms": torch.cat([batch.waveforms for batch in batches]).half()[order],
        "labels": torch.tensor(manifest.label_indices(), dtype=torch.int64)[ids][order],
    }
    facts = {"training": int(is_training.sum()), "fingerprint": manifest.fingerprint(), "skipped": skipped}
    with written_aside(out) as aside:
        save_file(tensors, aside, metadata={"facts": json.dumps(facts)})


class ClipDataset:
    """The clips that `decode_all` wrote: training clips first, then held-out ones.

    Attributes
    ----------
    skipped
        ``{path: reason}`` of the files that did not decode.

    Raises
    ------
    ClipSetError
        The file cannot be read.
    """

    in_float32 = False

    def __init__(self, path: Path, device: torch.device) -> None:
        self._device = device
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["facts"])
                tensors = {name: file.get_tensor(name) for name in ("frames", "waveforms", "labels")}
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise ClipSetError(
                f"decoded clips {path}: cannot be read ({error}); delete it to have it decoded again"
            ) from error
        self._frames, self._waveforms = tensors["frames"].to(device), tensors["waveforms"].to(device)
        self._labels: Tensor = tensors["labels"]
        self._training = int(facts["training"])
        self.skipped: dict[str, str] = facts.get("skipped", {})

    @property
    def labels(self) -> Tensor:
        """Labels of the training clips."""
        return self._labels[: self._training]

    @property
    def held_out_labels(self) -> Tensor:
        """Labels of the held-out clips."""
        return self._labels[self._training :]

    def encoder(self, config: PretrainConfig) -> AudioVisualEncoder:
        """The initial encoders of `cmacc pretrain`."""
        return untrained_encoder(config)

    def views(self, config: PretrainConfig) -> ClipViews:
        """The views of `cmacc pretrain`."""
        return ClipViews(config, self._device)

    def batch(self, sample_ids: Tensor) -> ClipBatch:
        """A batch of these clips."""
        own = sample_ids.to(self._device)
        return ClipBatch(self._frames[own], self._waveforms[own].float(), own, self._labels[sample_ids], {})

    @torch.no_grad()
    def measured(self, learner: Learner) -> Measured:
        """Outputs of the encoders without augmentation; grey if they are trained on grey video only."""
        config = learner.config
        inputs = audio_input(config.encoder, config.data.clip.sample_rate_hz).to(self._device)
        parts: dict[str, list[Any]] = {"video": [], "audio": [], "video_key": [], "audio_key": []}
        encoder = learner.encoder.eval()
        for rows in torch.arange(len(self._frames)).split(_MEASURED_AT_ONCE):
            video = to_video(self._frames[rows.to(self._device)])
            if config.data.augment.grey_probability == 1:
                video = grey_video(video)
            with learner.autocast():
                encodings = encoder(video=video, audio=inputs(self._waveforms[rows.to(self._device)].float()))
            for name, encoding in encodings.items():
                parts[name].append(plain_rows(encoding.feature))
                parts[f"{name}_key"].append(plain_rows(encoding.embedding))
        encoder.train()
        joined = {name: np.concatenate(rows) for name, rows in parts.items()}
        cut = self._training
        return Measured(
            features={m: (joined[m][:cut], joined[m][cut:]) for m in MODALITIES},
            matched={m: joined[f"{m}_key"][cut:] for m in MODALITIES},
        )
