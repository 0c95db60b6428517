"""What is learnt in an ablation, behind one protocol: vectors, rendered clips, or the clips of a manifest."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from cmacc.ablation.vectors import VectorBatch, VectorViews, VectorWorld, draw_vectors, vector_pair
from cmacc.pretraining import PretrainConfig
from cmacc.pretraining.learner import Learner


@dataclass(frozen=True)
class Measured:
    """Frozen encoders on both parts of a problem.

    Attributes
    ----------
    features
        Backbone features ``(n, f)`` of the training and of the held-out samples, by modality.
    matched
        Embeddings ``(n, d)`` of the held-out samples, by modality.
    """

    features: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
    matched: dict[str, NDArray[np.float32]]


@runtime_checkable
class Problem(Protocol):
    """Training samples 0..samples-1 with labels (-1: unknown), held-out samples, and learners that begin on them."""

    @property
    def labels(self) -> Int[Tensor, " samples"]:
        """Of the training samples."""
        ...

    @property
    def held_out_labels(self) -> Int[Tensor, " held_out"]:
        """Of the held-out samples."""
        ...

    def learner(self, config: PretrainConfig) -> Learner:
        """A learner at step 0."""
        ...

    def batch(self, sample_ids: Int[Tensor, " batch"]) -> Any:
        """These training samples, for the learner's step."""
        ...

    def measured(self, learner: Learner) -> Measured:
        """The encoders of the moment on all samples, nothing drawn."""
        ...


class VectorProblem:
    """`VectorWorld` of one seed, on the CPU or a GPU."""

    def __init__(self, world: VectorWorld, seed: int, device: torch.device) -> None:
        self._world, self._device = world, device
        self._data, self._held_out = draw_vectors(world, seed)
        self.labels, self.held_out_labels = self._data.labels, self._held_out.labels

    def learner(self, config: PretrainConfig) -> Learner:
        """Perceptrons on the vectors, in float32."""
        views = VectorViews(self._data, self._world.noise, config.seed, self._device)
        return Learner.around(vector_pair(self._world, config), views, config, self._device, None)

    def batch(self, sample_ids: Int[Tensor, " batch"]) -> VectorBatch:
        """Their numbers."""
        return VectorBatch(sample_ids, self.labels[sample_ids])

    @torch.no_grad()
    def measured(self, learner: Learner) -> Measured:
        """Without noise."""
        encoder = learner.encoder.eval()
        sides = [encoder(part.video.to(self._device), part.audio.to(self._device)) for part in
                 (self._data, self._held_out)]  # fmt: skip
        encoder.train()
        (train_video, train_audio), (video, audio) = sides
        return Measured(
            features={
                "video": (plain_rows(train_video.feature), plain_rows(video.feature)),
                "audio": (plain_rows(train_audio.feature), plain_rows(audio.feature)),
            },
            matched={"video": plain_rows(video.embedding), "audio": plain_rows(audio.embedding)},
        )


def plain_rows(rows: Tensor) -> NDArray[np.float32]:
    """On the CPU, in float32."""
    plain: NDArray[np.float32] = rows.float().cpu().numpy()
    return plain
