"""The terms of a training objective: their names and weights. The settings of a term stand in its own file."""

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
