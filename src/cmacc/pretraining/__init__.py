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

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataConfig",
    "DictionaryConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PretrainConfig",
    "RunError",
    "RunOutcome",
    "autocast_dtype",
    "config_from_plain",
    "last_checkpoint",
    "learning_rate",
    "load_encoder",
    "pretrain",
    "read_config",
    "start_run",
    "to_plain",
    "untrained_encoder",
]
