"""The parts of `cmacc.heads.fusion`: the encoder of a sequence, and what joins the states of several modalities.

All joins take the states h, zeros where an item lacks the modality, and whether it is present.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class SequenceEncoder(nn.Module):
    """The output of a one-layer LSTM at the last valid step; zeros for a sequence of length 0.

    It reads forward only, so the steps after the last valid one have no influence, and nothing need be packed.
    """

    def __init__(self, width: int, state: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, state, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, sequence: Float[Tensor, "batch time width"], lengths: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch state"]:
        """States in (-1, 1), before dropout."""
        every, _ = self.lstm(sequence)
        state: Tensor = self.dropout(last_valid(every, lengths))
        return state


class EarlyFusion(nn.Module):
    """One encoder over the features of all modalities, step by step, up to the end of the longest one."""

    def __init__(self, widths: Sequence[int], outputs: int, state: int, dropout: float) -> None:
        super().__init__()
        self.encoder = SequenceEncoder(sum(widths), state, dropout)
        self.output = nn.Linear(state, outputs)

    def forward(
        self, sequences: Sequence[Float[Tensor, "batch _ _"]], lengths: Int[Tensor, "batch modalities"]
    ) -> Float[Tensor, "batch outputs"]:
        outputs: Tensor = self.output(self.encoder(torch.cat(list(sequences), dim=2), lengths.amax(dim=1)))
        return outputs


class StateFusion(nn.Module):
    """One encoder for each modality, and a fusion of their states."""

    def __init__(self, widths: Sequence[int], state: int, dropout: float, join: nn.Module) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(SequenceEncoder(width, state, dropout) for width in widths)
        self.join = join

    def forward(
        self, sequences: Sequence[Float[Tensor, "batch _ _"]], lengths: Int[Tensor, "batch modalities"]
    ) -> Float[Tensor, "batch outputs"]:
        states = [
            encoder(sequence, lengths[:, number])
            for number, (encoder, sequence) in enumerate(zip(self.encoders, sequences, strict=True))
        ]
        outputs: Tensor = self.join(torch.stack(states, dim=1), lengths > 0)
        return outputs


class LateJoin(nn.Module):
    """The average of one linear prediction for each modality that is present."""

    def __init__(self, modalities: int, state: int, outputs: int) -> None:
        super().__init__()
        self.predictors = nn.ModuleList(nn.Linear(state, outputs) for _ in range(modalities))

    def forward(
        self, states: Float[Tensor, "batch modalities state"], present: Bool[Tensor, "batch modalities"]
    ) -> Float[Tensor, "batch outputs"]:
        each = torch.stack([predict(states[:, number]) for number, predict in enumerate(self.predictors)], dim=1)
        return (each * present[:, :, None]).sum(dim=1) / present.sum(dim=1, keepdim=True)


class TensorJoin(nn.Module):
    """Three layers on the outer product of the states."""

    def __init__(self, modalities: int, state: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear((state + 1) ** modalities, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, outputs),
        )

    def forward(
        self, states: Float[Tensor, "batch modalities state"], present: Bool[Tensor, "batch modalities"]
    ) -> Float[Tensor, "batch outputs"]:
        outputs: Tensor = self.layers(outer_product(states))
        return outputs


class LowRankJoin(nn.Module):
    """A linear map of low rank of the outer product of the states, which is never formed."""

    def __init__(self, modalities: int, state: int, rank: int, outputs: int) -> None:
        super().__init__()
        # At the start, the mean square of an output is the product of those of all [1; h], whatever the rank.
        deviation = rank ** (-0.5 / modalities) / math.sqrt(state + 1)
        self.factors = nn.Parameter(deviation * torch.randn(modalities, rank, state + 1, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(
        self, states: Float[Tensor, "batch modalities state"], present: Bool[Tensor, "batch modalities"]
    ) -> Float[Tensor, "batch outputs"]:
        factors = torch.einsum("bmn,mrno->bmro", _with_one(states), self.factors)
        return factors.prod(dim=1).sum(dim=1) + self.bias


class GatedJoin(nn.Module):
    """A linear map of the states' transforms, weighted unit by unit by gates that see all states."""

    def __init__(self, modalities: int, state: int, outputs: int) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(nn.Linear(state, state) for _ in range(modalities))
        self.gates = nn.Linear(modalities * state, modalities * state)
        self.output = nn.Linear(state, outputs)

    def forward(
        self, states: Float[Tensor, "batch modalities state"], present: Bool[Tensor, "batch modalities"]
    ) -> Float[Tensor, "batch outputs"]:
        each = torch.stack([f(states[:, number]) for number, f in enumerate(self.transforms)], dim=1).tanh()
        gates = self.gates(states.flatten(1)).view_as(states).masked_fill(~present[:, :, None], -torch.inf)
        outputs: Tensor = self.output((gates.softmax(dim=1) * each).sum(dim=1))
        return outputs


def outer_product(states: Float[Tensor, "batch modalities state"]) -> Float[Tensor, "batch products"]:
    """The outer product of all [1; state] of an item, flattened with the last modality's index fastest."""
    first, *others = _with_one(states).unbind(dim=1)
    product: Tensor = first
    for other in others:
        product = (product[:, :, None] * other[:, None]).flatten(1)
    return product


def last_valid(
    sequence: Float[Tensor, "batch time width"], lengths: Int[Tensor, " batch"]
) -> Float[Tensor, "batch width"]:
    """The step at which each sequence ends; zeros for those of length 0."""
    rows = torch.arange(len(sequence), device=sequence.device)
    return sequence[rows, (lengths - 1).clamp_min(0)] * (lengths > 0)[:, None]


def _with_one(states: Float[Tensor, "batch modalities state"]) -> Float[Tensor, "batch modalities one_more"]:
    return torch.cat([torch.ones_like(states[:, :, :1]), states], dim=2)
