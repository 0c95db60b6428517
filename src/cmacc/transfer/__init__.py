"""Transfer: encoders, features, tasks, protocols, result cards, exports."""

from cmacc.pretraining.clip_encoder import (
    ClipEncoder,
    EncoderError,
    MatchingEncoder,
    Modality,
    ProjectedEncoder,
    SpatialEncoder,
    TextEncoder,
)
from cmacc.pretraining.cmacc_encoder import CmaccEncoder
from cmacc.pretraining.features import Features, embed, weights_hash
from cmacc.transfer.adapters import LogMelStatistics, TowerEncoder
from cmacc.transfer.beside import beside_published
from cmacc.transfer.card import Card, CardError, DataFacts, EncoderFacts, Result
from cmacc.transfer.compare import compared, markdown, results_table
from cmacc.transfer.evaluate import DEFAULT_PROTOCOLS, EvaluateOptions, evaluate
from cmacc.transfer.export import Exported, ExportError, export_run, push, read_export
from cmacc.transfer.finetune import (
    FinetuneConfig,
    Finetuned,
    FinetuneError,
    FinetuneFiles,
    FinetuneSettings,
    finetune,
)
from cmacc.transfer.metrics import Metric, ProtocolError
from cmacc.transfer.open import OpenedEncoder, card_of_run, load_pair, open_encoder
from cmacc.transfer.pretrained import PretrainedEncoder
from cmacc.transfer.protocols import Rows, ranks
from cmacc.transfer.published import PUBLISHED_TASKS, PublishedResult, published_results
from cmacc.transfer.recipes import RECIPES, ProtocolName, Recipe
from cmacc.transfer.stages import losses_in_words
from cmacc.transfer.tasks import TaskError, TaskName
from cmacc.transfer.text import DEFAULT_PROMPTS, encode_text, text_modalities

__all__ = [
    "DEFAULT_PROMPTS",
    "DEFAULT_PROTOCOLS",
    "PUBLISHED_TASKS",
    "RECIPES",
    "Card",
    "CardError",
    "ClipEncoder",
    "CmaccEncoder",
    "DataFacts",
    "EncoderError",
    "EncoderFacts",
    "EvaluateOptions",
    "ExportError",
    "Exported",
    "Features",
    "FinetuneConfig",
    "FinetuneError",
    "FinetuneFiles",
    "FinetuneSettings",
    "Finetuned",
    "LogMelStatistics",
    "MatchingEncoder",
    "Metric",
    "Modality",
    "OpenedEncoder",
    "PretrainedEncoder",
    "ProjectedEncoder",
    "ProtocolError",
    "ProtocolName",
    "PublishedResult",
    "Recipe",
    "Result",
    "Rows",
    "SpatialEncoder",
    "TaskError",
    "TaskName",
    "TextEncoder",
    "TowerEncoder",
    "beside_published",
    "card_of_run",
    "compared",
    "embed",
    "encode_text",
    "evaluate",
    "export_run",
    "finetune",
    "load_pair",
    "losses_in_words",
    "markdown",
    "open_encoder",
    "published_results",
    "push",
    "ranks",
    "read_export",
    "results_table",
    "text_modalities",
    "weights_hash",
]
