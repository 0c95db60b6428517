"""The objective of a run: its terms, built for its encoders and clips."""

from collections.abc import Callable

import torch

from cmacc.encoders import MODALITIES, Backbone, Encoder, EncoderPair, Modality
from cmacc.encoders.towers import Tower
from cmacc.objectives import (
    BidirectionalContrast,
    CatchThePatch,
    CrossCLR,
    FaceReconstruction,
    MaskedAudio,
    Objective,
    STiCA,
    WeightedObjectives,
    WithinModalContrast,
)
from cmacc.pretraining.config import PretrainConfig
from cmacc.pretraining.config_error import ConfigError


def build_objective(config: PretrainConfig, encoder: EncoderPair) -> Objective:
    """The objective of ``config.objective``. Its own weights, if any, only depend on the run's seed.

    ``cross_modal`` alone is a `BidirectionalContrast`, else the result is a `WeightedObjectives`.

    Raises
    ------
    ConfigError
        A term needs feature maps, and an encoder has none; or it cannot describe the inputs of a trained audio tower.
    """
    weights = config.objective.terms.weights()
    for term, needs in config.objective.needs.items():
        for modality in needs.maps:
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
        terms = {term: (weight, _BUILD[term](config, encoder)) for term, weight in weights.items()}
    return WeightedObjectives(terms).to(encoder.video.last.weight.dtype)


def _cross_modal(config: PretrainConfig, encoder: EncoderPair) -> Objective:
    own = config.objective
    return BidirectionalContrast(own.temperature, own.in_batch, config.batch_keys, own.decoupled)


def _crossclr(config: PretrainConfig, encoder: EncoderPair) -> Objective:
    sizes: dict[str, int] = {}
    for modality in MODALITIES:
        one: Encoder = getattr(encoder, modality)
        # A backbone that is trained on clips has no constant feature of an input: there the inputs themselves are
        # described. Vectors cannot be, so their features have to do.
        is_trained_on_clips = isinstance(one.backbone, Backbone | Tower) and one.frozen_digest is None
        if not is_trained_on_clips:
            sizes[modality] = one.feature_size
        elif modality == "audio" and isinstance(one.backbone, Tower) and config.objective.crossclr.uses_connectivity:
            raise ConfigError(
                "objective.terms.crossclr must be 0 with an audio tower that is trained, whose waveforms it cannot "
                "describe (or set gamma=1 and kappa=null), got train.audio=" + config.train.audio
            )
    return CrossCLR(config.objective.crossclr, sizes)


def _face(config: PretrainConfig, encoder: EncoderPair) -> Objective:
    clip = config.data.clip
    share = clip.picture_seconds / clip.audio_seconds / 2  # picture and sound have the same centre
    return FaceReconstruction(config.objective.face, _map_channels(encoder, "audio"), (0.5 - share, 0.5 + share))


def _map_channels(encoder: EncoderPair, modality: Modality) -> int:
    backbone = getattr(encoder, modality).backbone
    assert isinstance(backbone, Backbone)
    return backbone.map_channels


_BUILD: dict[str, Callable[[PretrainConfig, EncoderPair], Objective]] = {
    "cross_modal": _cross_modal,
    "within_modal": lambda config, _: WithinModalContrast(config.objective.within_modal),
    "crossclr": _crossclr,
    "stica": lambda config, _: STiCA(config.objective.stica),
    "ctp": lambda config, encoder: CatchThePatch(
        config.objective.ctp, _map_channels(encoder, "video"), config.data.view_frame_count
    ),
    "face": _face,
    "masked_audio": lambda config, encoder: MaskedAudio(
        config.objective.masked_audio, _map_channels(encoder, "audio"), config.encoder.mel_bins
    ),
}
