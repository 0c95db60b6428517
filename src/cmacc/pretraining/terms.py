"""The objective of a run: its terms, built for its encoders and clips."""

from collections.abc import Callable

import torch

from cmacc.encoders import Backbone, EncoderPair
from cmacc.objectives import BidirectionalContrast, Objective, WeightedObjectives
from cmacc.pretraining.config import ConfigError, PretrainConfig

# Terms that work on feature maps, and the modalities of these.
TERMS_ON_MAPS = {
    "stica": ("video", "audio"),
    "ctp": ("video",),
    "face": ("video", "audio"),
    "masked_audio": ("audio",),
}


def build_objective(config: PretrainConfig, encoder: EncoderPair) -> Objective:
    """The objective of ``config.objective``. Its own weights, if any, only depend on the run's seed.

    ``cross_modal`` alone is a `BidirectionalContrast`, else the result is a `WeightedObjectives`.

    Raises
    ------
    ConfigError
        A term needs feature maps, and an encoder has none.
    """
    weights = config.objective.terms.weights()
    for term in weights:
        for modality in TERMS_ON_MAPS.get(term, ()):
            backbone = getattr(encoder, modality).backbone
            if not isinstance(backbone, Backbone):
                raise ConfigError(
                    f"objective.terms.{term} must be 0 without a feature map of the {modality} encoder, which cmacc's "
                    f"own encoders have when they are trained on clips (vectors, kept features and towers have none), "
                    f"got {weights[term]:g} with {type(backbone).__name__}"
                )
    if list(weights) == ["cross_modal"] and weights["cross_modal"] == 1:
        return _cross_modal(config, encoder)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return WeightedObjectives({term: (weight, _BUILD[term](config, encoder)) for term, weight in weights.items()})


def _cross_modal(config: PretrainConfig, encoder: EncoderPair) -> Objective:
    own = config.objective
    return BidirectionalContrast(own.temperature, own.in_batch, config.batch_keys, own.decoupled)


_BUILD: dict[str, Callable[[PretrainConfig, EncoderPair], Objective]] = {"cross_modal": _cross_modal}
