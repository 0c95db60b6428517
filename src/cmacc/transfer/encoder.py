"""What can be evaluated: anything that turns pictures or sounds of a stated size into vectors.

`ClipEncoder` is the whole contract; cmacc's own encoders, torchvision's and the baselines stand behind it in
`cmacc.transfer.adapters`, and one's own object will do in `cmacc.transfer.evaluate`.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cmacc.clips import ClipSpec
from cmacc.encoders import Modality

__all__ = ["ClipEncoder", "EncoderError", "MatchingEncoder", "Modality"]


class EncoderError(ValueError):
    """An encoder that is unknown, cannot be opened, or gives what it must not; the message says which and what."""


@runtime_checkable
class ClipEncoder(Protocol):
    """Frozen encoders of one or both modalities, with the size of the clips that they want.

    Both functions are called under `torch.inference_mode`, with batches on ``device``. An encoder that is also a
    `torch.nn.Module`, and whose functions are differentiable in its parameters, can be fine-tuned.

    Attributes
    ----------
    modalities
        What it encodes; the function of the other modality is never called.
    spec
        Frames a clip, their rate and size, length of the sound and its rate.
    device
        Where its batches must lie.
    """

    # Properties here, so that plain attributes and properties both will do.
    @property
    def modalities(self) -> tuple[Modality, ...]: ...
    @property
    def spec(self) -> ClipSpec: ...
    @property
    def device(self) -> torch.device: ...

    def embed_video(self, frames: UInt8[Tensor, "batch time height width 3"]) -> Float[Tensor, "batch features"]:
        """Features of pictures, RGB in 0..255, of ``spec``'s size."""
        ...

    def embed_audio(self, waveforms: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch features"]:
        """Features of sounds, mono in [-1, 1], of ``spec``'s length and rate."""
        ...


@runtime_checkable
class MatchingEncoder(ClipEncoder, Protocol):
    """An encoder whose pictures and sounds can be compared: from features into one common space.

    Rows are compared by inner product, after they are made of length one.
    """

    def match_video(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch dim"]:
        """What `embed_video` gave, in the common space."""
        ...

    def match_audio(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch dim"]:
        """What `embed_audio` gave, in the common space."""
        ...
