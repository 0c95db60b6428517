"""What is learnt, as the engine sees it: batches by step, and how they become the encoders' inputs.

`Trainer` and `training_step` know of clips no more than these protocols. `ClipStream` is the problem of ``cmacc
pretrain``; an ablation has vectors and decoded clips; one's own is some forty lines (examples/04_own_problem.py).
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from cmacc.encoders import EncoderPair, Modality
from cmacc.pretraining.memory import SampleMemory


@runtime_checkable
class Batch(Protocol):
    """M samples, of a kind that the problem's `Views` know: clips, or pairs of anything."""

    @property
    def sample_ids(self) -> Tensor:
        """``(M,)`` int64."""
        ...

    @property
    def labels(self) -> Tensor:
        """``(M,)`` int64, -1 where unknown; for figures only."""
        ...

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        ...


@runtime_checkable
class Views(Protocol):
    """The inputs of the encoders, from batches of some kind; all randomness is by sample."""

    def of(self, batch: Any, visit: int) -> dict[Modality, Tensor]:
        """The encoders' inputs by modality; ``visit``, how often the samples were due before, seeds them."""
        ...

    def kept(self, batch: Any, visit: int) -> dict[str, Tensor]:
        """What it takes to make the same views again, compact, a row a sample."""
        ...

    def again(self, modality: Modality, kept: Callable[[str], Tensor]) -> Tensor:
        """One encoder's inputs, from what was kept by name."""
        ...


@runtime_checkable
class Problem(Protocol):
    """Samples with ids from 0 on, their order, and the encoders that fit them."""

    @property
    def views(self) -> Views:
        """How a batch becomes the encoders' inputs."""
        ...

    @property
    def labels(self) -> Tensor:
        """``(samples,)`` int64 class of every sample id, -1 where unknown; for figures only."""
        ...

    @property
    def memory(self) -> SampleMemory | None:
        """What the problem puts batches together by, which the step keeps up to date; None where it does not choose."""
        ...

    def encoder(self) -> EncoderPair:
        """Untrained encoders; their weights depend on the run's seed alone."""
        ...

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """The batches of the steps ``first_step <= step < last_step``, the same wherever one begins."""
        ...

    def visit(self, step: int) -> int:
        """How often the samples of a step's batch were due before."""
        ...
