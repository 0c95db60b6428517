"""Losses on embeddings and negatives."""

from cmacc.objectives.bidirectional import BatchKeys, BidirectionalContrast
from cmacc.objectives.crossmodal import CrossModalContrast, DirectionLoss
from cmacc.objectives.objective import (
    Encoded,
    Negatives,
    Objective,
    ObjectiveInputs,
    ObjectiveResult,
    WeightedObjectives,
)

__all__ = [
    "BatchKeys",
    "BidirectionalContrast",
    "CrossModalContrast",
    "DirectionLoss",
    "Encoded",
    "Negatives",
    "Objective",
    "ObjectiveInputs",
    "ObjectiveResult",
    "WeightedObjectives",
]
