"""What is learnt in an ablation: a table of samples that all lie in memory, trained on and measured.

A `Dataset` is drawn or decoded once and serves many runs; with a run's settings it becomes a `TableProblem`, which
`cmacc.pretraining.Trainer` drives.
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
    """Frozen encoders on both parts of a data set.

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

    in_float32: bool  # whether lower precision would only cost digits: perceptrons have no work that it saves

    @property
    def labels(self) -> Int[Tensor, " samples"]:
        """Of the training samples."""
        ...

    @property
    def held_out_labels(self) -> Int[Tensor, " held_out"]:
        """Of the held-out samples."""
        ...

    def encoder(self, config: PretrainConfig) -> EncoderPair:
        """Untrained encoders that fit."""
        ...

    def views(self, config: PretrainConfig) -> Views:
        """How batches become their inputs."""
        ...

    def batch(self, sample_ids: Int[Tensor, " batch"]) -> Batch:
        """These training samples."""
        ...

    def measured(self, learner: Learner) -> Measured:
        """The encoders of the moment on all samples, nothing drawn."""
        ...


class TableProblem:
    """A data set with a run's settings: its encoders, views and order of samples.

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
        """The data set's."""
        return self._dataset.encoder(self._config)

    def visit(self, step: int) -> int:
        """The epoch."""
        return step // (self._count // self._size)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Every epoch in an order of its own, by the seed and the memory, less what does not fill a batch."""
        for step in range(first_step, last_step):
            place = step % (self._count // self._size) * self._size
            yield self._dataset.batch(torch.from_numpy(self._order(step)[place : place + self._size].copy()))

    def _order(self, step: int) -> NDArray[np.int64]:
        if self.memory is not None:
            return self.memory.order_of(self.visit(step))
        return epoch_order(self._config.seed, self.visit(step), self._count)


def plain_rows(rows: Any) -> NDArray[np.float32]:
    """On the CPU, in float32."""
    plain: NDArray[np.float32] = rows.float().cpu().numpy()
    return plain
