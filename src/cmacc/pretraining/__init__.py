"""Config, the step, the loop, checkpoints."""

from cmacc.pretraining.checkpoint import CheckpointError, last_checkpoint, load_encoder
from cmacc.pretraining.config import (
    ConfigError,
    DataConfig,
    DictionaryConfig,
    ObjectiveConfig,
    OptimConfig,
    PretrainConfig,
    config_from_plain,
    read_config,
    to_plain,
)
from cmacc.pretraining.learner import untrained_encoder
from cmacc.pretraining.loop import RunError, RunOutcome, autocast_dtype, learning_rate, pretrain, start_run
from cmacc.pretraining.provenance import Provenance, code_version, config_hash

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataConfig",
    "DictionaryConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PretrainConfig",
    "Provenance",
    "RunError",
    "RunOutcome",
    "autocast_dtype",
    "code_version",
    "config_from_plain",
    "config_hash",
    "last_checkpoint",
    "learning_rate",
    "load_encoder",
    "pretrain",
    "read_config",
    "start_run",
    "to_plain",
    "untrained_encoder",
]
