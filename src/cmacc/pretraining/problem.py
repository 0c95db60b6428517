"""The interface between the training engine and the data: batches by step, and how they become inputs of the encoders.

`Trainer` and `training_step` only use these protocols. `ClipStream` is the problem of ``cmacc pretrain``; ablations use
vectors and decoded clips; your own problem takes about forty lines (examples/04_own_problem.py).
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from cmacc.encoders import EncoderPair, Modality
from cmacc.pretraining.memory import SampleMemory


@runtime_checkable
class Batch(Protocol):
    """Samples of any kind that the problem's `Views` can handle, such as clips."""

    @property
    def sample_ids(self) -> Tensor:
        """``(M,)`` int64."""
        ...

    @property
    def labels(self) -> Tensor:
        """``(M,)`` int64, -1 if unknown; only used for metrics."""
        ...

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        ...


@runtime_checkable
class Views(Protocol):
    """Turns batches into inputs of the encoders. All randomness is seeded per sample."""

    def of(self, batch: Any, visit: int) -> dict[Modality, Tensor]:
        """Inputs of the encoders by modality, seeded by ``visit``, the number of earlier visits of the samples."""
        ...

    def kept(self, batch: Any, visit: int) -> dict[str, Tensor]:
        """Compact tensors, one row per sample, from which `again` makes the same views."""
        ...

    def again(self, modality: Modality, kept: Callable[[str], Tensor]) -> Tensor:
        """Inputs of one encoder, from kept tensors by their names."""
        ...


@runtime_checkable
class ManyViews(Views, Protocol):
    """Views that also serve the terms of an objective that need more inputs or targets, see `BatchViews`."""

    def another(self, modality: Modality, batch: Any, visit: int) -> Tensor:
        """Another augmented view of the batch."""
        ...

    def plain(self, modality: Modality, batch: Any, visit: int) -> Tensor:
        """The inputs of the encoder without augmentation."""
        ...


@runtime_checkable
class Problem(Protocol):
    """Samples with ids from 0, their order, and the encoders for them."""

    @property
    def views(self) -> Views:
        """How a batch becomes inputs of the encoders."""
        ...

    @property
    def labels(self) -> Tensor:
        """``(samples,)`` int64 class of every sample id, -1 if unknown; only used for metrics."""
        ...

    @property
    def memory(self) -> SampleMemory | None:
        """Embeddings for active batches, which the step keeps up to date; None if batches are random."""
        ...

    def encoder(self) -> EncoderPair:
        """Untrained encoders, whose weights only depend on the run's seed."""
        ...

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """The batches of the steps ``first_step <= step < last_step``. A batch must not depend on ``first_step``.

        With several processes, this process's part of each batch (`Processes.part`).
        """
        ...

    def visit(self, step: int) -> int:
        """Number of earlier visits of the samples in the batch of a step."""
        ...
