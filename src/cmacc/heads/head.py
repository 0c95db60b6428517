"""What a head is, and where its items come from."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

_LEAST_DEVIATION = 1e-6

Rows = Mapping[str, Tensor]
"""Named tensors that have one row for each item."""


class HeadError(ValueError):
    """Data or settings with which a head cannot be trained; the message states what was required and what was got."""


class Head(nn.Module, ABC):
    """A small network on features: a loss to train it with, and its predictions."""

    @abstractmethod
    def loss(self, rows: Rows, progress: float) -> Tensor:
        """The loss of a batch, a scalar.

        Parameters
        ----------
        rows
            Inputs and targets of the batch.
        progress
            Share of the epochs that are done, in [0, 1), for heads that change while they are trained.
        """

    @abstractmethod
    def predict(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        """Predictions for a batch, by name, one row per item; in evaluation mode.

        Parameters
        ----------
        rows
            Inputs of the batch.
        progress
            That of the epoch in which the weights were trained.
        """


@runtime_checkable
class Items(Protocol):
    """Items in memory or on disk, read by the batch."""

    def __len__(self) -> int:
        """Number of items."""

    def rows(self, ids: Sequence[int]) -> Rows:
        """Inputs and targets of some items, in that order."""


class ItemsInMemory:
    """Items whose rows are in memory.

    Parameters
    ----------
    columns
        Named tensors with one row per item.

    Raises
    ------
    HeadError
        There are no columns, or their numbers of rows differ.
    """

    def __init__(self, columns: Rows) -> None:
        counts = {name: len(column) for name, column in columns.items()}
        if len(set(counts.values())) != 1:
            raise HeadError(f"columns: must all have the same number of rows, got {counts or 'no column'}")
        self.columns = dict(columns)
        self._count = next(iter(counts.values()))

    def __len__(self) -> int:
        return self._count

    def rows(self, ids: Sequence[int]) -> Rows:
        """The columns of those items."""
        index = torch.as_tensor(ids, dtype=torch.int64)
        return {name: column[index] for name, column in self.columns.items()}


def feature_statistics(
    features: Float[Tensor, "rows width"],
) -> tuple[Float[Tensor, " width"], Float[Tensor, " width"]]:
    """Mean and standard deviation of each feature, in float64; 1 for the deviation of a constant one."""
    exact = features.double()
    deviation = exact.std(0, correction=0)
    # Of a constant feature, rounding leaves about 1e-7 of its size.
    constant = deviation <= _LEAST_DEVIATION * exact.abs().amax(0)
    return exact.mean(0), deviation.masked_fill(constant, 1.0)
