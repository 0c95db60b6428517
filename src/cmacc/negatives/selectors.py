"""Which of the pool's keys become negatives: four ways behind one protocol."""

from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cmacc.negatives.gradients import GradientName, gradient_factors
from cmacc.negatives.queue import Keys
from cmacc.negatives.seeding import kmeans_plusplus

SelectorName = Literal["newest", "random", "hardest", "active"]


@runtime_checkable
class Selector(Protocol):
    """Chooses ``count`` distinct keys of the pool; 1 <= count <= len(pool)."""

    def select(
        self, pool: Keys, queries: Float[Tensor, "queries dim"], count: int, generator: torch.Generator | None
    ) -> Int[Tensor, " count"]:
        """Indices into ``pool``, whose keys stand oldest first."""
        ...


class NewestSelector:
    """The most recent keys: with it the dictionary is MoCo's plain queue (He et al., 2020)."""

    def select(
        self, pool: Keys, queries: Float[Tensor, "queries dim"], count: int, generator: torch.Generator | None
    ) -> Int[Tensor, " count"]:
        """The last ``count`` indices."""
        return torch.arange(len(pool) - count, len(pool), device=pool.embedding.device)


class RandomSelector:
    """Uniformly without replacement: the baseline that shows what a pool does by itself."""

    def select(
        self, pool: Keys, queries: Float[Tensor, "queries dim"], count: int, generator: torch.Generator | None
    ) -> Int[Tensor, " count"]:
        """``count`` indices of a random permutation."""
        return torch.randperm(len(pool), generator=generator)[:count].to(pool.embedding.device)


@dataclass(frozen=True)
class HardestSelector:
    """The largest gradient embeddings: uncertain, but not diverse."""

    temperature: float
    gradient: GradientName = "last_layer"

    def select(
        self, pool: Keys, queries: Float[Tensor, "queries dim"], count: int, generator: torch.Generator | None
    ) -> Int[Tensor, " count"]:
        """The ``count`` rows of largest norm, largest first."""
        return gradient_factors(pool, queries, self.temperature, self.gradient).squared_norms().topk(count).indices


@dataclass(frozen=True)
class ActiveSelector:
    """k-means++ seeding over gradient embeddings (Ma et al., 2021, algorithm 1): uncertain and diverse."""

    temperature: float
    gradient: GradientName = "last_layer"

    def select(
        self, pool: Keys, queries: Float[Tensor, "queries dim"], count: int, generator: torch.Generator | None
    ) -> Int[Tensor, " count"]:
        """``count`` seeds, in the order of picking."""
        factors = gradient_factors(pool, queries, self.temperature, self.gradient)
        return kmeans_plusplus((factors.left, factors.right), count, generator=generator)


def build_selector(name: SelectorName, temperature: float, gradient: GradientName = "last_layer") -> Selector:
    """The selector of that name.

    Raises
    ------
    ValueError
        ``name`` or ``gradient`` is unknown.
    """
    if gradient not in get_args(GradientName):
        raise ValueError(
            f"build_selector: gradient must be one of {', '.join(get_args(GradientName))}, got {gradient!r}"
        )
    if name == "newest":
        return NewestSelector()
    if name == "random":
        return RandomSelector()
    if name == "hardest":
        return HardestSelector(temperature, gradient)
    if name == "active":
        return ActiveSelector(temperature, gradient)
    raise ValueError(f"build_selector: name must be one of {', '.join(get_args(SelectorName))}, got {name!r}")
