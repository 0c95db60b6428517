"""Samples in memory as a training problem: random or active batches of the rows of a table."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from cmacc.clips.loading.plan import epoch_order
from cmacc.encoders import EncoderPair
from cmacc.pretraining.config import PretrainConfig
from cmacc.pretraining.memory import SampleMemory
from cmacc.pretraining.problem import Batch, Views
from cmacc.pretraining.processes import Processes


@runtime_checkable
class Table(Protocol):
    """Training samples with ids 0..samples-1 and labels (-1: unknown)."""

    @property
    def labels(self) -> Int[Tensor, " samples"]:
        """Labels of the samples."""
        ...

    def encoder(self, config: PretrainConfig) -> EncoderPair:
        """Untrained encoders for these samples."""
        ...

    def views(self, config: PretrainConfig) -> Views:
        """How batches become inputs of the encoders."""
        ...

    def batch(self, sample_ids: Int[Tensor, " batch"]) -> Batch:
        """A batch of these samples."""
        ...


class TableProblem:
    """A table with the settings of a run: encoders, views, and the order of the samples.

    Raises
    ------
    ValueError
        There are fewer samples than a batch needs.
    """

    def __init__(self, table: Table, config: PretrainConfig, device: torch.device) -> None:
        self._table, self._config = table, config
        self._count, self._size = len(table.labels), config.optim.batch_size
        processes = Processes.current(device)
        self._part = processes.part(self._size)
        if self._count < self._size:
            raise ValueError(f"optim.batch_size must be at most the {self._count} training samples, got {self._size}")
        self.views = table.views(config)
        self.memory = (
            SampleMemory(self._count, config.encoder.embedding_size, config.batches, self._size, config.seed, processes)
            if config.batches.selector == "active"
            else None
        )
        self.labels: Tensor = table.labels.to(device)

    def encoder(self) -> EncoderPair:
        """The table's untrained encoders."""
        return self._table.encoder(self._config)

    def visit(self, step: int) -> int:
        """The epoch."""
        return step // (self._count // self._size)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """This process's part of batches in the order of the epoch, which depends on seed and memory.

        Incomplete batches are dropped.
        """
        for step in range(first_step, last_step):
            place = step % (self._count // self._size) * self._size
            rows = self._order(step)[place : place + self._size][self._part]
            yield self._table.batch(torch.from_numpy(rows.copy()))

    def _order(self, step: int) -> NDArray[np.int64]:
        if self.memory is not None:
            return self.memory.order_of(self.visit(step))
        return epoch_order(self._config.seed, self.visit(step), self._count)
