"""Settings of the loss: its terms, and what they need of a run."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from cmacc.encoders import MODALITIES, Modality
from cmacc.objectives import (
    NEEDS,
    BatchKeys,
    CatchThePatchConfig,
    CrossCLRConfig,
    FaceConfig,
    MaskedAudioConfig,
    STiCAConfig,
    TermNeeds,
    Terms,
    WithinModalConfig,
)
from cmacc.pretraining.config_error import require


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss: a weighted sum of terms. Settings without a name of a term are those of ``cross_modal``.

    Parameters
    ----------
    terms
        Weights of the terms. Default: ``cross_modal`` alone.
    temperature
        tau, of the loss and of the pseudo-labels.
    in_batch
        Whether the other keys of the batch are negatives.
    batch_keys
        Which encoder the positive and the in-batch keys come from. ``online``: the query encoder, with gradient, as in
        CLIP. ``momentum``: the key encoder, without gradient, as in the paper. ``both``: the mean of two losses, one
        over the batch's online keys, and one whose positive, in-batch keys and dictionary all come from the momentum
        encoder. Default: ``both`` with a dictionary, ``online`` without. The keys of a dictionary always come from the
        momentum encoder. With ``online``, positives and negatives are of different kinds (the positives have newer
        weights), and retrieval is worse than without any dictionary (docs/evidence-dictionary.md).
    decoupled
        Whether to exclude the positive from the denominator (DCL, Yeh et al., 2022). The gradient then does not vanish
        once a small batch has become easy. The loss can be negative, and is not an InfoNCE estimate; the metric
        ``mutual_information`` still is one.
    momentum
        m of the key encoders, in [0, 1]. It starts lower, as (1 + t) / (10 + t), so that the first keys are not those
        of an untrained copy.
    within_modal, crossclr, stica, ctp, face, masked_audio
        Settings of the other terms.
    """

    terms: Terms = field(default_factory=Terms)
    temperature: float = 0.1
    in_batch: bool = True
    batch_keys: BatchKeys | None = None
    decoupled: bool = True
    momentum: float = 0.99
    within_modal: WithinModalConfig = field(default_factory=WithinModalConfig)
    crossclr: CrossCLRConfig = field(default_factory=CrossCLRConfig)
    stica: STiCAConfig = field(default_factory=STiCAConfig)
    ctp: CatchThePatchConfig = field(default_factory=CatchThePatchConfig)
    face: FaceConfig = field(default_factory=FaceConfig)
    masked_audio: MaskedAudioConfig = field(default_factory=MaskedAudioConfig)

    @property
    def needs(self) -> dict[str, TermNeeds]:
        """What each of the terms needs."""
        found = {name: NEEDS[name] for name in self.terms.weights()}
        if "within_modal" in found:
            found["within_modal"] = TermNeeds(self.within_modal.modalities, self.within_modal.modalities)
        return found

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """The modalities that files must have, in the order of `MODALITIES`."""
        return _ordered(modality for needs in self.needs.values() for modality in needs.inputs)

    @property
    def trained_modalities(self) -> tuple[Modality, ...]:
        """The modalities whose encoders are trained."""
        return _ordered(m for needs in self.needs.values() for m in (*needs.queries, *needs.own_maps))

    @property
    def query_modalities(self) -> tuple[Modality, ...]:
        """The modalities whose queries the loss depends on."""
        return _ordered(modality for needs in self.needs.values() for modality in needs.queries)

    @property
    def query_maps(self) -> tuple[Modality, ...]:
        """The modalities whose queries must come with their feature map."""
        return _ordered(modality for needs in self.needs.values() for modality in needs.query_maps)

    @property
    def aligns(self) -> bool:
        """Whether a term brings video and audio into one space."""
        return any(needs.aligns for needs in self.needs.values())

    def __post_init__(self) -> None:
        require(self.temperature > 0, "objective.temperature", "positive", self.temperature)
        require(0 <= self.momentum <= 1, "objective.momentum", "in [0, 1]", self.momentum)


def _ordered(names: Iterable[str]) -> tuple[Modality, ...]:
    found = set(names)
    return tuple(modality for modality in MODALITIES if modality in found)
