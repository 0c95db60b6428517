"""The data of an ablation: a table of samples in memory, to train on and to measure.

A `Dataset` is drawn or decoded once and used by many runs. With the settings of a run it becomes a
`cmacc.pretraining.table.TableProblem`.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from cmacc.encoders import Modality
from cmacc.pretraining.learner import Learner
from cmacc.pretraining.table import Table


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
class Dataset(Table, Protocol):
    """A table of training samples with labels (-1: unknown), and held-out samples to measure."""

    in_float32: bool  # True if lower precision saves no time, as with small MLPs

    @property
    def held_out_labels(self) -> Int[Tensor, " held_out"]:
        """Labels of the held-out samples."""
        ...

    def measured(self, learner: Learner) -> Measured:
        """Outputs of the current encoders for all samples, without augmentation."""
        ...


def plain_rows(rows: Any) -> NDArray[np.float32]:
    """The rows as a float32 array on the CPU."""
    plain: NDArray[np.float32] = rows.float().cpu().numpy()
    return plain
