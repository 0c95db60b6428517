"""Encoders from clips to embeddings: backbones, towers, projection heads, the encoder pair, the momentum copy."""

from cmacc.encoders.backbone import Backbone
from cmacc.encoders.execution import (
    CompilerError,
    activations_kept,
    checkpoint_activations,
    compile_backbones,
    require_compiler,
)
from cmacc.encoders.modality import MODALITIES, Modality
from cmacc.encoders.momentum import momentum_copy, unwrapped, update_momentum
from cmacc.encoders.norm import WholeBatchNorm, saved_statistics, statistics_held, statistics_kept
from cmacc.encoders.pair import (
    AudioVisualEncoder,
    Encoder,
    EncoderConfig,
    EncoderPair,
    Encoding,
)
from cmacc.encoders.towers import TowerError, TowerInput, download_tower, is_tower, open_tower, trusting_code
from cmacc.encoders.training import check_train_mode, release, set_trained

__all__ = [
    "MODALITIES",
    "AudioVisualEncoder",
    "Backbone",
    "CompilerError",
    "Encoder",
    "EncoderConfig",
    "EncoderPair",
    "Encoding",
    "Modality",
    "TowerError",
    "TowerInput",
    "WholeBatchNorm",
    "activations_kept",
    "check_train_mode",
    "checkpoint_activations",
    "compile_backbones",
    "download_tower",
    "is_tower",
    "momentum_copy",
    "open_tower",
    "release",
    "require_compiler",
    "saved_statistics",
    "set_trained",
    "statistics_held",
    "statistics_kept",
    "trusting_code",
    "unwrapped",
    "update_momentum",
]
