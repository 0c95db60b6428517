"""The terms of a training objective: names, weights, and what each needs. Settings of a term stand in its own file."""

import dataclasses
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Terms:
    """Weights of the terms of the loss; a term of weight 0 is not computed.

    Parameters
    ----------
    cross_modal
        Video against audio, with the dictionaries: `BidirectionalContrast`.
    within_modal
        Two augmented views of one modality: `WithinModalContrast`.
    crossclr
        `CrossCLR` (Zolfaghari et al., 2021).
    stica
        Crops of the feature map: `STiCA` (Patrick et al., 2021).
    ctp
        Tracks of pasted patches, from the pictures alone: `CatchThePatch` (Wang et al., 2021).
    face
        The frames from a still frame and the sound: `FaceReconstruction` (Shukla et al., 2020).
    masked_audio
        The clean spectrogram from a masked one, from the sound alone: `MaskedAudio`.
    """

    cross_modal: float = 1.0
    within_modal: float = 0.0
    crossclr: float = 0.0
    stica: float = 0.0
    ctp: float = 0.0
    face: float = 0.0
    masked_audio: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in dataclasses.asdict(self).items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"objective.terms.{name} must be at least 0 and finite, got {weight}")
        if not self.weights():
            raise ValueError("objective.terms must have a weight above 0, got none")

    @classmethod
    def names(cls) -> list[str]:
        """All terms."""
        return [field.name for field in dataclasses.fields(cls)]

    def weights(self) -> dict[str, float]:
        """The terms that are computed, with their weights."""
        return {name: weight for name, weight in dataclasses.asdict(self).items() if weight > 0}


@dataclass(frozen=True)
class TermNeeds:
    """What a term needs of a run, by names of modalities.

    Attributes
    ----------
    inputs
        What a file must have.
    queries
        Whose queries it uses, with a gradient.
    query_maps
        Whose queries must come with their feature map.
    own_maps
        Whose feature maps it needs of inputs that it has drawn itself.
    aligns
        Whether it brings video and audio into one space.
    """

    inputs: tuple[str, ...]
    queries: tuple[str, ...]
    query_maps: tuple[str, ...] = ()
    own_maps: tuple[str, ...] = ()
    aligns: bool = False

    @property
    def maps(self) -> tuple[str, ...]:
        """Whose encoders must give feature maps."""
        return (*self.query_maps, *self.own_maps)


_BOTH = ("video", "audio")
NEEDS = {
    "cross_modal": TermNeeds(_BOTH, _BOTH, aligns=True),
    "within_modal": TermNeeds(_BOTH, _BOTH),  # or one modality, by its own setting
    "crossclr": TermNeeds(_BOTH, _BOTH, aligns=True),
    "stica": TermNeeds(_BOTH, _BOTH, query_maps=("video",), own_maps=("video",), aligns=True),
    "ctp": TermNeeds(("video",), (), own_maps=("video",)),
    "face": TermNeeds(_BOTH, ("audio",), query_maps=("audio",)),
    "masked_audio": TermNeeds(("audio",), (), own_maps=("audio",)),
}
"""What each term needs."""
