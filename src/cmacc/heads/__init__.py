"""Heads: small networks on features, for the tasks of the neighbouring systems."""

from cmacc.heads.ave import AveData, AveFacts, read_ave
from cmacc.heads.ave_features import AveFeatures, read_ave_features, read_background_features
from cmacc.heads.ave_hdf5 import AveError
from cmacc.heads.cace_net import CaceNet, CaceNetConfig
from cmacc.heads.cmbs import Cmbs, CmbsConfig, WeakCmbs, WeakCmbsConfig
from cmacc.heads.emotion import EmotionChoice, emotion_task
from cmacc.heads.emotion_names import EmotionError, EmotionSet, Performance, performance_of
from cmacc.heads.event_attention import StreamConfig
from cmacc.heads.event_linear import EventLinear, EventLinearConfig
from cmacc.heads.event_recipes import EVENT_RECIPES, EventProtocol, EventRecipe
from cmacc.heads.event_task import EventOptions, evaluate_events
from cmacc.heads.fit import FitConfig, Fitted, fit, predictions, seeded_head
from cmacc.heads.fusion import FusionConfig, FusionError, FusionHead, FusionMethod, FusionTask
from cmacc.heads.fusion_task import FusionOptions, evaluate_fusion
from cmacc.heads.head import Head, HeadError, Items, ItemsInMemory, Rows
from cmacc.heads.instrument_files import instruments_task
from cmacc.heads.instrument_ontology import InstrumentError, sound_triplets, tree_distances
from cmacc.heads.segment_accuracy import (
    EventError,
    classes_per_second,
    event_auroc,
    gated_classes,
    released_weak_classes,
    segment_accuracy,
)
from cmacc.heads.sentiment_metrics import SentimentMetricsError, class_metrics, emotion_metrics, sentiment_metrics
from cmacc.heads.sequences import SequenceData, SequenceError, read_sequences

__all__ = [
    "EVENT_RECIPES",
    "AveData",
    "AveError",
    "AveFacts",
    "AveFeatures",
    "CaceNet",
    "CaceNetConfig",
    "Cmbs",
    "CmbsConfig",
    "EmotionChoice",
    "EmotionError",
    "EmotionSet",
    "EventError",
    "EventLinear",
    "EventLinearConfig",
    "EventOptions",
    "EventProtocol",
    "EventRecipe",
    "FitConfig",
    "Fitted",
    "FusionConfig",
    "FusionError",
    "FusionHead",
    "FusionMethod",
    "FusionOptions",
    "FusionTask",
    "Head",
    "HeadError",
    "InstrumentError",
    "Items",
    "ItemsInMemory",
    "Performance",
    "Rows",
    "SentimentMetricsError",
    "SequenceData",
    "SequenceError",
    "StreamConfig",
    "WeakCmbs",
    "WeakCmbsConfig",
    "class_metrics",
    "classes_per_second",
    "emotion_metrics",
    "emotion_task",
    "evaluate_events",
    "evaluate_fusion",
    "event_auroc",
    "fit",
    "gated_classes",
    "instruments_task",
    "performance_of",
    "predictions",
    "read_ave",
    "read_ave_features",
    "read_background_features",
    "read_sequences",
    "released_weak_classes",
    "seeded_head",
    "segment_accuracy",
    "sentiment_metrics",
    "sound_triplets",
    "tree_distances",
]
