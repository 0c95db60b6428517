"""Selectors: which keys of the pool become negatives. Four selectors behind one protocol."""

from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cmacc.negatives.gradients import GradientName, gradient_factors
from cmacc.negatives.queue import Keys
from cmacc.negatives.seeding import kmeans_plusplus
from cmacc.negatives.shards import Shards

SelectorName = Literal["newest", "random", "hardest", "active"]
"""Which keys of the pool are chosen; see `ActiveDictionary`."""
InitialCenters = Literal["none", "dictionary"]
"""Whether the keys that stay in the dictionary count as centers already chosen."""


@dataclass(frozen=True)
class Candidates:
    """The keys to choose from (with several processes, this process's part), and the context of the choice.

    Attributes
    ----------
    keys
        n keys of this process's pool, in no particular order.
    order
        ``(n,)`` int64: larger is newer; distinct over all processes.
    eligible
        ``(n,)``: which keys may be chosen.
    shards
        The places of these n keys in the table of all processes.
    queries
        ``(M, d)``: queries of the whole batch.
    staying
        The keys that stay in the dictionary.
    """

    keys: Keys
    order: Int[Tensor, " keys"]
    eligible: Bool[Tensor, " keys"]
    shards: Shards
    queries: Float[Tensor, "queries dim"]
    staying: Keys


@runtime_checkable
class Selector(Protocol):
    """Chooses ``count`` distinct eligible candidates, 1 <= count <= their number."""

    def select(self, candidates: Candidates, count: int, generator: torch.Generator | None) -> Int[Tensor, " count"]:
        """Places of the chosen keys in the table of all processes, the same on every process."""
        ...


class NewestSelector:
    """The most recent keys. The dictionary is then MoCo's plain queue (He et al., 2020)."""

    def select(self, candidates: Candidates, count: int, generator: torch.Generator | None) -> Int[Tensor, " count"]:
        """The newest ``count`` keys, oldest first."""
        order = candidates.shards.table(torch.where(candidates.eligible, candidates.order, -1))
        return order.topk(count).indices.flip(0)


class RandomSelector:
    """Uniform sampling without replacement: the baseline that shows the effect of the pool alone."""

    def select(self, candidates: Candidates, count: int, generator: torch.Generator | None) -> Int[Tensor, " count"]:
        """The first ``count`` keys of a random permutation."""
        number = candidates.shards.agreed_number(generator)
        eligible = candidates.shards.table(candidates.eligible.long()).nonzero().flatten()
        order = torch.randperm(len(eligible), generator=torch.Generator().manual_seed(number))
        return eligible[order[:count].to(eligible.device)]


@dataclass(frozen=True)
class HardestSelector:
    """The largest gradient embeddings: uncertain, but not diverse."""

    temperature: float
    gradient: GradientName = "last_layer"

    def select(self, candidates: Candidates, count: int, generator: torch.Generator | None) -> Int[Tensor, " count"]:
        """The ``count`` keys with the largest norms, largest first."""
        norms = gradient_factors(candidates.keys, candidates.queries, self.temperature, self.gradient).squared_norms()
        norms = candidates.shards.table(torch.where(candidates.eligible, norms, -1))
        if not bool(norms.isfinite().all()):  # topk treats NaN as the largest value
            raise ValueError("HardestSelector: keys and queries must be finite, got NaN or infinity")
        return norms.topk(count).indices


@dataclass(frozen=True)
class ActiveSelector:
    """k-means++ seeding over gradient embeddings (Ma et al., 2021, algorithm 1): uncertain and diverse.

    With ``initial_centers="dictionary"``, the keys that stay in the dictionary count as centers already chosen. The
    whole dictionary is then diverse, not only the keys of one step (beyond the paper).
    """

    temperature: float
    gradient: GradientName = "last_layer"
    initial_centers: InitialCenters = "none"

    def select(self, candidates: Candidates, count: int, generator: torch.Generator | None) -> Int[Tensor, " count"]:
        """``count`` k-means++ seeds, in the order of picking."""
        factors = gradient_factors(candidates.keys, candidates.queries, self.temperature, self.gradient)
        centres = None
        if self.initial_centers == "dictionary" and len(candidates.staying) > 0:
            held = gradient_factors(candidates.staying, candidates.queries, self.temperature, self.gradient)
            centres = (held.left, held.right)
        return kmeans_plusplus(
            (factors.left, factors.right),
            count,
            generator=generator,
            initial_centers=centres,
            eligible=candidates.eligible,
            group=candidates.shards.group,
            places=candidates.shards.places,
        )


def build_selector(
    name: SelectorName,
    temperature: float,
    gradient: GradientName = "last_layer",
    initial_centers: InitialCenters = "none",
) -> Selector:
    """The selector of that name.

    Raises
    ------
    ValueError
        ``name`` or ``gradient`` is unknown, or ``initial_centers`` is set for a selector other than ``active``.
    """
    if gradient not in get_args(GradientName):
        raise ValueError(
            f"build_selector: gradient must be one of {', '.join(get_args(GradientName))}, got {gradient!r}"
        )
    if initial_centers != "none" and name != "active":
        raise ValueError(f"build_selector: initial_centers must be none for selector {name!r}, got {initial_centers!r}")
    if name == "newest":
        return NewestSelector()
    if name == "random":
        return RandomSelector()
    if name == "hardest":
        return HardestSelector(temperature, gradient)
    if name == "active":
        return ActiveSelector(temperature, gradient, initial_centers)
    raise ValueError(f"build_selector: name must be one of {', '.join(get_args(SelectorName))}, got {name!r}")
