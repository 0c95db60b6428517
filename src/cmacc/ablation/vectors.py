"""The controlled problem: pairs of vectors with a common latent cause, on which a run takes seconds.

A sample has a latent z = c + s e (c is the centre of its class, e its offset) and a private nuisance for each modality.
A fixed random network of each modality maps [z, nuisance] to the "video" and the "audio" vector:

    x_v = tanh(B_v tanh(A_v [z, b u_v])) + noise,      x_a = tanh(B_a tanh(A_a [z, b u_a])) + noise

Only z is shared, as in the world of rendered clips, and the class is not a linear function of either vector. Class
frequencies follow Zipf's law. A share of the samples are near-duplicates, with the slightly perturbed z and nuisances
of an earlier sample. Unlike clips, the vectors have no space or time, and decoding and augmentation cost nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from cmacc.ablation.problem import Measured, plain_rows
from cmacc.clips.seeds import seeded_rng
from cmacc.encoders import MODALITIES, Encoder, EncoderPair, Modality
from cmacc.pretraining import PretrainConfig
from cmacc.pretraining.learner import Learner

_WORLD, _ENCODERS = 100, 101  # purposes of random numbers, beside those of `cmacc.clips.seeds`
_NOISE_ROWS = 8192
_HIDDEN = 128
_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class VectorWorld:
    """Settings of a world of vectors. Each seed draws another world with the same settings.

    Parameters
    ----------
    classes
        Number of classes.
    zipf_exponent
        Class frequency is proportional to rank ** -zipf_exponent; 0 is uniform.
    duplicate_share
        Probability that a training sample is a near-duplicate of an earlier one.
    samples, held_out
        Number of training samples, and of held-out samples (never duplicates).
    latent_size, nuisance_size, input_size
        Dimensions of z, of each u, and of each x.
    spread
        s: distance of samples to the centre of their class, relative to the spread of the centres.
    nuisance
        b: strength of the private nuisances relative to the common cause.
    noise
        Standard deviation of the noise at each visit of a sample (the augmentation).

    Raises
    ------
    ValueError
        A value is out of its range.
    """

    classes: int = 200
    zipf_exponent: float = 1.5
    duplicate_share: float = 0.0
    samples: int = 8192
    held_out: int = 2048
    latent_size: int = 16
    nuisance_size: int = 16
    input_size: int = 64
    spread: float = 0.6
    nuisance: float = 1.0
    noise: float = 0.2

    def __post_init__(self) -> None:
        for name, least in (
            ("classes", 2), ("samples", 16), ("held_out", 16), ("latent_size", 1), ("nuisance_size", 1),
            ("input_size", 1), ("zipf_exponent", 0), ("spread", 0), ("nuisance", 0), ("noise", 0),
        ):  # fmt: skip
            if not getattr(self, name) >= least:
                raise ValueError(f"VectorWorld: {name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.duplicate_share < 1:
            raise ValueError(f"VectorWorld: duplicate_share must be in [0, 1), got {self.duplicate_share}")


@dataclass(frozen=True)
class PairedVectors:
    """n samples: ``video`` and ``audio`` ``(n, input_size)``, ``labels`` ``(n,)`` and which sample each is a copy of.

    ``duplicate_of`` is the sample's own number where it is no copy.
    """

    video: Float[Tensor, "samples input"]
    audio: Float[Tensor, "samples input"]
    labels: Int[Tensor, " samples"]
    duplicate_of: Int[Tensor, " samples"]


def draw_vectors(world: VectorWorld, seed: int) -> tuple[PairedVectors, PairedVectors]:
    """The training and the held-out samples of a seed's world; a pure function."""
    rng = seeded_rng(_WORLD, seed)
    centres = rng.normal(size=(world.classes, world.latent_size))
    networks = {name: _random_network(rng, world) for name in ("video", "audio")}
    weights = np.arange(1, world.classes + 1, dtype=float) ** -world.zipf_exponent
    count = world.samples + world.held_out
    labels = rng.choice(world.classes, size=count, p=weights / weights.sum())
    latent = centres[labels] + world.spread * rng.normal(size=(count, world.latent_size))
    private = {name: rng.normal(size=(count, world.nuisance_size)) for name in networks}
    origins = np.arange(count)
    for copy in np.flatnonzero(rng.random(world.samples) < world.duplicate_share):
        # From the origin of an earlier sample, so that a copy of a copy is a copy of the original.
        origins[copy] = origins[rng.integers(copy)] if copy > 0 else 0
    jitter = 0.05 * (origins != np.arange(count))[:, None]
    labels, latent = labels[origins], latent[origins] + jitter * rng.normal(size=latent.shape)
    seen = {
        name: networks[name](
            np.concatenate([latent, world.nuisance * (own[origins] + jitter * rng.normal(size=own.shape))], axis=1)
        )
        for name, own in private.items()
    }

    def part(rows: slice, first: int) -> PairedVectors:
        video, audio = (torch.from_numpy(seen[name][rows].astype(np.float32)) for name in ("video", "audio"))
        return PairedVectors(video, audio, torch.from_numpy(labels[rows]), torch.from_numpy(origins[rows] - first))

    return part(slice(world.samples), 0), part(slice(world.samples, count), world.samples)


def _random_network(rng: np.random.Generator, world: VectorWorld) -> Callable[[_Floats], _Floats]:
    inputs = world.latent_size + world.nuisance_size
    first = rng.normal(size=(inputs, 2 * inputs)) / np.sqrt(inputs) * 1.5
    second = rng.normal(size=(2 * inputs, world.input_size)) / np.sqrt(2 * inputs) * 1.5
    return lambda rows: np.tanh(np.tanh(rows @ first) @ second)


@dataclass(frozen=True)
class VectorBatch:
    """Samples of a step by their ids; `VectorViews` has the vectors."""

    sample_ids: Int[Tensor, " batch"]
    labels: Int[Tensor, " batch"]

    def to(self, device: torch.device) -> "VectorBatch":
        """The ids on another device."""
        return VectorBatch(self.sample_ids.to(device), self.labels.to(device))


class VectorViews:
    """The vectors of samples, with noise that only depends on (seed, visit, sample id)."""

    def __init__(self, data: PairedVectors, noise: float, seed: int, device: torch.device) -> None:
        self._tables: dict[Modality, Tensor] = {"video": data.video.to(device), "audio": data.audio.to(device)}
        rng = seeded_rng(_WORLD, seed, 1)
        size = data.video.shape[1]
        # Drawn once, because a generator for each sample and visit would take longer than the step.
        self._noise = torch.from_numpy((noise * rng.normal(size=(_NOISE_ROWS, size))).astype(np.float32)).to(device)

    def of(self, batch: VectorBatch, visit: int) -> dict[Modality, Tensor]:
        """``(M, input_size)`` of each modality."""
        visits = torch.full_like(batch.sample_ids, visit)
        return {modality: self._noisy(modality, batch.sample_ids, visits) for modality in MODALITIES}

    def another(self, modality: Modality, batch: VectorBatch, visit: int) -> Tensor:
        """The vectors with other noise."""
        # Visits are few; so many apart, the rows of noise are those of no other visit.
        return self._noisy(modality, batch.sample_ids, torch.full_like(batch.sample_ids, visit + 100_003))

    def plain(self, modality: Modality, batch: VectorBatch, visit: int) -> Tensor:
        """The vectors without noise."""
        table = self._tables[modality]
        return table[batch.sample_ids.to(table.device)]

    def kept(self, batch: VectorBatch, visit: int) -> dict[str, Tensor]:
        """Ids and visits of the samples; the tables hold the rest."""
        return {"sample_ids": batch.sample_ids, "visits": torch.full_like(batch.sample_ids, visit)}

    def again(self, modality: Modality, kept: Callable[[str], Tensor]) -> Tensor:
        """``(M, input_size)``."""
        return self._noisy(modality, kept("sample_ids"), kept("visits"))

    def _noisy(self, modality: Modality, sample_ids: Tensor, visits: Tensor) -> Tensor:
        # A multiplicative hash for each modality; samples with the same row of noise are thousands of ids apart.
        place = (sample_ids * 2_654_435_761 + visits * 40_503 + (97 if modality == "audio" else 0)) % _NOISE_ROWS
        table = self._tables[modality]
        return table[sample_ids.to(table.device)] + self._noise[place.to(table.device)]


def vector_pair(world: VectorWorld, config: PretrainConfig) -> EncoderPair:
    """Untrained encoders: MLPs of two layers with batch norm, whose weights only depend on ``config.seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # leaves the caller's GPU generators alone
        own = config.encoder
        encoders = (
            Encoder(_perceptron(world.input_size), _HIDDEN, own.head, own.hidden_size, own.embedding_size)
            for _ in range(2)
        )
        return EncoderPair(*encoders)


def _perceptron(inputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, _HIDDEN, bias=False),
        nn.BatchNorm1d(_HIDDEN),
        nn.ReLU(),
        nn.Linear(_HIDDEN, _HIDDEN, bias=False),
        nn.BatchNorm1d(_HIDDEN),
        nn.ReLU(),
    )


class VectorDataset:
    """The data of a `VectorWorld` with one seed, on the CPU or a GPU."""

    in_float32 = True

    def __init__(self, world: VectorWorld, seed: int, device: torch.device) -> None:
        self._world, self._device = world, device
        self._data, self._held_out = draw_vectors(world, seed)
        self.labels, self.held_out_labels = self._data.labels, self._held_out.labels

    def encoder(self, config: PretrainConfig) -> EncoderPair:
        """Untrained MLPs."""
        return vector_pair(self._world, config)

    def views(self, config: PretrainConfig) -> VectorViews:
        """The vectors with noise."""
        return VectorViews(self._data, self._world.noise, config.seed, self._device)

    def batch(self, sample_ids: Int[Tensor, " batch"]) -> VectorBatch:
        """Their ids and labels."""
        return VectorBatch(sample_ids, self.labels[sample_ids])

    @torch.no_grad()
    def measured(self, learner: Learner) -> Measured:
        """Outputs of the encoders without noise."""
        encoder = learner.encoder.eval()
        training, held_out = (
            encoder(video=part.video.to(self._device), audio=part.audio.to(self._device))
            for part in (self._data, self._held_out)
        )
        encoder.train()
        return Measured(
            features={m: (plain_rows(training[m].feature), plain_rows(held_out[m].feature)) for m in MODALITIES},
            matched={m: plain_rows(held_out[m].embedding) for m in MODALITIES},
        )
