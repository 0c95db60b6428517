"""From a manifest to batches: a plan of windows (pure), a dataset that decodes them, and torch's DataLoader around it.

Training batches always hold exactly ``batch_size`` clips. A file that turns out not to decode is replaced by another,
drawn from (seed, epoch, sample id), and reported in ``ClipBatch.failures``: the loop decides when too many are bad.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from cmacc.clips import seeds
from cmacc.clips.clip import Clip, ClipBatch, ClipSpec
from cmacc.clips.container import MediaError
from cmacc.clips.manifest import Manifest
from cmacc.clips.media import decode_clip
from cmacc.clips.seeds import seeded_rng
from cmacc.clips.windows import random_start, spread_starts

_MOST_SUBSTITUTES = 16


@dataclass(frozen=True)
class ClipRequest:
    """One window of one file, in one epoch."""

    sample_id: int
    start_seconds: float
    epoch: int = 0


@dataclass(frozen=True)
class TrainingPlan:
    """Which windows make up the batch of every step; a pure function of its fields.

    An epoch visits every file once in an order of its own, less the remainder that does not fill a batch.

    Raises
    ------
    ValueError
        ``batch_size`` is below 1, or there are fewer files than one batch needs.
    """

    manifest: Manifest
    sample_ids: tuple[int, ...]
    length_seconds: float
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"TrainingPlan: batch_size must be at least 1, got {self.batch_size}")
        if len(self.sample_ids) < self.batch_size:
            raise ValueError(
                f"TrainingPlan: batch_size must be at most the number of usable files, "
                f"got {self.batch_size} with {len(self.sample_ids)} files"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass over the files."""
        return len(self.sample_ids) // self.batch_size

    def epoch(self, step: int) -> int:
        """The epoch that ``step`` (counted from 0) belongs to."""
        return step // self.steps_per_epoch

    def request(self, sample_id: int, epoch: int) -> ClipRequest:
        """The window of a file in an epoch."""
        rng = seeded_rng(seeds.WINDOW, self.seed, epoch, sample_id)
        start = random_start(self.manifest.records[sample_id].duration_seconds, self.length_seconds, rng)
        return ClipRequest(sample_id, start, epoch)

    def requests(self, step: int) -> list[ClipRequest]:
        """The ``batch_size`` windows of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = seeded_rng(seeds.ORDER, self.seed, epoch).permutation(len(self.sample_ids))
        chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
        return [self.request(self.sample_ids[i], epoch) for i in chosen]

    def substitutes(self, request: ClipRequest) -> Iterator[ClipRequest]:
        """Windows of other files to take instead of one that does not decode."""
        rng = seeded_rng(seeds.SUBSTITUTE, self.seed, request.epoch, request.sample_id)
        for _ in range(_MOST_SUBSTITUTES):
            yield self.request(self.sample_ids[int(rng.integers(len(self.sample_ids)))], request.epoch)


def training_loader(
    plan: TrainingPlan, spec: ClipSpec, *, first_step: int, last_step: int, workers: int, pin_memory: bool = False
) -> "DataLoader[ClipBatch]":
    """Batches of the steps ``first_step <= step < last_step``, in order."""
    return _loader(
        _ClipDataset(plan.manifest, spec, plan), _PlannedSteps(plan, first_step, last_step), workers, pin_memory
    )


def evaluation_requests(
    manifest: Manifest, sample_ids: Sequence[int], length_seconds: float, windows_per_file: int = 1
) -> list[ClipRequest]:
    """``windows_per_file`` windows spread evenly over each file, file after file."""
    return [
        ClipRequest(sample_id, start)
        for sample_id in sample_ids
        for start in spread_starts(manifest.records[sample_id].duration_seconds, length_seconds, windows_per_file)
    ]


def evaluation_loader(
    manifest: Manifest, requests: Sequence[ClipRequest], spec: ClipSpec, *, batch_size: int, workers: int
) -> "DataLoader[ClipBatch]":
    """Batches of the requests in order; a file that does not decode is missing from its batch and in ``failures``."""
    batches = [list(requests[i : i + batch_size]) for i in range(0, len(requests), batch_size)]
    return _loader(_ClipDataset(manifest, spec, None), batches, workers, False)


@dataclass(frozen=True)
class _Loaded:
    sample_id: int
    clip: Clip | None
    label: int
    failures: dict[int, str]


class _ClipDataset(Dataset[_Loaded]):
    def __init__(self, manifest: Manifest, spec: ClipSpec, plan: TrainingPlan | None) -> None:
        self._records = manifest.records
        self._labels = manifest.label_indices()
        self._spec = spec
        self._plan = plan

    def __getitem__(self, request: ClipRequest) -> _Loaded:
        failures: dict[int, str] = {}
        candidates = [request] if self._plan is None else (request, *self._plan.substitutes(request))
        for candidate in candidates:
            if candidate.sample_id in failures:
                continue
            try:
                record = self._records[candidate.sample_id]
                clip = decode_clip(record.source, record.start_seconds + candidate.start_seconds, self._spec)
            except MediaError as error:
                failures[candidate.sample_id] = str(error)
                continue
            return _Loaded(candidate.sample_id, clip, self._labels[candidate.sample_id], failures)
        if self._plan is None:
            return _Loaded(request.sample_id, None, -1, failures)
        raise MediaError(
            f"loader: {len(failures)} files in a row do not decode, among them {next(iter(failures.values()))}"
        )


class _PlannedSteps(Sampler[list[ClipRequest]]):
    def __init__(self, plan: TrainingPlan, first_step: int, last_step: int) -> None:
        self._plan, self._steps = plan, range(first_step, last_step)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[ClipRequest]]:
        return (self._plan.requests(step) for step in self._steps)


def _loader(
    dataset: _ClipDataset,
    batches: Sampler[list[ClipRequest]] | list[list[ClipRequest]],
    workers: int,
    pin_memory: bool,
) -> "DataLoader[ClipBatch]":
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=_CollateClips(dataset._spec),
        num_workers=workers,
        worker_init_fn=_quiet_worker if workers else None,
        pin_memory=pin_memory,
        # torch would otherwise draw the workers' base seed from the global generator and so disturb the caller's.
        generator=torch.Generator().manual_seed(0),
    )


def _quiet_worker(_: int) -> None:
    # Ctrl-C goes to the whole process group; only the main process answers it, then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(frozen=True)
class _CollateClips:
    spec: ClipSpec

    def __call__(self, loaded: list[_Loaded]) -> ClipBatch:
        failures = {sample_id: reason for item in loaded for sample_id, reason in item.failures.items()}
        good = [(item, item.clip) for item in loaded if item.clip is not None]
        spec = self.spec
        frames = torch.empty((len(good), spec.frame_count, spec.frame_height, spec.frame_width, 3), dtype=torch.uint8)
        waveforms = torch.empty((len(good), spec.sample_count))
        for i, (_, clip) in enumerate(good):
            frames[i], waveforms[i] = clip.frames, clip.waveform
        return ClipBatch(
            frames=frames,
            waveforms=waveforms,
            sample_ids=torch.tensor([item.sample_id for item, _ in good], dtype=torch.int64),
            labels=torch.tensor([item.label for item, _ in good], dtype=torch.int64),
            failures=failures,
        )
