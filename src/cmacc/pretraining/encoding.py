"""Encode a batch with a graph, whole or in chunks, and take a gradient back into the weights.

Gradient caching (Gao et al., 2021, arXiv:2101.06983) makes the memory that activations need depend on the chunk instead
of the batch, though every query is contrasted with the whole batch:

1. Compute the features of all chunks without a graph.
2. Compute heads and loss of the whole batch from the features, and take the gradient back as far as the features.
3. Compute the features of each chunk again, now with a graph, and take their part of the gradient into the weights.

It costs one more forward pass. The cut is at the backbones' output, not at the embeddings as in the paper: the batch
norm of the heads must see the whole batch. That of the audio input comes before the chunks (`Backbone.prepare`). So the
result is that of one large batch, unless the backbones have batch norm themselves.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from cmacc.clips import seeds
from cmacc.encoders import MODALITIES, Backbone, Encoder, Encoding, Modality, statistics_kept
from cmacc.objectives import DrawingObjective, ExtraInput
from cmacc.pretraining.learner import Learner
from cmacc.pretraining.processes import Processes
from cmacc.pretraining.randomness import seeded_generators

_Name = TypeVar("_Name", bound=str)


@runtime_checkable
class EncodedBatch(Protocol):
    """The encodings of this process's part of a batch, with the way back to the weights."""

    queries: dict[Modality, Encoding]
    more: dict[str, Encoding]
    """Those of the inputs that the objective has drawn."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to ``.grad`` of the weights, the same on all processes."""
        ...


def encode_queries(
    learner: Learner, inputs: dict[Modality, Tensor], more: Mapping[str, ExtraInput], step: int
) -> EncodedBatch:
    """Encode with the query encoders, in chunks if ``optim.chunk_size`` is less than the clips of this process.

    Raises
    ------
    ValueError
        There are more inputs, and chunks.
    """
    if not learner.in_chunks:
        return _Whole(learner, inputs, more, step)
    if more:
        raise ValueError(
            f"optim.chunk_size must be null for an objective that has more inputs encoded ({', '.join(more)}), "
            f"got {learner.config.optim.chunk_size}"
        )
    return _InChunks(learner, inputs, step)


@torch.no_grad()
def encode_keys(learner: Learner, inputs: dict[Modality, Tensor]) -> dict[Modality, Encoding]:
    """Encode with the key encoders, in chunks: what they make of a clip does not depend on the others."""
    parts: list[dict[Modality, Encoding]] = []
    for rows in zip(*(each.split(learner.rows_at_a_time) for each in inputs.values()), strict=True):
        with learner.autocast():
            parts.append(learner.key_encoder(**dict(zip(inputs, rows, strict=True))))
    return {modality: Encoding.cat([part[modality] for part in parts]) for modality in inputs}


def gather_encodings(processes: Processes, encodings: dict[_Name, Encoding]) -> dict[_Name, Encoding]:
    """The encodings of the whole batch, on every process, with their gradient; one exchange for each."""
    if processes.count == 1:
        return encodings
    return {name: _gathered(processes, encoding) for name, encoding in encodings.items()}


def _gathered(processes: Processes, encoding: Encoding) -> Encoding:
    tensors = {field.name: getattr(encoding, field.name) for field in dataclasses.fields(encoding)}
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    columns = [tensor.reshape(len(tensor), -1) for tensor in present.values()]
    whole = processes.gather(torch.cat(columns, dim=1)).split([part.shape[1] for part in columns], dim=1)
    return Encoding(
        **{
            name: rows.reshape(-1, *tensor.shape[1:]).to(tensor.dtype)
            for (name, tensor), rows in zip(present.items(), whole, strict=True)
        }
    )


class _Whole:
    def __init__(
        self, learner: Learner, inputs: dict[Modality, Tensor], more: Mapping[str, ExtraInput], step: int
    ) -> None:
        self._learner = learner
        rows = next(iter(inputs.values()))
        queries = {modality: each for modality, each in inputs.items() if modality in learner.query_modalities}
        rest = {modality: each for modality, each in inputs.items() if modality not in queries}
        with learner.autocast(), _seeded_dropout(learner, step, learner.processes.rank * len(rows)):
            # All inputs in one call: DistributedDataParallel expects one forward pass for each backward pass.
            encodings: dict[Any, Encoding] = learner.replica(
                **queries,
                feature_maps_of=learner.query_maps,
                more={name: (extra.modality, extra.tensor, extra.with_feature_map) for name, extra in more.items()},
            )
            # For health and running statistics; the loss does not depend on them.
            with torch.no_grad():
                encodings |= learner.encoder(**rest)
        self.queries: dict[Modality, Encoding] = {modality: encodings[modality] for modality in inputs}
        self.more: dict[str, Encoding] = {name: encodings[name] for name in more}

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # DistributedDataParallel exchanges the encoders' gradients meanwhile
        learner = self._learner
        learner.processes.average(_gradients(learner.objective))
        if isinstance(learner.objective, DrawingObjective):
            _forget_zeros(learner.encoder)


class _InChunks:
    def __init__(self, learner: Learner, inputs: dict[Modality, Tensor], step: int) -> None:
        self._learner, self._step = learner, step
        self.queries: dict[Modality, Encoding] = {}
        self.more: dict[str, Encoding] = {}
        self._features: dict[Modality, Tensor] = {}
        # With the graph of the norm of the inputs, and cut off from it.
        self._prepared: dict[Modality, Tensor] = {}
        self._leaves: dict[Modality, Tensor] = {}
        for modality in inputs:
            encoder = self._encoder(modality)
            # Before the graph: statistics that it needs must not be restored after it was built.
            with torch.no_grad(), statistics_kept(encoder.backbone):
                prepared = self._prepare(modality, inputs[modality])
                features = torch.cat(list(self._chunks(modality, prepared)))
            self._features[modality] = features.requires_grad_()
            self.queries[modality] = encoder.project(features)
            prepared = self._prepare(modality, inputs[modality])
            self._prepared[modality] = prepared
            self._leaves[modality] = prepared.detach().requires_grad_(prepared.requires_grad)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        learner = self._learner
        for modality, features in self._features.items():
            leaf, gradient = self._leaves[modality], features.grad
            if gradient is None:  # the loss does not depend on this modality
                continue
            if leaf.requires_grad or any(p.requires_grad for p in self._encoder(modality).backbone.parameters()):
                for chunk, part in zip(
                    self._chunks(modality, leaf), gradient.split(learner.rows_at_a_time), strict=True
                ):
                    chunk.backward(part)
            if leaf.grad is not None:
                self._prepared[modality].backward(leaf.grad)
        # Not by DistributedDataParallel, which expects one pass through the whole encoder, head included.
        learner.processes.average([*_gradients(learner.encoder), *_gradients(learner.objective)])

    def _prepare(self, modality: Modality, inputs: Tensor) -> Tensor:
        backbone = self._encoder(modality).backbone
        with self._learner.autocast():
            return backbone.prepare(inputs) if isinstance(backbone, Backbone) else inputs

    def _chunks(self, modality: Modality, prepared: Tensor) -> Iterator[Tensor]:
        """The features of each chunk; the same ones each time."""
        backbone = self._encoder(modality).backbone
        first = self._learner.processes.rank * len(prepared)
        for start in range(0, len(prepared), self._learner.rows_at_a_time):
            rows = prepared[start : start + self._learner.rows_at_a_time]
            with (
                self._learner.autocast(),
                _seeded_dropout(self._learner, self._step, first + start, MODALITIES.index(modality)),
            ):
                features: Tensor = backbone(rows, prepared=True) if isinstance(backbone, Backbone) else backbone(rows)
            yield features

    def _encoder(self, modality: Modality) -> Encoder:
        encoder = getattr(self._learner.encoder, modality)
        assert isinstance(encoder, Encoder)
        return encoder


def _forget_zeros(module: nn.Module) -> None:
    """Set gradients of nothing but zeros to None: those of weights that the loss does not depend on.

    Weight decay would shrink them. Their gradient is None in one process, and zeros after an exchange between several.
    """
    used = [parameter for parameter in module.parameters() if parameter.grad is not None]
    if not used:
        return
    largest = torch.stack([parameter.grad.abs().max() for parameter in used if parameter.grad is not None])
    for parameter, value in zip(used, largest.tolist(), strict=True):
        if value == 0:
            parameter.grad = None


def _gradients(module: object) -> list[Tensor]:
    if not isinstance(module, nn.Module):
        return []
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def _seeded_dropout(learner: Learner, step: int, *place: int) -> AbstractContextManager[None]:
    """Within it, a tower's dropout draws by (seed, step, place in the batch).

    cmacc's own encoders have no dropout, and copying a GPU's generator waits for the GPU.
    """
    if not learner.config.trains_tower:
        return nullcontext()
    return seeded_generators(learner.device, seeds.DROPOUT, learner.config.seed, step, *place)
