"""Embeddings and negatives to loss."""

from cmacc.objectives.crossmodal import CrossModalContrast, DirectionLoss

__all__ = ["CrossModalContrast", "DirectionLoss"]
