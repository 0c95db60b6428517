"""Fusion by cross-modal attention, after MulT (Tsai et al. 2019, arXiv:1906.00295).

1. Every sequence is projected to the same width d, without bias, times sqrt(d), plus sinusoids that tell the step.
2. For every ordered pair of modalities, a transformer lets the target's steps attend to the source's. Keys and values
   are the source's sequence of step 1 in every layer, under the same layer norm as the queries:

       z <- z + attention(LN(z), LN(source), LN(source)),      z <- z + W2 relu(W1 LN(z))

3. Of each target, the results of all its sources are concatenated, and a self-attention transformer of the same form
   runs over them. Its last *valid* step describes the target.
4. The descriptions x are concatenated; outputs = W (x + W2 relu(W1 x)).

What differs from the released code, and why. Padding is masked as a key, and the step that is read is the last valid
one: there, a sequence padded behind is read at padding. Steps are numbered by their place: there, a step whose first
feature happens to be exactly 0 gets no code. They are numbered once, at the input: there, again before step 3. Every
query sees all valid keys: there, query i sees keys up to i + |T_k - T_q| only, a rule that counts padding. The number
of layers is what the setting says: there, self-attention never has fewer than five. One dropout rate stands for the
code's several.

A source that an item lacks adds nothing: the attention's result is zero, and the target's own steps pass. A target that
it lacks is described by zeros.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from cmacc.heads.fusion_parts import last_valid

_LONGEST_WAVE = 10_000.0


class CrossModalFusion(nn.Module):
    """Outputs from sequences that attend to each other.

    Parameters
    ----------
    widths
        Sizes of the steps of each modality, at least two of them.
    outputs
        Number of outputs.
    width
        d, a multiple of ``heads``.
    layers, heads
        Of each transformer.
    dropout
        In training: of the projected sequences, the attention's weights, and what each block adds.
    """

    def __init__(
        self, widths: Sequence[int], outputs: int, *, width: int, layers: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(size, width, bias=False) for size in widths)
        self.cross = nn.ModuleList(
            nn.ModuleList(_Transformer(width, layers, heads, dropout) for _ in widths[1:]) for _ in widths
        )
        joined = width * (len(widths) - 1)
        self.own = nn.ModuleList(_Transformer(joined, layers, heads, dropout) for _ in widths)
        described = joined * len(widths)
        self.inner = nn.Linear(described, described)
        self.outer = nn.Linear(described, described)
        self.output = nn.Linear(described, outputs)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, sequences: Sequence[Float[Tensor, "batch _ _"]], lengths: Int[Tensor, "batch modalities"]
    ) -> Float[Tensor, "batch outputs"]:
        """Outputs; a length of 0 says that the item lacks the modality. What stands after the length must be finite."""
        inputs = [self._with_steps(number, sequence) for number, sequence in enumerate(sequences)]
        masks = [_valid(sequence.shape[1], lengths[:, number]) for number, sequence in enumerate(sequences)]
        described: list[Tensor] = []
        for target, (query, pairs, own) in enumerate(zip(inputs, self.cross, self.own, strict=True)):
            assert isinstance(pairs, nn.ModuleList)
            sources = [number for number in range(len(inputs)) if number != target]
            seen = [pair(query, inputs[s], masks[s]) for s, pair in zip(sources, pairs, strict=True)]
            joined = torch.cat(seen, dim=2)
            described.append(last_valid(own(joined, None, masks[target]), lengths[:, target]))
        x = torch.cat(described, dim=1)
        outputs: Tensor = self.output(x + self.outer(self.dropout(functional.relu(self.inner(x)))))
        return outputs

    def _with_steps(self, number: int, sequence: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time d"]:
        projected = self.project[number](sequence)
        steps, width = projected.shape[1:]
        dropped: Tensor = self.dropout(projected * math.sqrt(width) + step_codes(steps, width).to(projected))
        return dropped


class _Transformer(nn.Module):
    """Layers in which a sequence attends to a source, or to itself, and a last layer norm."""

    def __init__(self, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        x: Float[Tensor, "batch queries width"],
        source: Float[Tensor, "batch keys width"] | None,
        valid: Bool[Tensor, "batch keys"],
    ) -> Float[Tensor, "batch queries width"]:
        """``source`` None: the sequence attends to itself. ``valid`` is of the keys."""
        for layer in self.layers:
            x = layer(x, x if source is None else source, valid)
        normalised: Tensor = self.norm(x)
        return normalised


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.inner_norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 4 * width)
        self.outer = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "batch queries width"],
        source: Float[Tensor, "batch keys width"],
        valid: Bool[Tensor, "batch keys"],
    ) -> Float[Tensor, "batch queries width"]:
        keys = self.attention_norm(source)
        # A softmax over no key at all is NaN, also for its gradient: of an absent source, one key is left in and the
        # result multiplied by 0.
        some = valid.any(dim=1)
        hidden = ~valid
        hidden[:, 0] &= some
        seen, _ = self.attention(self.attention_norm(x), keys, keys, key_padding_mask=hidden, need_weights=False)
        x = x + self.dropout(seen * some[:, None, None])
        added: Tensor = self.dropout(self.outer(self.dropout(functional.relu(self.inner(self.inner_norm(x))))))
        return x + added


def step_codes(steps: int, width: int) -> Float[Tensor, "steps width"]:
    """Sinusoids of Vaswani et al. 2017: sines in the first half of the width, cosines in the second."""
    half = (width + 1) // 2
    waves = torch.exp(-math.log(_LONGEST_WAVE) * torch.arange(half) / max(half - 1, 1))
    angles = torch.arange(steps)[:, None] * waves
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


def _valid(steps: int, lengths: Int[Tensor, " batch"]) -> Bool[Tensor, "batch steps"]:
    return torch.arange(steps, device=lengths.device) < lengths[:, None]
