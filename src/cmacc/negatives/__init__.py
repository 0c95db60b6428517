"""Negatives from keys: queue, gradient embeddings, k-means++ seeding, selectors, `ActiveDictionary`, active batches."""

from cmacc.negatives.batches import active_batches
from cmacc.negatives.dictionary import ActiveDictionary
from cmacc.negatives.diverse import select_diverse
from cmacc.negatives.gradients import Factors, GradientName, gradient_factors
from cmacc.negatives.input_buffer import InputBuffer
from cmacc.negatives.queue import KeyQueue, Keys
from cmacc.negatives.seeding import kmeans_plusplus
from cmacc.negatives.selectors import Candidates, InitialCenters, Selector, SelectorName, build_selector

__all__ = [
    "ActiveDictionary",
    "Candidates",
    "Factors",
    "GradientName",
    "InitialCenters",
    "InputBuffer",
    "KeyQueue",
    "Keys",
    "Selector",
    "SelectorName",
    "active_batches",
    "build_selector",
    "gradient_factors",
    "kmeans_plusplus",
    "select_diverse",
]
