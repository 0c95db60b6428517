"""What the terms of an objective may draw from a batch before it is encoded."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from cmacc.clips import seeds
from cmacc.clips.seeds import seeded_rng
from cmacc.encoders import Modality
from cmacc.objectives import DrawingObjective, Drawn
from cmacc.pretraining.learner import Learner
from cmacc.pretraining.problem import Batch, ManyViews, Views


@dataclass(frozen=True)
class ViewsOfBatch:
    """This process's part of a batch, as `cmacc.objectives.BatchViews` describes it."""

    views: Views
    batch: Batch
    visit: int
    seed: int
    inputs: Mapping[str, Tensor]

    def another(self, modality: Any) -> Tensor:
        """Another augmented view of the same samples."""
        return self._many().another(modality, self.batch, self.visit)

    def plain(self, modality: Any) -> Tensor:
        """The inputs without augmentation."""
        return self._many().plain(modality, self.batch, self.visit)

    def generators(self, term: str) -> list[np.random.Generator]:
        """One for each sample. The name of the term keeps the draws of two terms apart."""
        name = zlib.crc32(term.encode())
        return [
            seeded_rng(seeds.OBJECTIVE, self.seed, self.visit, sample_id, name)
            for sample_id in self.batch.sample_ids.tolist()
        ]

    def _many(self) -> ManyViews:
        if not isinstance(self.views, ManyViews):
            raise TypeError(
                "Trainer: the problem's views must have the methods `another` and `plain` (ManyViews) for an objective "
                f"that asks for more views, got {type(self.views).__name__}"
            )
        return self.views


def draw_for(learner: Learner, batch: Batch, visit: int, inputs: Mapping[Modality, Tensor]) -> Drawn:
    """What the learner's objective draws; nothing for one that only needs the queries.

    With ``data.shuffle_pairs``, the targets are those of other samples of the batch.
    """
    if not isinstance(learner.objective, DrawingObjective):
        return Drawn()
    by_name = {str(modality): rows for modality, rows in inputs.items()}
    drawn = learner.objective.draw(ViewsOfBatch(learner.views, batch, visit, learner.config.seed, by_name))
    if not learner.config.data.shuffle_pairs:
        return drawn
    # By two: by one, pictures would stand beside the audio that takes their place.
    return Drawn(drawn.inputs, {name: rows.roll(2, dims=0) for name, rows in drawn.given.items()})
