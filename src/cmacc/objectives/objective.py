"""The interface of objectives: the training step calls one without knowing which.

An objective receives the outputs of the query encoders by modality (with gradient), those of the key encoders on
request, the dictionary of each modality, and the sample ids. It returns a loss and named metrics. `WeightedObjectives`
combines several objectives into one.

One that has a method `draw` (`DrawingObjective`) is asked before the batch is encoded: it may have more inputs encoded,
such as another augmented view, and hand itself targets, such as the boxes of pasted patches.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
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


@runtime_checkable
class BatchViews(Protocol):
    """The samples of this process's part of a batch, before they are encoded: M rows."""

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """The augmented inputs that become the queries, by modality; only the modalities that the run uses."""
        ...

    def another(self, modality: str) -> Tensor:
        """Another augmented view of the same samples."""
        ...

    def plain(self, modality: str) -> Tensor:
        """The inputs without augmentation, but of the same windows: targets."""
        ...

    def generators(self, term: str) -> list[np.random.Generator]:
        """One generator for each sample, seeded by the run's seed, the visit, the sample id and ``term``."""
        ...


@dataclass(frozen=True)
class ExtraInput:
    """One more input to encode, beside the queries.

    Attributes
    ----------
    modality
        The encoder.
    tensor
        ``(M, ...)``, of the shape of `BatchViews.inputs`.
    with_feature_map
        Whether its feature map is needed.
    """

    modality: str
    tensor: Tensor
    with_feature_map: bool = False


@dataclass(frozen=True)
class Drawn:
    """What an objective draws for a batch.

    Attributes
    ----------
    inputs
        More inputs to encode, by names of its own: `ObjectiveInputs.more` has the results.
    given
        Tensors with one row for each sample, which `ObjectiveInputs.given` hands back for the whole batch.
    """

    inputs: Mapping[str, ExtraInput] = field(default_factory=dict)
    given: Mapping[str, Tensor] = field(default_factory=dict)


def _cannot_project(modality: str, feature_map: Tensor) -> Encoded:
    raise ValueError(f"ObjectiveInputs: project must be given to an objective that crops feature maps ({modality})")


@dataclass(frozen=True)
class ObjectiveInputs:
    """Inputs of an objective at one training step, for the whole batch.

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
    more
        Outputs of the query encoders for the inputs that the objective has drawn, by its names, with gradient.
    given
        The tensors that it has drawn, by its names.
    project
        From a modality and (crops of) its feature map ``(M, C, ...)`` to what the encoder makes of them: pooling, head.
    rng
        For draws that concern the whole batch, such as one crop for all; seeded by the run's seed and the step.
    """

    queries: Mapping[str, Encoded]
    keys: Mapping[str, Encoded]
    negatives: Mapping[str, Negatives]
    sample_ids: Int[Tensor, " batch"]
    more: Mapping[str, Encoded] = field(default_factory=dict)
    given: Mapping[str, Tensor] = field(default_factory=dict)
    project: Callable[[str, Tensor], Encoded] = _cannot_project
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))


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


@runtime_checkable
class DrawingObjective(Objective, Protocol):
    """An objective that has more inputs encoded than the queries, or needs targets."""

    def draw(self, batch: BatchViews) -> Drawn:
        """What it needs of a batch; all randomness comes from `BatchViews.generators`."""
        ...


class WeightedObjectives(nn.Module):
    """A weighted sum of several objectives. Their metrics, and what they draw, are named ``<name>/<own name>``.

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

    def draw(self, batch: BatchViews) -> Drawn:
        """What the terms draw."""
        inputs: dict[str, ExtraInput] = {}
        given: dict[str, Tensor] = {}
        for name, (_, objective) in self._terms.items():
            if isinstance(objective, DrawingObjective):
                drawn = objective.draw(batch)
                inputs |= {f"{name}/{own}": extra for own, extra in drawn.inputs.items()}
                given |= {f"{name}/{own}": tensor for own, tensor in drawn.given.items()}
        return Drawn(inputs, given)

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveResult:
        """The weighted sum."""
        results = {name: (weight, objective(_own(inputs, name))) for name, (weight, objective) in self._terms.items()}
        loss = sum(weight * result.loss for weight, result in results.values())
        assert isinstance(loss, Tensor)
        metrics = {"loss": loss.detach()}
        for name, (_, result) in results.items():
            metrics |= {f"{name}/{metric}": value for metric, value in result.metrics.items()}
        return ObjectiveResult(loss, metrics)


def _own(inputs: ObjectiveInputs, name: str) -> ObjectiveInputs:
    """The inputs of one term, with what it has drawn by its own names."""
    prefix = f"{name}/"
    more = {key.removeprefix(prefix): value for key, value in inputs.more.items() if key.startswith(prefix)}
    given = {key.removeprefix(prefix): value for key, value in inputs.given.items() if key.startswith(prefix)}
    return replace(inputs, more=more, given=given)
