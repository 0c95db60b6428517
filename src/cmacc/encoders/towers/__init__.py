"""Towers: other people's encoders as backbones, by name: torchvision, timm, transformers, ONNX graphs, own modules."""

from cmacc.encoders.towers.open import download_tower, is_tower, open_tower, tower_files
from cmacc.encoders.towers.tower import FramePooling, FramePoolingName, Tower, TowerError, TowerInput
from cmacc.encoders.towers.trust import trusting_code

__all__ = [
    "FramePooling",
    "FramePoolingName",
    "Tower",
    "TowerError",
    "TowerInput",
    "download_tower",
    "is_tower",
    "open_tower",
    "tower_files",
    "trusting_code",
]
