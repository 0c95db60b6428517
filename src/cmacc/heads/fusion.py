"""Fusion of feature sequences of any number of modalities, for sentiment, emotion and the like.

Of an item, each modality m is a sequence x_m of some length, or is absent. An LSTM makes one state h_m of it, its
output at the last valid step, then dropout; h_m = 0 if m is absent (``early`` and ``cross_modal`` do without h_m). The
methods, with all sums and products over the modalities:

1. ``early``: the features of all modalities are concatenated step by step (so they must be aligned), one LSTM reads
   them, and outputs are linear in its state.
2. ``late``: a linear prediction from each h_m; their average over the modalities that are present.
3. ``tensor`` (TFN, Zadeh et al. 2017, arXiv:1707.07250): the outer product of all [1; h_m], flattened with the last
   modality's index fastest, then two layers of ReLU and a linear one.
4. ``low_rank`` (LMF, Liu et al. 2018, arXiv:1806.00064): output o is sum_r prod_m ([1; h_m] . W_m[r, :, o]) + b_o: a
   linear map of that outer product whose weights have rank r at most.
5. ``gated`` (GMU, Arevalo et al. 2017, arXiv:1702.01992): outputs are linear in sum_m z_m * tanh(U_m h_m), where the
   gates z are a softmax over the modalities present, for every unit, of a linear map of all h together. For two
   modalities, this is the paper's z and 1 - z; for more, it has gates that need not sum to one.
6. ``cross_modal`` (MulT): see `cmacc.heads.cross_modal_fusion`.

``late`` is additive: it cannot learn what depends on a product of two modalities, such as whether they agree. All
others can.

A modality that is absent leaves the neutral element: zeros in ``early``, the constant 1 alone in ``tensor`` and
``low_rank``, no part in the average or the gates of ``late`` and ``gated``, nothing to attend to in ``cross_modal``.

What differs from the papers. They use other encoders for sound and picture, a mean over time with three layers, and
other sizes for each modality; here the encoder is the same for all methods, so that a comparison is one of fusions. TFN
squashes its output into [-3, 3]; here, no method does. LMF's code has a weight for each rank, which any factor can take
up. Features are used as they come: the caller standardises them by statistics of the training part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from cmacc.heads.cross_modal_fusion import CrossModalFusion
from cmacc.heads.fusion_parts import EarlyFusion, GatedJoin, LateJoin, LowRankJoin, StateFusion, TensorJoin
from cmacc.heads.head import Head, Rows

FusionMethod = Literal["early", "late", "tensor", "low_rank", "gated", "cross_modal"]
"""How modalities are joined; the module's docstring says what each does."""
FusionTask = Literal["regression", "classification", "multilabel"]
"""What is predicted: numbers, one class, or several labels an item."""
_MOST_PRODUCTS = 2**20


class FusionError(ValueError):
    """Settings or rows that a fusion cannot be made of; the message says which and why."""


@dataclass(frozen=True)
class FusionConfig:
    """Sizes of `FusionHead`.

    Parameters
    ----------
    width
        Size of each modality's state; for ``early``, of the one state; for ``cross_modal``, d, a multiple of ``heads``.
    hidden
        Size of the two hidden layers of ``tensor``.
    rank
        Of ``low_rank``.
    layers, heads
        Of each transformer of ``cross_modal``.
    dropout
        Rate in [0, 1), in training, of the states and in ``cross_modal``.

    Raises
    ------
    FusionError
        A setting is out of its range.

    Notes
    -----
    In the papers: TFN has states of 4, 16 and 64 and hidden layers of 32; LMF ranks of 1 to 16; MulT a width of 30,
    five layers and five heads.
    """

    width: int = 16
    hidden: int = 32
    rank: int = 4
    layers: int = 2
    heads: int = 4
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("width", "hidden", "rank", "layers", "heads"):
            if getattr(self, name) < 1:
                raise FusionError(f"fusion.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise FusionError(f"fusion.dropout must be in [0, 1), got {self.dropout}")


class FusionHead(Head):
    """Predictions from feature sequences of several modalities.

    Rows, with one row per item: ``<modality>`` (B, T, width), whose values after the length do not matter;
    ``<modality>_length`` (B,), integers in [0, T]; ``present`` (B, modalities), in the order of ``widths``; for the
    loss, ``targets``, of a shape that depends on the task.

    Parameters
    ----------
    method
        The fusion.
    widths
        Size of a step by modality, in the order of ``present``.
    outputs
        Numbers to predict, classes, or labels.
    task
        ``regression``: L1 loss, targets (B, outputs). ``classification``: cross entropy, targets (B,), class numbers.
        ``multilabel``: binary cross entropy, targets (B, outputs), 0 or 1.
    config
        Sizes.

    Raises
    ------
    FusionError
        Widths, outputs and settings do not fit the method.
    """

    def __init__(
        self,
        method: FusionMethod,
        widths: Mapping[str, int],
        outputs: int,
        task: FusionTask = "regression",
        config: FusionConfig | None = None,
    ) -> None:
        super().__init__()
        config = config or FusionConfig()
        _check_settings(method, widths, outputs, task, config)
        self.method = method
        self.widths = dict(widths)
        self.outputs = outputs
        self.task = task
        self.fusion = _fusion(method, list(widths.values()), outputs, config)

    def loss(self, rows: Rows, progress: float) -> Float[Tensor, ""]:
        """Mean loss of a batch; ``progress`` does not matter.

        Raises
        ------
        FusionError
            The rows are not as described above, or an item has no modality.
        """
        outputs = self._outputs(rows)
        targets = rows.get("targets")
        shape = (len(outputs),) if self.task == "classification" else (len(outputs), self.outputs)
        if targets is None or targets.shape != shape or targets.is_floating_point() == (self.task == "classification"):
            kind = "class numbers" if self.task == "classification" else "floats"
            got = "none" if targets is None else f"{targets.dtype} {tuple(targets.shape)}"
            raise FusionError(f"fusion: targets of {self.task} must be {kind} of shape {shape}, got {got}")
        return fusion_loss(self.task, outputs, targets)

    @torch.no_grad()
    def predict(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        """``outputs`` (B, outputs): numbers, or logits of classes or labels. The caller has set the evaluation mode.

        Raises
        ------
        FusionError
            As in `loss`.
        """
        return {"outputs": self._outputs(rows)}

    def _outputs(self, rows: Rows) -> Float[Tensor, "batch outputs"]:
        sequences, lengths = _checked(rows, self.widths)
        steps = sorted({sequence.shape[1] for sequence in sequences})
        if self.method == "early" and len(steps) > 1:
            raise FusionError(
                f"fusion early: sequences must be aligned, with as many steps in every modality, got "
                f"{' and '.join(map(str, steps))} steps; the other methods take any"
            )
        outputs: Tensor = self.fusion(sequences, lengths)
        return outputs


def fusion_loss(task: FusionTask, outputs: Float[Tensor, "batch outputs"], targets: Tensor) -> Float[Tensor, ""]:
    """Mean loss: L1 for regression, cross entropy for classes, binary cross entropy for labels."""
    if task == "regression":
        return functional.l1_loss(outputs, targets)
    if task == "multilabel":
        return functional.binary_cross_entropy_with_logits(outputs, targets)
    return functional.cross_entropy(outputs, targets)


def _fusion(method: FusionMethod, widths: Sequence[int], outputs: int, config: FusionConfig) -> nn.Module:
    state, dropout, count = config.width, config.dropout, len(widths)
    if method == "early":
        return EarlyFusion(widths, outputs, state, dropout)
    if method == "cross_modal":
        return CrossModalFusion(widths, outputs, width=state, layers=config.layers, heads=config.heads, dropout=dropout)
    join: nn.Module
    if method == "late":
        join = LateJoin(count, state, outputs)
    elif method == "tensor":
        join = TensorJoin(count, state, config.hidden, outputs)
    elif method == "low_rank":
        join = LowRankJoin(count, state, config.rank, outputs)
    else:
        join = GatedJoin(count, state, outputs)
    return StateFusion(widths, state, dropout, join)


def _check_settings(
    method: FusionMethod, widths: Mapping[str, int], outputs: int, task: FusionTask, config: FusionConfig
) -> None:
    if method not in get_args(FusionMethod):
        raise FusionError(f"fusion: method must be one of {', '.join(get_args(FusionMethod))}, got {method}")
    if task not in get_args(FusionTask):
        raise FusionError(f"fusion: task must be one of {', '.join(get_args(FusionTask))}, got {task}")
    if not widths or min(widths.values()) < 1:
        raise FusionError(f"fusion: widths must be of at least one modality, all at least 1, got {dict(widths)}")
    least = 2 if task == "classification" else 1
    if outputs < least:
        raise FusionError(f"fusion: outputs of {task} must be at least {least}, got {outputs}")
    products = (config.width + 1) ** len(widths)
    if method == "tensor" and products > _MOST_PRODUCTS:
        raise FusionError(
            f"fusion tensor: (width + 1) ** modalities must be at most {_MOST_PRODUCTS:,}, got {products:,} for width "
            f"{config.width} and {len(widths)} modalities; lower the width or use low_rank"
        )
    if method == "cross_modal" and len(widths) < 2:
        raise FusionError(f"fusion cross_modal: must have at least 2 modalities, got {', '.join(widths)}")
    if method == "cross_modal" and config.width % config.heads:
        raise FusionError(
            f"fusion cross_modal: width must be a multiple of heads, got {config.width} and {config.heads} heads"
        )


def _checked(
    rows: Rows, widths: Mapping[str, int]
) -> tuple[list[Float[Tensor, "batch _ _"]], Int[Tensor, "batch modalities"]]:
    """The sequences, zero after their end, and their lengths, 0 for a modality that is absent."""
    names = [*widths, *(f"{name}_length" for name in widths), "present"]
    missing = [name for name in names if name not in rows]
    if missing:
        raise FusionError(f"fusion: rows must hold {', '.join(names)}, got no {', '.join(missing)}")
    count = len(rows["present"])
    if rows["present"].shape != (count, len(widths)) or rows["present"].dtype != torch.bool:
        got = f"{rows['present'].dtype} {tuple(rows['present'].shape)}"
        raise FusionError(f"fusion: present must be booleans of shape (B, {len(widths)}), got {got}")
    for name, width in widths.items():
        shape, length = tuple(rows[name].shape), rows[f"{name}_length"]
        if len(shape) != 3 or shape[0] != count or shape[1] < 1 or shape[2] != width:
            raise FusionError(f"fusion, {name}: must have shape ({count}, T, {width}), T at least 1, got {shape}")
        if length.shape != (count,) or length.is_floating_point():
            got = f"{length.dtype} {tuple(length.shape)}"
            raise FusionError(f"fusion, {name}_length: must be integers of shape ({count},), got {got}")
    present = rows["present"]
    lengths = torch.stack([rows[f"{name}_length"] for name in widths], dim=1)
    steps = torch.tensor([rows[name].shape[1] for name in widths], device=lengths.device)
    fits = (lengths >= present.long()) & (lengths <= steps)
    # One question to the device in the usual case, for it waits for the answer.
    if not (fits & present.any(dim=1, keepdim=True)).all():
        if not fits.all():
            item, place = fits.logical_not().nonzero()[0].tolist()
            raise FusionError(
                f"fusion, {list(widths)[place]}_length: must be in [0, {int(steps[place])}], and at least 1 where the "
                f"modality is present, got {int(lengths[item, place])} in row {item} of the batch"
            )
        item = int(present.any(dim=1).logical_not().nonzero()[0])
        raise FusionError(f"fusion: every item must have at least one modality, row {item} of the batch has none")
    lengths = lengths * present
    sequences = []
    for place, name in enumerate(widths):
        past = torch.arange(rows[name].shape[1], device=lengths.device) >= lengths[:, place, None]
        # Also where the padding is NaN, which a weight of 0 would let through.
        sequences.append(rows[name].masked_fill(past[:, :, None], 0))
    return sequences, lengths
