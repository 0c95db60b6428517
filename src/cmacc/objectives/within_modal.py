"""Contrast within one modality: two augmented views of a sample against the other samples of the batch.

The idea of SimCLR (Chen et al., 2020, arXiv:2002.05709), with one difference: the negatives of a first view are the
other samples' second views, and the reverse. The first views among themselves are no negatives. So the loss of a
direction is that of `CrossModalContrast`, with the second view in the place of the other modality.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cmacc.objectives.crossmodal import CrossModalContrast
from cmacc.objectives.objective import BatchViews, Drawn, ExtraInput, ObjectiveInputs, ObjectiveResult

_MODALITIES = ("video", "audio")


@dataclass(frozen=True)
class WithinModalConfig:
    """Settings of `WithinModalContrast`.

    Parameters
    ----------
    modalities
        The modalities that are contrasted, each with itself. Those that a batch does not have are skipped.
    temperature
        tau > 0.
    decoupled
        Whether to exclude the positive from the denominator (`CrossModalContrast`).

    Raises
    ------
    ValueError
        There is no modality, one is unknown or given twice, or the temperature is not positive and finite.
    """

    modalities: tuple[str, ...] = _MODALITIES
    temperature: float = 0.1
    decoupled: bool = True

    def __post_init__(self) -> None:
        chosen = self.modalities
        if not chosen or not set(chosen) <= set(_MODALITIES) or len(set(chosen)) < len(chosen):
            raise ValueError(
                f"objective.within_modal.modalities must be video, audio or both, each once, got {list(chosen)}"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"objective.within_modal.temperature must be positive, got {self.temperature}")


class WithinModalContrast(nn.Module):
    """Contrast of a sample's view with another augmented view of it, in both directions.

    The loss of a modality is the mean of two losses: the query's view against the other views of the batch, and the
    other view against the queries. The losses of the modalities are added. It encodes each modality once more.

    Parameters
    ----------
    config
        The settings.

    Notes
    -----
    Metrics: ``loss``, and of each modality ``<modality>/loss`` and ``<modality>/top1``, the share of views whose
    positive scores above every negative. They are NaN if there is no negative.
    """

    needs_keys = False
    needs_feature_maps = False

    def __init__(self, config: WithinModalConfig) -> None:
        super().__init__()
        self.modalities = config.modalities
        self.contrast = CrossModalContrast(config.temperature, in_batch=True, decoupled=config.decoupled)

    def draw(self, batch: BatchViews) -> Drawn:
        """Another augmented view of each modality.

        Raises
        ------
        ValueError
            The batch has none of the modalities.
        """
        present = [modality for modality in self.modalities if modality in batch.inputs]
        if not present:
            raise ValueError(
                f"objective.within_modal.modalities must name one that the run uses ({', '.join(batch.inputs)}), "
                f"got {list(self.modalities)}"
            )
        return Drawn({modality: ExtraInput(modality, batch.another(modality)) for modality in present})

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveResult:
        """The sum over the modalities of the mean of both directions."""
        losses: list[Tensor] = []
        logged: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        ids = inputs.sample_ids
        for modality, other in inputs.more.items():
            first, second = inputs.queries[modality].embedding, other.embedding
            directions = [self.contrast(first, second, ids, ids), self.contrast(second, first, ids, ids)]
            loss = torch.stack([direction.loss for direction in directions]).mean()
            losses.append(loss)
            # NaN without negatives: a loss of 0 would look like the best possible one.
            logged.append(torch.where(directions[0].ceiling > 0, loss.detach(), torch.nan))
            metrics[f"{modality}/loss"] = logged[-1]
            metrics[f"{modality}/top1"] = torch.stack([direction.top1 for direction in directions]).mean()
        return ObjectiveResult(torch.stack(losses).sum(), metrics | {"loss": torch.stack(logged).sum()})
