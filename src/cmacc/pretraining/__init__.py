"""Pretraining: settings, the training engine and its step, run folders, checkpoints, provenance."""

from cmacc.pretraining.checkpoint import load_encoder, trained_encoder
from cmacc.pretraining.checkpoint_files import (
    CheckpointError,
    best_checkpoint,
    checkpoint_at,
    last_checkpoint,
    mark_best,
    run_of,
)
from cmacc.pretraining.clip_stream import RunError
from cmacc.pretraining.config import (
    BatchesConfig,
    DataConfig,
    DictionaryConfig,
    OptimConfig,
    PretrainConfig,
    TrainConfig,
)
from cmacc.pretraining.config_error import ConfigError
from cmacc.pretraining.config_files import config_from_plain, read_config, to_plain
from cmacc.pretraining.learner import autocast_dtype, default_device, untrained_encoder
from cmacc.pretraining.memory import SampleMemory
from cmacc.pretraining.objective_config import ObjectiveConfig
from cmacc.pretraining.optimization import learning_rate
from cmacc.pretraining.problem import Batch, ManyViews, Problem, Views
from cmacc.pretraining.processes import Processes
from cmacc.pretraining.provenance import Provenance, code_version, config_hash, read_provenance
from cmacc.pretraining.run import RunOutcome, pretrain
from cmacc.pretraining.run_folder import change_on_resume, require_free, require_one_process, start_run
from cmacc.pretraining.step import DivergenceError
from cmacc.pretraining.trainer import TrainedStep, Trainer

__all__ = [
    "Batch",
    "BatchesConfig",
    "CheckpointError",
    "ConfigError",
    "DataConfig",
    "DictionaryConfig",
    "DivergenceError",
    "ManyViews",
    "ObjectiveConfig",
    "OptimConfig",
    "PretrainConfig",
    "Problem",
    "Processes",
    "Provenance",
    "RunError",
    "RunOutcome",
    "SampleMemory",
    "TrainConfig",
    "TrainedStep",
    "Trainer",
    "Views",
    "autocast_dtype",
    "best_checkpoint",
    "change_on_resume",
    "checkpoint_at",
    "code_version",
    "config_from_plain",
    "config_hash",
    "default_device",
    "last_checkpoint",
    "learning_rate",
    "load_encoder",
    "mark_best",
    "pretrain",
    "read_config",
    "read_provenance",
    "require_free",
    "require_one_process",
    "run_of",
    "start_run",
    "to_plain",
    "trained_encoder",
    "untrained_encoder",
]
