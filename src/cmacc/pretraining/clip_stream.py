"""The files of a manifest as a training problem: worker processes decode clips on the fly."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cmacc.clips import ClipBatch, Manifest, MediaRecord, TrainingPlan, training_loader
from cmacc.encoders import AudioVisualEncoder
from cmacc.pretraining.clip_views import ClipViews
from cmacc.pretraining.config import PretrainConfig
from cmacc.pretraining.learner import untrained_encoder
from cmacc.pretraining.processes import Processes

log = logging.getLogger("cmacc")

# Scan findings that make a modality useless for training; a duplicate would be a sample's own negative.
_UNFIT: dict[str, tuple[str, ...]] = {"audio": ("silent",), "video": ("black", "still")}
# The reason in `ClipStream.excluded` for a file that is too short for ``refuse`` of `ClipSpec.short_files`.
_TOO_SHORT = "shorter than a clip"


class RunError(ValueError):
    """A run cannot start or continue; the message states the reason and a remedy."""


class ClipStream:
    """The clips of a run.

    Parameters
    ----------
    manifest
        The files.
    config
        Configuration of the run.
    device
        Device that computes the views.

    Attributes
    ----------
    excluded
        ``{sample id: reason}`` of the files of the split that are excluded because of scan findings.
    bad_files
        ``{path: reason}`` of other files that did not decode during training, on any process.

    Raises
    ------
    RunError
        Too few files are usable; or, while reading batches, too many files do not decode.
    """

    def __init__(self, manifest: Manifest, config: PretrainConfig, device: torch.device) -> None:
        check_batches(config)
        self._manifest, self._config, self._device = manifest, config, device
        sample_ids, self.excluded = usable_files(manifest, config)
        if line := excluded_line(self.excluded, len(sample_ids)):
            log.warning(line)
        self.bad_files: dict[str, str] = {}
        self._processes = Processes.current(device)
        self.plan = training_plan(manifest, sample_ids, config)
        self.views = ClipViews(config, device)
        self.memory = None
        self.labels: Tensor = torch.tensor(manifest.label_indices(), dtype=torch.int64, device=device)

    def encoder(self) -> AudioVisualEncoder:
        """The encoders that ``config.encoder`` names."""
        return untrained_encoder(self._config)

    def visit(self, step: int) -> int:
        """Number of earlier visits of the files of a step."""
        return self.plan.visit(step)

    def batches(self, first_step: int, last_step: int) -> Iterator[ClipBatch]:
        """This process's part of the batches of the plan, decoded by ``data.workers`` processes."""
        config = self._config
        loader = training_loader(
            self.plan,
            config.data.clip,
            first_step=first_step,
            last_step=last_step,
            workers=config.data.workers,
            start_method=config.data.start_method,
            pin_memory=self._device.type == "cuda",
            rank=self._processes.rank,
            ranks=self._processes.count,
        )
        for batch in loader:
            if self._processes.any(bool(batch.failures)):
                # On all processes, so that all of them stop at the same step if there are too many.
                for failures in self._processes.objects(batch.failures):
                    for sample_id, reason in failures.items():
                        note_bad_file(self.bad_files, str(self._manifest.records[sample_id].path), reason)
                check_bad_fraction(self.bad_files, len(self.plan.sample_ids), config.data.max_bad_fraction)
            yield batch


def check_batches(config: PretrainConfig) -> None:
    """Reject active batch selection where clips are decoded ahead of the step that would select them.

    Raises
    ------
    RunError
        ``batches.selector`` is not ``random`` though a backbone is trained, or is ``active`` with re-encoded keys.
    """
    if config.batches.selector == "random":
        return
    if not config.keeps_features:
        raise RunError(
            f"batches.selector must be random where clips are decoded as they are needed, got "
            f"{config.batches.selector}: chosen batches are for data in memory (frozen backbones, with train.video and "
            "train.audio head; cmacc ablate; or cmacc.Trainer with a problem of your own); on clips they were no "
            "better (docs/evidence.md)"
        )
    if config.dictionary.selector != "none" and config.dictionary.refresh_policy != "none":
        # The batches of an earlier epoch cannot be chosen again, and with them the inputs to re-encode are lost.
        raise RunError(
            f"dictionary.refresh must be none with batches.selector={config.batches.selector}, since such a run could "
            f"not be resumed, got {config.dictionary.refresh_policy}"
        )


def usable_files(manifest: Manifest, config: PretrainConfig) -> tuple[list[int], dict[int, str]]:
    """Sample ids to train on, and ``{sample id: reason}`` of the excluded files of the split, from the scan findings.

    Reasons are names of `FINDINGS`, or ``shorter than a clip``.

    Raises
    ------
    RunError
        Too few files remain for a batch, or for the dictionary without repeated samples.
    """
    excluded: dict[int, str] = {}
    usable = []
    for sample_id in manifest.ids_where(lambda record: record.split in (None, config.data.split)):
        record = manifest.records[sample_id]
        reason = why_excluded(record, config)
        if reason is None:
            usable.append(sample_id)
        else:
            excluded[sample_id] = reason
    if len(usable) < config.optim.batch_size:
        line = excluded_line(excluded, len(usable))
        raise RunError(
            f"manifest {config.data.manifest}: split {config.data.split!r} must hold at least optim.batch_size "
            f"({config.optim.batch_size}) files to train on, got {len(usable)} of {len(manifest)} files"
            + (f"; {line}" if line else "")
        )
    renewable = config.dictionary.size + config.optim.batch_size
    if config.dictionary.selector != "none" and not config.dictionary.allow_repeats and len(usable) < renewable:
        raise RunError(
            f"dictionary.size must be at most the files to train on less optim.batch_size ({len(usable)} - "
            f"{config.optim.batch_size}), since no sample may stand in it twice, got {config.dictionary.size}; lower "
            "it, or set dictionary.allow_repeats=true"
        )
    return usable, excluded


def why_excluded(record: MediaRecord, config: PretrainConfig) -> str | None:
    """Why a file is not used, see `usable_files`; None if it is."""
    needed = config.objective.modalities
    if "audio" in needed and not record.has_audio:
        return "no_audio"
    if "video" in needed and not record.has_picture:
        return "no_picture"
    if config.data.clip.short_files == "refuse" and record.duration_seconds < config.data.clip.length_seconds:
        return _TOO_SHORT
    unfit = [name for modality in ("audio", "video") if modality in needed for name in _UNFIT[modality]]
    return next((name for name in (*unfit, "duplicate") if name in record.findings), None)


def excluded_line(excluded: Mapping[int, str], usable_count: int) -> str:
    """Message about the excluded files; empty if there are none.

    Examples
    --------
    >>> excluded_line({4: "silent", 5: "no_audio", 9: "silent"}, 32)
    'excluded 3 of 35 files by what the scan found: 2 silent, 1 no_audio'
    """
    if not excluded:
        return ""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in Counter(excluded.values()).most_common())
    total = len(excluded) + usable_count
    return f"excluded {len(excluded):,} of {total:,} files by what the scan found: {reasons}"


def training_plan(manifest: Manifest, sample_ids: Sequence[int], config: PretrainConfig) -> TrainingPlan:
    """The clips of each step of a run, from the sample ids of `usable_files`."""
    return TrainingPlan(
        manifest,
        tuple(sample_ids),
        config.data.clip.length_seconds,
        config.optim.batch_size,
        config.seed,
        config.data.clips_per_video,
    )


def note_bad_file(bad_files: dict[str, str], path: str, reason: str) -> None:
    """Record a skipped file, and log it the first time."""
    if path not in bad_files:
        reason = reason.removeprefix(f"{path}: ")  # the decoder's begin with it
        log.warning("skipped: %s: %s", path, reason)
        bad_files[path] = reason


def check_bad_fraction(bad_files: dict[str, str], count: int, max_bad_fraction: float) -> None:
    """Check that the share of bad files among ``count`` is within the limit.

    Raises
    ------
    RunError
        There are more bad files than allowed.
    """
    if len(bad_files) > max_bad_fraction * count:
        path, reason = next(iter(bad_files.items()))
        raise RunError(
            f"data.max_bad_fraction must be at least the share of files that do not decode, got {max_bad_fraction:g} "
            f"with {len(bad_files)} of {count} files bad, among them {path} ({reason}); scan the folder again to find "
            "them all, or raise --data.max_bad_fraction to train without them"
        )
