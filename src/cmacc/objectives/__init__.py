"""Losses on embeddings and negatives."""

from cmacc.objectives.bidirectional import BatchKeys, BidirectionalContrast
from cmacc.objectives.crossclr import CrossCLR, CrossCLRConfig
from cmacc.objectives.crossmodal import CrossModalContrast, DirectionLoss
from cmacc.objectives.ctp import CatchThePatch, CatchThePatchConfig
from cmacc.objectives.face import FaceConfig, FaceReconstruction
from cmacc.objectives.masked_audio import MaskedAudio, MaskedAudioConfig
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
from cmacc.objectives.stica import STiCA, STiCAConfig
from cmacc.objectives.terms import NEEDS, TermNeeds, Terms
from cmacc.objectives.within_modal import WithinModalConfig, WithinModalContrast

__all__ = [
    "NEEDS",
    "BatchKeys",
    "BatchViews",
    "BidirectionalContrast",
    "CatchThePatch",
    "CatchThePatchConfig",
    "CrossCLR",
    "CrossCLRConfig",
    "CrossModalContrast",
    "DirectionLoss",
    "DrawingObjective",
    "Drawn",
    "Encoded",
    "ExtraInput",
    "FaceConfig",
    "FaceReconstruction",
    "MaskedAudio",
    "MaskedAudioConfig",
    "Negatives",
    "Objective",
    "ObjectiveInputs",
    "ObjectiveResult",
    "STiCA",
    "STiCAConfig",
    "TermNeeds",
    "Terms",
    "WeightedObjectives",
    "WithinModalConfig",
    "WithinModalContrast",
]
