"""The data of an ablation: a table of samples in memory, to train on and to measure.

A `Dataset` is drawn or decoded once and used by many runs. With the settings of a run it becomes a `TableProblem` for
`cmacc.pretraining.Trainer`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from cmacc.clips.loading.plan import epoch_order
from cmacc.encoders import EncoderPair, Modality
from cmacc.pretraining import Batch, PretrainConfig, SampleMemory, Views
from cmacc.pretraining.learner import Learner


@dataclass(frozen=True)
class Measured:
    """Outputs of frozen encoders for both parts of a data set.

    Attributes
    ----------
    features
        Backbone features ``(n, f)`` of the training and of the held-out samples, by modality.
    matched
        Embeddings ``(n, d)`` of the held-out samples, by modality.
    """

    features: dict[Modality, tuple[NDArray[np.float32], NDArray[np.float32]]]
    matched: dict[Modality, NDArray[np.float32]]


@runtime_checkable
class Dataset(Protocol):
    """Training samples 0..samples-1 with labels (-1: unknown), and held-out samples."""

    in_float32: bool  # True if lower precision saves no time, as with small MLPs

    @property
    def labels(self) -> Int[Tensor, " samples"]:
        """Labels of the training samples."""
        ...

    @property
    def held_out_labels(self) -> Int[Tensor, " held_out"]:
        """Labels of the held-out samples."""
        ...

    def encoder(self, config: PretrainConfig) -> EncoderPair:
        """Untrained encoders for these samples."""
        ...

    def views(self, config: PretrainConfig) -> Views:
        """How batches become inputs of the encoders."""
        ...

    def batch(self, sample_ids: Int[Tensor, " batch"]) -> Batch:
        """A batch of these training samples."""
        ...

    def measured(self, learner: Learner) -> Measured:
        """Outputs of the current encoders for all samples, without augmentation."""
        ...


class TableProblem:
    """A data set with the settings of a run: encoders, views and order of the samples.

    Raises
    ------
    ValueError
        There are fewer samples than a batch needs.
    """

    def __init__(self, dataset: Dataset, config: PretrainConfig, device: torch.device) -> None:
        self._dataset, self._config = dataset, config
        self._count, self._size = len(dataset.labels), config.optim.batch_size
        if self._count < self._size:
            raise ValueError(f"optim.batch_size must be at most the {self._count} training samples, got {self._size}")
        self.views = dataset.views(config)
        self.memory = (
            SampleMemory(self._count, config.encoder.embedding_size, config.batches, self._size, config.seed)
            if config.batches.selector == "active"
            else None
        )
        self.labels: Tensor = dataset.labels.to(device)

    def encoder(self) -> EncoderPair:
        """The data set's untrained encoders."""
        return self._dataset.encoder(self._config)

    def visit(self, step: int) -> int:
        """The epoch."""
        return step // (self._count // self._size)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Batches in the order of the epoch, which depends on seed and memory. Incomplete batches are dropped."""
        for step in range(first_step, last_step):
            place = step % (self._count // self._size) * self._size
            yield self._dataset.batch(torch.from_numpy(self._order(step)[place : place + self._size].copy()))

    def _order(self, step: int) -> NDArray[np.int64]:
        if self.memory is not None:
            return self.memory.order_of(self.visit(step))
        return epoch_order(self._config.seed, self.visit(step), self._count)


def plain_rows(rows: Any) -> NDArray[np.float32]:
    """The rows as a float32 array on the CPU."""
    plain: NDArray[np.float32] = rows.float().cpu().numpy()
    return plain
