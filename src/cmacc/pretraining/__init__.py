"""Config, the step, the loop, checkpoints."""

from cmacc.pretraining.checkpoint import CheckpointError, last_checkpoint, load_encoder
from cmacc.pretraining.config import (
    ConfigError,
    DataConfig,
    DictionaryConfig,
    ObjectiveConfig,
    OptimConfig,
    PretrainConfig,
    read_config,
    to_plain,
)
from cmacc.pretraining.learner import untrained_encoder
from cmacc.pretraining.loop import RunError, RunOutcome, autocast_dtype, pretrain, start_run

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
    "last_checkpoint",
    "load_encoder",
    "pretrain",
    "read_config",
    "start_run",
    "to_plain",
    "untrained_encoder",
]
