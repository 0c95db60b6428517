"""The interface of encoders for evaluation: anything that turns video or audio of a given size into vectors.

`ClipEncoder` is the whole interface. `cmacc.pretraining.cmacc_encoder` implements it for cmacc's encoders,
`cmacc.transfer.adapters` for towers alone and a baseline; `cmacc.transfer.evaluate` also accepts your own object.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cmacc.clips import ClipSpec
from cmacc.encoders import Modality

__all__ = [
    "ClipEncoder",
    "EncoderError",
    "HeadedEncoder",
    "MatchingEncoder",
    "Modality",
    "ProjectedEncoder",
    "SpatialEncoder",
    "TextEncoder",
]


class EncoderError(ValueError):
    """An encoder that is unknown, cannot be opened, or returns invalid values; the message says which and what."""


@runtime_checkable
class ClipEncoder(Protocol):
    """Frozen encoders of one or both modalities, with the size of their clips.

    Both methods are called under `torch.inference_mode`, with batches on ``device``. An encoder can be fine-tuned if it
    is a `torch.nn.Module` and its methods are differentiable in its parameters.

    Attributes
    ----------
    modalities
        Modalities that it encodes. The method of the other modality is never called.
    spec
        Size of its clips: number, rate and size of the frames, length and sample rate of the audio.
    device
        Device of its batches.
    """

    # Properties in the protocol accept both plain attributes and properties.
    @property
    def modalities(self) -> tuple[Modality, ...]: ...
    @property
    def spec(self) -> ClipSpec: ...
    @property
    def device(self) -> torch.device: ...

    def embed_video(self, frames: UInt8[Tensor, "batch time height width 3"]) -> Float[Tensor, "batch features"]:
        """Features of video: RGB frames in 0..255, of the size in ``spec``."""
        ...

    def embed_audio(self, waveforms: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch features"]:
        """Features of audio: mono waveforms in [-1, 1], of the length and rate in ``spec``."""
        ...


@runtime_checkable
class MatchingEncoder(ClipEncoder, Protocol):
    """An encoder whose video and audio features can be projected into a common space.

    Rows are L2-normalised and compared by inner product.
    """

    def match_video(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch dim"]:
        """Features from `embed_video`, projected into the common space."""
        ...

    def match_audio(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch dim"]:
        """Features from `embed_audio`, projected into the common space."""
        ...


@runtime_checkable
class SpatialEncoder(MatchingEncoder, Protocol):
    """A matching encoder that gives the feature map of a video before it is pooled, by time and place.

    ``pool_map(map_video(frames))`` must be ``embed_video(frames)``. What a place of the map contributes to the common
    space is then found by changing the map and pooling it again.
    """

    def map_video(
        self, frames: UInt8[Tensor, "batch time height width 3"]
    ) -> Float[Tensor, "batch channels map_time map_height map_width"]:
        """Feature maps. Their time and places divide the clip's video evenly.

        Raises
        ------
        EncoderError
            The backbone has no such map.
        """
        ...

    def pool_map(
        self, feature_map: Float[Tensor, "batch channels map_time map_height map_width"]
    ) -> Float[Tensor, "batch features"]:
        """Feature maps from `map_video`, pooled to the features of `embed_video`."""
        ...


@runtime_checkable
class TextEncoder(ClipEncoder, Protocol):
    """An encoder that also encodes text, in the space of its video or audio features.

    Attributes
    ----------
    text_modalities
        Modalities that text can be compared with; empty if there are none.
    """

    @property
    def text_modalities(self) -> tuple[Modality, ...]: ...

    def encode_text(self, texts: Sequence[str], modality: Modality) -> Float[Tensor, "texts features"]:
        """Embeddings of texts, to be compared with the features of that modality by cosine."""
        ...


@runtime_checkable
class HeadedEncoder(MatchingEncoder, Protocol):
    """A matching encoder whose features come from a part of it, which does not change with its heads."""

    @property
    def backbones(self) -> ClipEncoder:
        """That part."""
        ...


@runtime_checkable
class ProjectedEncoder(ClipEncoder, Protocol):
    """An encoder whose audio features may be projected, from what its audio tower gives into a space shared with text.

    ``project_audio(unprojected.embed_audio(waveforms))`` must be ``embed_audio(waveforms)``.
    """

    @property
    def unprojected(self) -> ClipEncoder | None:
        """The audio tower before that projection, as an encoder of audio; None if there is no projection."""
        ...

    def project_audio(self, unprojected: Float[Tensor, "batch width"]) -> Float[Tensor, "batch features"]:
        """The output of the audio tower, projected to the features of `embed_audio`."""
        ...
