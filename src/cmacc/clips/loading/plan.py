"""The plan of what to read: the clips of every batch, and the locations of their files. Pure, tested without files.

Both are computed from the manifest's columns. Workers only need a few tensors of them, which can be in shared memory. A
Python list of a million paths would be copied into every worker: pickled if workers are spawned, and page by page, by
updates of reference counts, if they are forked.

Opening a file costs as much as decoding one or two windows of it. With ``clips_per_video`` k > 1, an open file provides
one clip for each of k consecutive batches: steps come in groups of k that share their files, so that a batch never has
two clips of one file. The price is that those k batches have the same files.
"""

import dataclasses
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float64, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from cmacc.clips import seeds
from cmacc.clips.catalog.manifest import Manifest
from cmacc.clips.seeds import seeded_rng
from cmacc.clips.storage import Extent, PackedSample
from cmacc.clips.windows import covering_count, covering_start, random_start, spread_starts

_MOST_SUBSTITUTES = 16


@dataclass(frozen=True)
class ClipRequest:
    """One window of one file, ``start_seconds`` after the start of the sample; ``visit`` counts visits from 0."""

    sample_id: int
    start_seconds: float
    visit: int = 0


@dataclass(frozen=True)
class FileTable:
    """Location and class of every sample of a manifest, without a Python object per sample.

    Attributes
    ----------
    paths
        Concatenated UTF-8 bytes of the paths; path i is ``ends[i]`` to ``ends[i + 1]``.
    ends
        ``(N + 1,)``.
    starts_seconds
        ``(N,)``: start of the sample in its file.
    labels
        ``(N,)``: class index, -1 without a label.
    extents
        ``(N, 4)``: offset and size of video and audio in a shard, -1 if there is none.
    """

    paths: UInt8[Tensor, " bytes"]
    ends: Int64[Tensor, " files_and_one"]
    starts_seconds: Float64[Tensor, " files"]
    labels: Int64[Tensor, " files"]
    extents: Int64[Tensor, "files 4"]

    @classmethod
    def of(cls, manifest: Manifest) -> "FileTable":
        """Create the table from the manifest's columns; half a second for a million rows."""
        table = manifest.table
        # 64-bit offsets, because the paths of all chunks together may exceed 2 GiB.
        paths = table.column("path").cast(pa.large_string()).combine_chunks()
        text, ends = np.zeros(0, np.uint8), np.zeros(1, np.int64)
        if len(paths):
            _, offsets, data = paths.buffers()
            ends = np.frombuffer(offsets, np.int64)[paths.offset : paths.offset + len(paths) + 1]
            text = np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]
        labels = pc.index_in(table.column("label"), value_set=pa.array(manifest.classes(), pa.string()))
        extents = [
            table.column(f"{name}_{part}").fill_null(-1).to_numpy()
            for name in ("video", "audio")
            for part in ("offset", "size")
        ]
        return cls(
            torch.tensor(text),
            torch.tensor(ends - ends[0]),
            torch.tensor(table.column("start_seconds").fill_null(0.0).to_numpy()),
            torch.tensor(labels.fill_null(-1).to_numpy(), dtype=torch.int64),
            torch.tensor(np.stack(extents, axis=1)),
        )

    def path(self, sample_id: int) -> str:
        """Path of the file, or of the shard."""
        begin, end = self.ends[sample_id : sample_id + 2].tolist()
        return self.paths[begin:end].numpy().tobytes().decode()

    def source(self, sample_id: int) -> Path | PackedSample:
        """The source for `decode_clips`, as in ``MediaRecord.source``."""
        path, extents = self.path(sample_id), self.extents[sample_id].tolist()
        video, audio = (
            Extent(offset, size) if min(offset, size) >= 0 else None for offset, size in (extents[:2], extents[2:])
        )
        return Path(path) if video is None and audio is None else PackedSample(path, video, audio)


@dataclass(frozen=True)
class Windows:
    """The window of a file at each visit, and its substitutes: the part of a plan that workers need.

    Attributes
    ----------
    durations_seconds
        ``(N,)`` float64, for every row of the manifest.
    sample_ids
        ``(n,)`` int64: rows from which substitutes are drawn.
    length_seconds
        Length of a window.
    seed
        Seed of the run.
    """

    durations_seconds: Float64[Tensor, " files"]
    sample_ids: Int64[Tensor, " usable"]
    length_seconds: float
    seed: int

    def request(self, sample_id: int, visit: int) -> ClipRequest:
        """The window of a file at a visit. Takes about 30 microseconds, mostly to create the generator."""
        rng = seeded_rng(seeds.WINDOW, self.seed, visit, sample_id)
        start = random_start(self.durations_seconds[sample_id].item(), self.length_seconds, rng)
        return ClipRequest(sample_id, start, visit)

    def substitutes(self, sample_id: int, visit: int) -> Iterator[int]:
        """Sample ids to try, in this order, instead of one that cannot be decoded. They may repeat."""
        rng = seeded_rng(seeds.SUBSTITUTE, self.seed, visit, sample_id)
        for _ in range(_MOST_SUBSTITUTES):
            yield int(self.sample_ids[int(rng.integers(len(self.sample_ids)))])


@dataclass(frozen=True)
class TrainingPlan:
    """The windows of the batch of every step; a pure function of its fields.

    Each epoch visits all files in a new order, except the remainder that does not fill a batch, and takes
    ``clips_per_video`` windows of each.

    Parameters
    ----------
    manifest
        The files and their durations.
    sample_ids
        The rows to train on.
    length_seconds
        Length of a window.
    batch_size
        Clips per step, over all ranks.
    seed
        Seed of order, windows and substitutes.
    clips_per_video
        k: number of consecutive steps that share their files.

    Raises
    ------
    ValueError
        ``batch_size`` or ``clips_per_video`` is below 1, or there are fewer files than one batch needs.
    """

    manifest: Manifest
    sample_ids: tuple[int, ...]
    length_seconds: float
    batch_size: int
    seed: int
    clips_per_video: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "clips_per_video"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainingPlan: {name} must be at least 1, got {getattr(self, name)}")
        if len(self.sample_ids) < self.batch_size:
            raise ValueError(
                f"TrainingPlan: batch_size must be at most the number of usable files, "
                f"got {self.batch_size} with {len(self.sample_ids)} files"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in one pass over the files: ``clips_per_video`` for each full batch of files."""
        return len(self.sample_ids) // self.batch_size * self.clips_per_video

    def epoch(self, step: int) -> int:
        """The pass over the files that ``step`` (counted from 0) belongs to."""
        return step // self.steps_per_epoch

    def visit(self, step: int) -> int:
        """Number of earlier visits of the files of a step, which seeds their windows and augmentation.

        With ``clips_per_video`` of 1, it is the epoch.
        """
        return self.epoch(step) * self.clips_per_video + step % self.clips_per_video

    def files(self, step: int) -> NDArray[np.int64]:
        """Sample ids of a step's batch, ``(batch_size,)``: the same for the ``clips_per_video`` steps of a group."""
        place = step % self.steps_per_epoch // self.clips_per_video * self.batch_size
        order = epoch_order(self.seed, self.epoch(step), len(self.sample_ids))
        chosen: NDArray[np.int64] = self.windows.sample_ids.numpy()[order[place : place + self.batch_size]]
        return chosen

    def requests(self, step: int) -> list[ClipRequest]:
        """The ``batch_size`` windows of a step."""
        return [self.windows.request(sample_id, self.visit(step)) for sample_id in self.files(step).tolist()]

    @cached_property
    def windows(self) -> Windows:
        """The part of the plan that workers need."""
        durations = self.manifest.table.column("duration_seconds").to_numpy()
        return Windows(
            torch.tensor(durations, dtype=torch.float64),
            torch.tensor(self.sample_ids, dtype=torch.int64),
            self.length_seconds,
            self.seed,
        )


@lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order of an epoch. A million files take 20 ms and 8 MB, so only the current order is cached."""
    return seeded_rng(seeds.ORDER, seed, epoch).permutation(count)


def evaluation_requests(
    manifest: Manifest, sample_ids: Sequence[int], length_seconds: float, windows_per_file: int = 1
) -> list[ClipRequest]:
    """``windows_per_file`` windows spread evenly over each file, file after file."""
    durations = manifest.table.column("duration_seconds").to_numpy()
    return [
        ClipRequest(sample_id, start)
        for sample_id in sample_ids
        for start in spread_starts(float(durations[sample_id]), length_seconds, windows_per_file)
    ]


class CoveringPlan(Sequence[list[ClipRequest]]):
    """Batches of overlapping windows that cover whole files (`covering_starts`); each is created on access.

    Windows follow each other file after file. A file with more than ``batch_size`` windows is cut into parts of about
    equal size, with a batch for each. Short files share a batch as long as all of their windows fit in, so that a batch
    has more than half of ``batch_size`` on average.

    The windows that a file has in a batch are decoded together. Which ones these are depends on the file and the batch
    size alone: the noise that an AAC decoder adds to a clip is the same, whatever else is in the plan.

    Parameters
    ----------
    manifest
        The files and their durations.
    sample_ids
        The rows to cover, each once, in this order.
    length_seconds
        Length of a window.
    hop_seconds
        From the start of a window to that of the next.
    batch_size
        Most windows in a batch.

    Attributes
    ----------
    counts
        ``{sample id: number of its windows}``.

    Raises
    ------
    ValueError
        ``batch_size`` is below 1, a length is not positive, or ``hop_seconds`` exceeds ``length_seconds``.
    """

    def __init__(
        self,
        manifest: Manifest,
        sample_ids: Sequence[int],
        length_seconds: float,
        hop_seconds: float,
        batch_size: int,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"CoveringPlan: batch_size must be at least 1, got {batch_size}")
        self.manifest = manifest
        self._length_seconds, self._hop_seconds = length_seconds, hop_seconds
        self._sample_ids = np.asarray(sample_ids, np.int64)
        self._durations = manifest.table.column("duration_seconds").to_numpy()[self._sample_ids]
        counts = [covering_count(seconds, length_seconds, hop_seconds) for seconds in self._durations.tolist()]
        self.counts = dict(zip(self._sample_ids.tolist(), counts, strict=True))
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._cuts = _cuts(counts, batch_size)

    def __len__(self) -> int:
        return len(self._cuts) - 1

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        place = range(len(self))[place]
        return [self._request(number) for number in range(self._cuts[place], self._cuts[place + 1])]

    def _request(self, number: int) -> ClipRequest:
        file = int(np.searchsorted(self._ends, number, side="right"))
        if file:
            number -= int(self._ends[file - 1])
        start = covering_start(float(self._durations[file]), self._length_seconds, self._hop_seconds, number)
        return ClipRequest(int(self._sample_ids[file]), start)


def _cuts(counts: Sequence[int], batch_size: int) -> "array[int]":
    """Numbers of windows before each batch and after the last, for files with ``counts`` windows."""
    cuts, end, held = array("q", [0]), 0, 0
    for count in counts:
        parts = -(-count // batch_size)
        for part in range(parts):
            # Two parts of a file are together larger than a batch, so a batch never holds both.
            size = count * (part + 1) // parts - count * part // parts
            if held + size > batch_size:
                cuts.append(end)
                held = 0
            held, end = held + size, end + size
    if end:
        cuts.append(end)
    return cuts


def share_memory(tensors: Any) -> None:
    """Move the tensors of a dataclass to shared memory, which workers map instead of copying."""
    for field in dataclasses.fields(tensors):
        value = getattr(tensors, field.name)
        if isinstance(value, Tensor):
            value.share_memory_()
