"""Encoders from clips to embeddings: backbones, projection heads, the encoder pair, the momentum copy."""

from cmacc.encoders.backbone import Backbone
from cmacc.encoders.momentum import momentum_copy, unwrapped, update_momentum
from cmacc.encoders.pair import (
    MODALITIES,
    AudioVisualEncoder,
    Encoder,
    EncoderConfig,
    EncoderPair,
    Encoding,
    Modality,
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
