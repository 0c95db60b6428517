"""Checkpoint to results: encoders, features, tasks, protocols, result cards."""

from cmacc.transfer.card import Card, CardError, Provenance, Result
from cmacc.transfer.encoder import EncoderSource, open_encoder
from cmacc.transfer.evaluate import evaluate
from cmacc.transfer.features import Features, embed
from cmacc.transfer.protocols import Metric, knn, linear_probe, retrieval, retrieval_ranks
from cmacc.transfer.tasks import LabelledTask, PairsTask, TaskError, TaskName, build_task

__all__ = [
    "Card",
    "CardError",
    "EncoderSource",
    "Features",
    "LabelledTask",
    "Metric",
    "PairsTask",
    "Provenance",
    "Result",
    "TaskError",
    "TaskName",
    "build_task",
    "embed",
    "evaluate",
    "knn",
    "linear_probe",
    "open_encoder",
    "retrieval",
    "retrieval_ranks",
]
