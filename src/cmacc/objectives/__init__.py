"""Losses on embeddings and negatives."""

from cmacc.objectives.bidirectional import BatchKeys, BidirectionalContrast
from cmacc.objectives.crossmodal import CrossModalContrast, DirectionLoss
from cmacc.objectives.objective import (
    BatchViews,
    DrawingObjective,
    Drawn,
    Encoded,
    ExtraInput,
    Negatives,
    Objective,
    ObjectiveInputs,
    ObjectiveResult,
    WeightedObjectives,
)
from cmacc.objectives.terms import Terms

__all__ = [
    "BatchKeys",
    "BatchViews",
    "BidirectionalContrast",
    "CrossModalContrast",
    "DirectionLoss",
    "DrawingObjective",
    "Drawn",
    "Encoded",
    "ExtraInput",
    "Negatives",
    "Objective",
    "ObjectiveInputs",
    "ObjectiveResult",
    "Terms",
    "WeightedObjectives",
]
