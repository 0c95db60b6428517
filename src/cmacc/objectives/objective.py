"""The interface of objectives: the training step calls one without knowing which.

An objective receives the outputs of the query encoders by modality (with gradient), those of the key encoders on
request, the dictionary of each modality, and the sample ids. It returns a loss and named metrics. `WeightedObjectives`
combines several objectives into one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn


@runtime_checkable
class Encoded(Protocol):
    """The outputs of an encoder for M inputs; `cmacc.encoders.Encoding` is one."""

    @property
    def embedding(self) -> Tensor:
        """``(M, d)``, of length one."""
        ...

    @property
    def penultimate(self) -> Tensor:
        """``(M, p)``: input of the last linear layer."""
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
    """The K keys of a dictionary; `cmacc.negatives.Keys` is one."""

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
    """Inputs of an objective at one training step.

    Attributes
    ----------
    queries
        Outputs of the query encoders by modality (``"video"``, ``"audio"``), with gradient.
    keys
        Outputs of the key encoders for the same samples, without gradient; empty unless the objective has
        ``needs_keys`` or there are dictionaries.
    negatives
        The dictionary of each modality; empty without dictionaries, or before they join the loss.
    sample_ids
        ``(M,)`` int64.
    """

    queries: Mapping[str, Encoded]
    keys: Mapping[str, Encoded]
    negatives: Mapping[str, Negatives]
    sample_ids: Int[Tensor, " batch"]


@dataclass(frozen=True)
class ObjectiveResult:
    """A loss and named metrics.

    Attributes
    ----------
    loss
        The loss to minimise, with gradient.
    metrics
        Scalars without gradient, such as ``video_to_audio/top1``; one of them is ``loss``. NaN values are not logged.
    """

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]


@runtime_checkable
class Objective(Protocol):
    """A training objective. If it has weights, it is an `nn.Module`, and they are trained too."""

    @property
    def needs_keys(self) -> bool:
        """Whether it needs the key encoders' outputs for the batch."""
        ...

    @property
    def needs_feature_maps(self) -> bool:
        """Whether it needs the query encoders' feature maps."""
        ...

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveResult:
        """The loss of a batch."""
        ...


class WeightedObjectives(nn.Module):
    """A weighted sum of several objectives. Their metrics are named ``<name>/<metric>``.

    Parameters
    ----------
    terms
        ``(weight, objective)`` by name.

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
        # Registered, so that weights of the objectives are trained and saved.
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
