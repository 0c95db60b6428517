"""What every objective is told and what it gives: the step calls one, and does not know which.

An objective is told the query encoders' outputs by modality (with gradient), the key encoders' where it asks for them,
each modality's dictionary, and the sample ids. It gives a loss to minimise and named figures. Several objectives are
one again: `WeightedObjectives`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn


@runtime_checkable
class Encoded(Protocol):
    """What an encoder gives of M inputs; `cmacc.encoders.Encoding` is one."""

    @property
    def embedding(self) -> Tensor:
        """``(M, d)``, of length one."""
        ...

    @property
    def penultimate(self) -> Tensor:
        """``(M, p)``: what enters the last linear layer."""
        ...

    @property
    def feature(self) -> Tensor:
        """``(M, f)``: the backbone's pooled output."""
        ...

    @property
    def feature_map(self) -> Tensor | None:
        """``(M, C, ...)`` before pooling; None unless the objective has ``needs_feature_maps``."""
        ...


@runtime_checkable
class Negatives(Protocol):
    """K keys that a dictionary holds; `cmacc.negatives.Keys` is one."""

    @property
    def embedding(self) -> Tensor:
        """``(K, d)``, of length one."""
        ...

    @property
    def sample_ids(self) -> Tensor:
        """``(K,)`` int64."""
        ...


@dataclass(frozen=True)
class ObjectiveInputs:
    """What a step knows when the loss is due.

    Attributes
    ----------
    queries
        Of the query encoders, by modality (``"video"``, ``"audio"``), with gradient.
    keys
        Of the key encoders on the same samples, without gradient; empty unless the objective has ``needs_keys`` or
        there are dictionaries.
    negatives
        The dictionary of each modality; empty where there is none, or before it joins the loss.
    sample_ids
        ``(M,)``.
    """

    queries: Mapping[str, Encoded]
    keys: Mapping[str, Encoded]
    negatives: Mapping[str, Negatives]
    sample_ids: Int[Tensor, " batch"]


@dataclass(frozen=True)
class ObjectiveResult:
    """A loss and named figures.

    Attributes
    ----------
    loss
        To minimise, with gradient.
    metrics
        Scalars without gradient, such as ``video_to_audio/top1``, and ``loss`` among them. NaN: nothing to measure,
        and nothing is logged.
    """

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]


@runtime_checkable
class Objective(Protocol):
    """Anything that can be trained for; one with weights of its own is an `nn.Module`, and they are trained too."""

    @property
    def needs_keys(self) -> bool:
        """Whether it wants the key encoders' outputs on the batch."""
        ...

    @property
    def needs_feature_maps(self) -> bool:
        """Whether it wants the query encoders' feature maps."""
        ...

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveResult:
        """The loss of a batch."""
        ...


class WeightedObjectives(nn.Module):
    """Several objectives, added with weights; their metrics are named ``<name>/<metric>``.

    Parameters
    ----------
    terms
        By name, ``(weight, objective)``.

    Raises
    ------
    ValueError
        There is no term.
    """

    def __init__(self, terms: Mapping[str, tuple[float, Objective]]) -> None:
        super().__init__()
        if not terms:
            raise ValueError("WeightedObjectives: terms must be at least one, got none")
        self._terms = dict(terms)
        # Registered, so that weights of an objective's own are trained and saved.
        self.objectives = nn.ModuleDict(
            {name: term for name, (_, term) in terms.items() if isinstance(term, nn.Module)}
        )

    @property
    def needs_keys(self) -> bool:
        """Whether any of them does."""
        return any(objective.needs_keys for _, objective in self._terms.values())

    @property
    def needs_feature_maps(self) -> bool:
        """Whether any of them does."""
        return any(objective.needs_feature_maps for _, objective in self._terms.values())

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveResult:
        """The weighted sum."""
        results = {name: (weight, objective(inputs)) for name, (weight, objective) in self._terms.items()}
        loss = sum(weight * result.loss for weight, result in results.values())
        assert isinstance(loss, Tensor)
        metrics = {"loss": loss.detach()}
        for name, (_, result) in results.items():
            metrics |= {f"{name}/{metric}": value for metric, value in result.metrics.items()}
        return ObjectiveResult(loss, metrics)
