"""Towers: other people's encoders as backbones, by name: torchvision, timm, transformers, ONNX graphs, own modules."""

from cmacc.encoders.towers.open import absolute_tower, download_tower, is_tower, open_tower, tower_files, tower_modality
from cmacc.encoders.towers.text import TextSides, TextTower, has_text_side, open_text_tower
from cmacc.encoders.towers.tower import FramePooling, FramePoolingName, Tower, TowerError, TowerInput, VideoTower
from cmacc.encoders.towers.trust import trusting_code

__all__ = [
    "FramePooling",
    "FramePoolingName",
    "TextSides",
    "TextTower",
    "Tower",
    "TowerError",
    "TowerInput",
    "VideoTower",
    "absolute_tower",
    "download_tower",
    "has_text_side",
    "is_tower",
    "open_text_tower",
    "open_tower",
    "tower_files",
    "tower_modality",
    "trusting_code",
]
