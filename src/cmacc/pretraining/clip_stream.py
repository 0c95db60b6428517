"""A manifest's files as a problem: clips decoded as they are needed, by worker processes."""

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cmacc.clips import FINDINGS, ClipBatch, Manifest, TrainingPlan, training_loader
from cmacc.encoders import AudioVisualEncoder
from cmacc.pretraining.clip_views import ClipViews
from cmacc.pretraining.config import PretrainConfig
from cmacc.pretraining.learner import untrained_encoder

log = logging.getLogger("cmacc")

# Findings of a scan that leave nothing to learn from a pair, or would make a sample its own negative.
_NOT_TRAINED_ON = ("silent", "black", "still", "duplicate")


class RunError(ValueError):
    """A run that cannot begin or go on; the message says why and the way out."""


class ClipStream:
    """The clips of a run.

    Parameters
    ----------
    manifest
        The files.
    config
        The run's.
    device
        Where views are made.

    Attributes
    ----------
    bad_files
        ``{path: reason}`` of the split's files that cannot be trained on, those met while training among them.

    Raises
    ------
    RunError
        Too few files are usable, or too many are bad; also while batches are read.
    """

    def __init__(self, manifest: Manifest, config: PretrainConfig, device: torch.device) -> None:
        require_random_batches(config)
        self._manifest, self._config, self._device = manifest, config, device
        sample_ids, self.bad_files = usable_files(manifest, config)
        self._split_count = len(sample_ids) + len(self.bad_files)
        self.plan = training_plan(manifest, sample_ids, config)
        self.views = ClipViews(config, device)
        self.memory = None
        self.labels: Tensor = torch.tensor(manifest.label_indices(), dtype=torch.int64, device=device)

    def encoder(self) -> AudioVisualEncoder:
        """The encoders that ``config.encoder`` names."""
        return untrained_encoder(self._config)

    def visit(self, step: int) -> int:
        """How often the files of a step's batch were due before."""
        return self.plan.visit(step)

    def batches(self, first_step: int, last_step: int) -> Iterator[ClipBatch]:
        """The plan's batches, decoded by ``data.workers`` processes."""
        config = self._config
        loader = training_loader(
            self.plan,
            config.data.clip,
            first_step=first_step,
            last_step=last_step,
            workers=config.data.workers,
            start_method=config.data.start_method,
            pin_memory=self._device.type == "cuda",
        )
        for batch in loader:
            for sample_id, reason in batch.failures.items():
                note_bad_file(self.bad_files, str(self._manifest.records[sample_id].path), reason)
            check_bad_fraction(self.bad_files, self._split_count, config.data.max_bad_fraction)
            yield batch


def require_random_batches(config: PretrainConfig) -> None:
    """Refuse batches that are chosen: of clips that are decoded ahead of the step that would choose them.

    Raises
    ------
    RunError
        ``batches.selector`` is not ``random``.
    """
    if config.batches.selector != "random":
        raise RunError(
            f"batches.selector must be random where clips are decoded as they are needed, got "
            f"{config.batches.selector}: chosen batches are for data in memory (cmacc ablate, or cmacc.Trainer with a "
            "problem of your own); on clips they were no better (docs/evidence.md)"
        )


def usable_files(manifest: Manifest, config: PretrainConfig) -> tuple[list[int], dict[str, str]]:
    """Sample ids to train on, and ``{path: reason}`` of the files of the split that are skipped.

    Raises
    ------
    RunError
        More than ``data.max_bad_fraction`` of the split's files are unusable, or too few remain for a batch.
    """
    in_split = manifest.ids_where(lambda record: record.split in (None, config.data.split))
    bad_files: dict[str, str] = {}
    usable = []
    for sample_id in in_split:
        record = manifest.records[sample_id]
        if not record.has_audio:
            note_bad_file(bad_files, str(record.path), "no sound")
        elif not record.has_picture:
            note_bad_file(bad_files, str(record.path), "no picture")
        elif config.data.clip.short_files == "refuse" and record.duration_seconds < config.data.clip.length_seconds:
            note_bad_file(bad_files, str(record.path), "shorter than a clip")
        elif (finding := next((name for name in _NOT_TRAINED_ON if name in record.findings), None)) is not None:
            note_bad_file(bad_files, str(record.path), FINDINGS[finding])
        else:
            usable.append(sample_id)
    check_bad_fraction(bad_files, len(in_split), config.data.max_bad_fraction)
    if len(usable) < config.optim.batch_size:
        raise RunError(
            f"manifest {config.data.manifest}: split {config.data.split!r} must hold at least optim.batch_size "
            f"({config.optim.batch_size}) files with picture and sound, got {len(usable)} of {len(manifest)} files"
        )
    renewable = config.dictionary.size + config.optim.batch_size
    if config.dictionary.selector != "none" and not config.dictionary.allow_repeats and len(usable) < renewable:
        raise RunError(
            f"dictionary.size must be at most the files to train on less optim.batch_size ({len(usable)} - "
            f"{config.optim.batch_size}), since no sample may stand in it twice, got {config.dictionary.size}; lower "
            "it, or set dictionary.allow_repeats=true"
        )
    return usable, bad_files


def training_plan(manifest: Manifest, sample_ids: Sequence[int], config: PretrainConfig) -> TrainingPlan:
    """Which clips each step of a run takes, of the files that `usable_files` found."""
    return TrainingPlan(
        manifest,
        tuple(sample_ids),
        config.data.clip.length_seconds,
        config.optim.batch_size,
        config.seed,
        config.data.clips_per_video,
    )


def note_bad_file(bad_files: dict[str, str], path: str, reason: str) -> None:
    """Log a file that is skipped, the first time."""
    if path not in bad_files:
        log.warning("skipped: %s: %s", path, reason)
        bad_files[path] = reason


def check_bad_fraction(bad_files: dict[str, str], count: int, max_bad_fraction: float) -> None:
    """Refuse more bad files than allowed among ``count``.

    Raises
    ------
    RunError
        They are more.
    """
    if len(bad_files) > max_bad_fraction * count:
        path, reason = next(iter(bad_files.items()))
        raise RunError(
            f"data.max_bad_fraction must be at least the share of files that cannot be trained on, got "
            f"{max_bad_fraction:g} with {len(bad_files)} of {count} files bad, among them {path} ({reason}); raise "
            "--data.max_bad_fraction to train without them, or scan another folder"
        )
