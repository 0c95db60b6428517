"""Encoders from clips to embeddings: backbones, projection heads, the encoder pair, the momentum copy."""

from cmacc.encoders.backbone import Backbone
from cmacc.encoders.modality import MODALITIES, Modality
from cmacc.encoders.momentum import momentum_copy, unwrapped, update_momentum
from cmacc.encoders.pair import (
    AudioVisualEncoder,
    Encoder,
    EncoderConfig,
    EncoderPair,
    Encoding,
)

__all__ = [
    "MODALITIES",
    "AudioVisualEncoder",
    "Backbone",
    "Encoder",
    "EncoderConfig",
    "EncoderPair",
    "Encoding",
    "Modality",
    "momentum_copy",
    "unwrapped",
    "update_momentum",
]
