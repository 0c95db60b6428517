"""What objectives are given in these tests, in place of clips and encoders."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NO_EMBEDDING = torch.zeros(0)


@dataclass(frozen=True)
class Views:
    """A batch. Another view is the first one plus 1; a sample's generator depends on the seed and its id alone."""

    inputs: Mapping[str, Tensor]
    sample_ids: tuple[int, ...] | None = None
    seed: int = 0

    def another(self, modality: str) -> Tensor:
        return self.inputs[modality] + 1

    def plain(self, modality: str) -> Tensor:
        return self.inputs[modality]

    def generators(self, term: str) -> list[np.random.Generator]:
        ids = self.sample_ids or range(len(next(iter(self.inputs.values()))))
        return [np.random.default_rng([self.seed, sample_id]) for sample_id in ids]


@dataclass(frozen=True)
class Embedded:
    """An encoder's output. Its feature is its embedding, where nothing else is given."""

    embedding: Tensor = NO_EMBEDDING
    backbone_feature: Tensor | None = None
    feature_map: Tensor | None = None

    @property
    def feature(self) -> Tensor:
        return self.embedding if self.backbone_feature is None else self.backbone_feature

    @property
    def penultimate(self) -> Tensor:
        return self.feature
