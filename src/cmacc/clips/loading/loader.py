"""Load the batches of a plan: a dataset that decodes clips, a DataLoader, and a loader that survives dead workers.

Training batches always have exactly ``batch_size / ranks`` clips. A file that does not decode is replaced by another,
drawn from (seed, visit, sample id), and reported in ``ClipBatch.failures``. The training loop decides when there are
too many. The same applies to a file that crashes or hangs its worker. Other batches have no substitutes.

Trade-offs and traps:

* A dead worker makes the whole DataLoader unusable: torch cannot replace one worker, and locks that it held are never
  released. All workers are then restarted at the first batch that was not delivered.
* torch reports a dead worker by raising in its SIGCHLD handler, wherever the main thread is, for example inside an
  optimizer step. The loader's workers are therefore removed from that handler (`workers.unwatch`, the only place that
  uses private names of torch), and checked once per second instead.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from cmacc.clips.catalog.manifest import Manifest
from cmacc.clips.clip import Clip, ClipBatch, ClipSpec, MediaError
from cmacc.clips.loading.plan import (
    ClipRequest,
    CoveringPlan,
    FileTable,
    TrainingPlan,
    Windows,
    evaluation_requests,
    share_memory,
)
from cmacc.clips.loading.workers import StartMethod, Workers, begin_worker, unwatch
from cmacc.clips.media.decoding import decode_clips

__all__ = [
    "HANG_SECONDS",
    "ClipLoader",
    "ClipRequest",
    "CoveringPlan",
    "TrainingPlan",
    "covering_loader",
    "evaluation_loader",
    "evaluation_requests",
    "training_loader",
]

HANG_SECONDS = 120.0
_POLL_SECONDS = 1
_MOST_DEATHS = 6  # in a row without a batch: allows three crashing files in one batch
_NO_SAMPLE = -1
# Prefixes of torch's messages, the only way to distinguish these errors from file or disk errors.
_DIED, _TIMED_OUT = "DataLoader worker (pid", "DataLoader timed out"

log = logging.getLogger("cmacc")


def training_loader(
    plan: TrainingPlan,
    spec: ClipSpec,
    *,
    first_step: int,
    last_step: int,
    workers: int,
    rank: int = 0,
    ranks: int = 1,
    start_method: StartMethod | None = None,
    pin_memory: bool = False,
    hang_seconds: float = HANG_SECONDS,
) -> "ClipLoader":
    """Batches of the steps ``first_step <= step < last_step``, in order.

    They depend only on the plan, not on workers, ranks, or the step at which a run was resumed.

    Parameters
    ----------
    plan
        The batch of each step. With ``clips_per_video`` k > 1, k batches are read before the first is delivered: the
        first one takes longer, and 2 k batches per worker are in memory.
    spec
        Size of the clips.
    first_step, last_step
        Range of steps. If it starts or ends within a group of ``clips_per_video`` steps, the whole group is read and
        the other steps are dropped.
    workers
        Number of decoding processes; 0 decodes in the main process, which a file that crashes its decoder then kills.
    rank, ranks
        With several processes, rank r gets ``batch_size / ranks`` clips of every batch, starting from
        ``r * batch_size / ranks``.
    start_method
        Start method of workers; None uses the platform's default.
    pin_memory
        Whether batches are in page-locked memory, for asynchronous copies to a GPU.
    hang_seconds
        Workers count as dead after this time without progress on any file.

    Raises
    ------
    ValueError
        ``batch_size`` is not divisible by ``ranks``, or ``rank`` is out of range.
    MediaError
        While reading: a file and all its substitutes do not decode, or workers die repeatedly.
    """
    if ranks < 1 or plan.batch_size % ranks:
        raise ValueError(f"training_loader: ranks must be a divisor of batch_size ({plan.batch_size}), got {ranks}")
    if not 0 <= rank < ranks:
        raise ValueError(f"training_loader: rank must be in [0, {ranks}), got {rank}")
    share = plan.batch_size // ranks
    k = plan.clips_per_video
    tasks = _PlannedTasks(plan, range(first_step // k, -(-last_step // k)), slice(rank * share, (rank + 1) * share))
    batches = range(first_step % k, first_step % k + last_step - first_step)
    dataset = _Clips(FileTable.of(plan.manifest), spec, plan.windows, k, workers)
    return ClipLoader(dataset, tasks, batches, workers, start_method, pin_memory, hang_seconds)


def evaluation_loader(
    manifest: Manifest, requests: Sequence[ClipRequest], spec: ClipSpec, *, batch_size: int, workers: int
) -> "ClipLoader":
    """Batches of the requests in order. Files that do not decode are missing, and listed in ``failures``."""
    batches = [requests[i : i + batch_size] for i in range(0, len(requests), batch_size)]
    tasks = [_Task([r.sample_id for r in b], starts_seconds=[[r.start_seconds] for r in b]) for b in batches]
    dataset = _Clips(FileTable.of(manifest), spec, None, 1, workers)
    return ClipLoader(dataset, tasks, range(len(tasks)), workers, None, False, HANG_SECONDS)


def covering_loader(
    plan: CoveringPlan, spec: ClipSpec, *, workers: int, start_method: StartMethod | None = None
) -> "ClipLoader":
    """The batches of a plan, in order; each file in a batch is opened once, and overlapping windows share their work.

    If one window of a file does not decode, or all in the batch together take longer than `HANG_SECONDS`, they are
    missing, and the file is listed in the batch's ``failures``. It may have windows in other batches, which the caller
    drops.

    Examples
    --------
    ```python
    for requests, batch in zip(plan, covering_loader(plan, spec, workers=2)):
        rows = [request for request in requests if request.sample_id not in batch.failures]
    ```
    """
    dataset = _Clips(FileTable.of(plan.manifest), spec, None, 1, workers)
    return ClipLoader(dataset, _CoveringTasks(plan), range(len(plan)), workers, start_method, False, HANG_SECONDS)


class ClipLoader:
    """Iterable over batches of clips, in order. Created by the functions above.

    If a worker dies (FFmpeg crashes, or the kernel runs out of memory) or hangs, all workers are restarted at the first
    batch that was not delivered. The batches do not change. If a sample was being decoded at two deaths, without being
    decoded successfully in between, the loader treats it as one that does not decode from then on. One death is not
    enough, since a worker may have been killed from outside while decoding a good file.
    """

    def __init__(
        self,
        dataset: "_Clips",
        tasks: "Sequence[_Task]",
        batches: range,
        workers: int,
        start_method: StartMethod | None,
        pin_memory: bool,
        hang_seconds: float,
    ) -> None:
        self._dataset = dataset
        self._tasks = tasks
        self._batches = batches  # the requested ones among all batches of the tasks
        self._workers = workers
        self._start_method = start_method
        self._pin_memory = pin_memory
        self._hang_seconds = hang_seconds
        self._suspects: set[int] = set()

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[ClipBatch]:
        number = 0
        for batches in self._surviving() if self._workers else self._data_loader(0, None):
            for batch in batches:
                if number in self._batches:
                    yield batch
                number += 1

    def _data_loader(self, place: int, workers: Workers | None) -> "DataLoader[list[ClipBatch]]":
        """A DataLoader for the tasks from ``place`` on; a task yields a list of batches."""
        return DataLoader(
            self._dataset,
            batch_size=None,
            sampler=(self._tasks[i] for i in range(place, len(self._tasks))),
            collate_fn=_unchanged,
            num_workers=self._workers,
            # Prefetch two batches per worker, as is torch's default, but only one group if groups have several batches.
            prefetch_factor=max(1, 2 // self._dataset.batch_count) if self._workers else None,
            worker_init_fn=begin_worker if self._workers else None,
            multiprocessing_context=workers.context if workers is not None else None,
            timeout=_POLL_SECONDS if self._workers else 0,
            pin_memory=self._pin_memory,
            # torch would otherwise draw the base seed of workers from the global generator, and change its state.
            generator=torch.Generator().manual_seed(0),
        )

    def _surviving(self) -> Iterator[list[ClipBatch]]:
        place = deaths = 0
        while place < len(self._tasks):
            workers = Workers(self._start_method)
            iterator: Iterator[list[ClipBatch]] | None = None
            try:
                self._dataset.slots.copy_(torch.tensor([_NO_SAMPLE, 0]))
                iterator = iter(self._data_loader(place, workers))
                unwatch(iterator)
                while place < len(self._tasks):
                    batches = self._next(iterator, workers)
                    place, deaths = place + 1, 0
                    if self._suspects:
                        self._suspects.difference_update(i for batch in batches for i in batch.sample_ids.tolist())
                    yield batches
            except RuntimeError as error:
                if not str(error).startswith((_DIED, _TIMED_OUT)):
                    raise
                deaths += 1
                self._find_culprits(error, workers)
                if deaths == _MOST_DEATHS:
                    raise MediaError(
                        f"loader: workers must live for one batch at least, got {deaths} deaths in a row ({error}); "
                        "workers=0 shows the reason, unless memory is short"
                    ) from error
            finally:
                workers.kill()
                iterator = None  # lets torch close its queues and threads

    def _next(self, iterator: Iterator[list[ClipBatch]], workers: Workers) -> list[ClipBatch]:
        """The next item of the iterator. Raises torch's errors for a dead worker, or for too long without progress."""
        progress = self._dataset.slots.clone()
        since = time.monotonic()
        while True:
            try:
                return next(iterator)
            except RuntimeError as error:
                if not str(error).startswith(_TIMED_OUT):
                    raise
                now = self._dataset.slots.clone()
                if not torch.equal(now, progress):
                    progress, since = now, time.monotonic()
                elif time.monotonic() - since > self._hang_seconds:
                    raise RuntimeError(f"{_TIMED_OUT}: nothing decoded in {self._hang_seconds:g} s") from error
            except (OSError, EOFError) as error:
                # A batch is sent as a handle of shared memory. If its worker dies before the handle is received, this
                # error may occur shortly before the worker counts as dead.
                time.sleep(0.1)
                if not workers.dead():
                    raise
                raise RuntimeError(f"{_DIED} unknown) died with a batch on its way") from error

    def _find_culprits(self, error: RuntimeError, workers: Workers) -> None:
        """Mark the samples that the lost workers were decoding as suspects, or blame them the second time."""
        dataset = self._dataset
        hung = str(error).startswith(_TIMED_OUT)
        lost = range(self._workers) if hung else workers.dead()
        # Count each sample once: two workers may decode the same file, for example as a substitute.
        at_work = sorted({int(dataset.slots[number, 0]) for number in lost} - {_NO_SAMPLE})
        log.warning(
            "loader: %s, at %s; workers are restarted",
            error, ", ".join(dataset.files.path(sample_id) for sample_id in at_work) or "no file",
        )  # fmt: skip
        for sample_id in at_work:
            if sample_id in self._suspects:
                dataset.blamed[sample_id] = "hung its decoder" if hung else "crashed the worker that decoded it"
            self._suspects.add(sample_id)


def _unchanged(batches: list[ClipBatch]) -> list[ClipBatch]:
    return batches


@dataclass(frozen=True)
class _Task:
    """A unit of work: the batches that share some files.

    For training, a file has one window in each batch. Otherwise there is one batch, and ``starts_seconds`` are the
    windows of each file.
    """

    sample_ids: list[int]
    visit: int = 0
    starts_seconds: Sequence[list[float]] = ()

    @property
    def batch_size(self) -> int:
        return sum(map(len, self.starts_seconds)) if self.starts_seconds else len(self.sample_ids)


class _PlannedTasks(Sequence[_Task]):
    """The tasks of a range of groups of steps, created on access."""

    def __init__(self, plan: TrainingPlan, groups: range, share: slice) -> None:
        self._plan, self._groups, self._share = plan, groups, share

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, place: Any) -> Any:
        step = self._groups[place] * self._plan.clips_per_video
        return _Task(self._plan.files(step)[self._share].tolist(), self._plan.visit(step))


class _CoveringTasks(Sequence[_Task]):
    """The tasks of a plan, one for each batch, created on access."""

    def __init__(self, plan: CoveringPlan) -> None:
        self._plan = plan

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, place: Any) -> Any:
        starts: dict[int, list[float]] = {}
        for request in self._plan[place]:
            starts.setdefault(request.sample_id, []).append(request.start_seconds)
        return _Task(list(starts), starts_seconds=list(starts.values()))


class _Clips(Dataset[list[ClipBatch]]):
    """Creates the ``batch_count`` batches of a task: training batches with substitutes, if ``windows`` are given.

    ``slots`` has one row per worker, in memory shared with the main process, which reads it when the worker is dead:
    the sample being decoded or -1, and a counter that changes when a sample is started or done. ``blamed`` maps samples
    that must not be decoded to the reason. Changes only reach workers that are started later.
    """

    def __init__(
        self, files: FileTable, spec: ClipSpec, windows: Windows | None, batch_count: int, worker_count: int
    ) -> None:
        self.files, self._spec, self._windows, self.batch_count = files, spec, windows, batch_count
        self.blamed: dict[int, str] = {}
        self.slots = torch.tensor([[_NO_SAMPLE, 0]] * max(1, worker_count))
        if worker_count:
            self.slots.share_memory_()
            share_memory(files)
            if windows is not None:
                share_memory(windows)

    def __getitem__(self, task: _Task) -> list[ClipBatch]:
        batches = [_Batch(self._spec, task.batch_size) for _ in range(self.batch_count)]
        failures: dict[int, str] = {}
        for place, wanted in enumerate(task.sample_ids):
            failed: dict[int, str] = {}
            for sample_id in self._candidates(wanted, task.visit):
                if sample_id in failed:
                    continue
                try:
                    clips = self._decode(sample_id, self._starts(task, place, sample_id))
                except MediaError as error:
                    failed[sample_id] = str(error)
                    continue
                for batch, clip in zip(cycle(batches), clips):
                    batch.add(sample_id, clip)
                break
            else:
                if self._windows is not None:
                    raise MediaError(
                        f"loader: {len(failed)} files in a row do not decode, among them {next(iter(failed.values()))}"
                    )
            failures |= failed
        return [batch.done(self.files.labels, failures) for batch in batches]

    def _candidates(self, sample_id: int, visit: int) -> Iterator[int]:
        yield sample_id
        if self._windows is not None:
            yield from self._windows.substitutes(sample_id, visit)

    def _starts(self, task: _Task, place: int, sample_id: int) -> list[float]:
        if self._windows is None:
            return task.starts_seconds[place]
        visits = range(task.visit, task.visit + self.batch_count)
        return [self._windows.request(sample_id, visit).start_seconds for visit in visits]

    def _decode(self, sample_id: int, starts: list[float]) -> list[Clip]:
        if sample_id in self.blamed:
            raise MediaError(f"{self.files.path(sample_id)}: {self.blamed[sample_id]}")
        begin = self.files.starts_seconds[sample_id].item()
        worker = get_worker_info()
        slot = self.slots[worker.id if worker is not None else 0]
        slot[0] = sample_id
        slot[1] += 1
        try:
            return decode_clips(self.files.source(sample_id), [begin + start for start in starts], self._spec)
        finally:
            slot[0] = _NO_SAMPLE
            slot[1] += 1


class _Batch:
    """A batch under construction, in preallocated memory."""

    def __init__(self, spec: ClipSpec, size: int) -> None:
        shape = (size, spec.frame_count, spec.frame_height, spec.frame_width, 3)
        self._frames = torch.empty(shape, dtype=torch.uint8)
        self._waveforms = torch.empty((size, spec.sample_count))
        self._sample_ids: list[int] = []

    def add(self, sample_id: int, clip: Clip) -> None:
        place = len(self._sample_ids)
        self._frames[place], self._waveforms[place] = clip.frames, clip.waveform
        self._sample_ids.append(sample_id)

    def done(self, labels: Tensor, failures: dict[int, str]) -> ClipBatch:
        ids, count = torch.tensor(self._sample_ids, dtype=torch.int64), len(self._sample_ids)
        return ClipBatch(self._frames[:count], self._waveforms[:count], ids, labels[ids], dict(failures))
