"""Clips to embeddings: video and audio backbones, projection heads, the pair, the momentum copy."""

from cmacc.encoders.momentum import momentum_copy, update_momentum
from cmacc.encoders.pair import AudioVisualEncoder, Encoder, EncoderConfig, EncoderPair, Encoding

__all__ = [
    "AudioVisualEncoder",
    "Encoder",
    "EncoderConfig",
    "EncoderPair",
    "Encoding",
    "momentum_copy",
    "update_momentum",
]
