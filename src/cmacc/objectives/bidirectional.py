"""Cross-modal contrast in both directions: video to audio plus audio to video (Ma et al., 2021, eq. 2)."""

from typing import Literal

import torch
from torch import Tensor, nn

from cmacc.objectives.crossmodal import CrossModalContrast, DirectionLoss
from cmacc.objectives.objective import Encoded, Negatives, ObjectiveInputs, ObjectiveResult

BatchKeys = Literal["online", "momentum", "both"]
"""Which encoder the positive and the keys of the batch come from; see `BidirectionalContrast`."""
_DIRECTIONS = (("video", "audio"), ("audio", "video"))


class BidirectionalContrast(nn.Module):
    """The paper's objective, and variants of it by the kind of the batch's keys.

    Parameters
    ----------
    temperature
        tau > 0.
    in_batch
        Whether the other keys of the batch are negatives too.
    batch_keys
        Which encoder the positive and the in-batch keys come from. ``online``: the query encoders, with gradient, as in
        CLIP. ``momentum``: the key encoders, without gradient, as in the paper. ``both``: the mean of two losses, one
        over the batch's online keys, and one whose positive, in-batch keys and dictionary come from the key encoders.
    decoupled
        Whether to exclude the positive from the denominator (`CrossModalContrast`).

    Notes
    -----
    Metrics of each direction, ``video_to_audio`` and ``audio_to_video``:

    * ``loss`` and ``top1``: against the dictionary, and the batch's keys if they are negatives;
    * ``batch_loss``: the cross entropy over the batch's keys only (for ``both``, the online ones);
    * ``mutual_information``: the InfoNCE estimate in nats. It uses the cross entropy also if the decoupled loss is
      minimised, which is not an estimate.

    ``mutual_information_ceiling`` is the mean upper bound of the estimates (`DirectionLoss.ceiling`). All metrics
    except the ceiling are NaN if there is no negative, as at the first step of a run without in-batch negatives.
    """

    needs_feature_maps = False

    def __init__(
        self,
        temperature: float = 0.07,
        in_batch: bool = True,
        batch_keys: BatchKeys = "both",
        decoupled: bool = False,
    ) -> None:
        super().__init__()
        self.contrast = CrossModalContrast(temperature, in_batch, decoupled)
        self.batch_keys = batch_keys

    @property
    def needs_keys(self) -> bool:
        """True unless ``batch_keys`` is ``online``."""
        return self.batch_keys != "online"

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveResult:
        """The sum of both directions."""
        losses: list[Tensor] = []
        ceilings: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        for query, key in _DIRECTIONS:
            terms = self._terms(inputs, query, key)
            losses.append(torch.stack([term.loss for term in terms]).mean())
            ceilings.append(terms[0].ceiling)
            metrics |= {f"{query}_to_{key}/{name}": value for name, value in _figures(terms).items()}
        loss = sum(losses)
        assert isinstance(loss, Tensor)
        ceiling = torch.stack(ceilings).mean()
        metrics |= {"loss": _unless_alone(loss.detach(), ceiling), "mutual_information_ceiling": ceiling}
        return ObjectiveResult(loss, metrics)

    def _terms(self, inputs: ObjectiveInputs, query: str, key: str) -> list[DirectionLoss]:
        """The losses of one direction, whose mean is minimised. The first is the one with the dictionary."""

        def among(keys: Encoded, negatives: Negatives | None) -> DirectionLoss:
            result: DirectionLoss = self.contrast(
                inputs.queries[query].embedding,
                keys.embedding,
                inputs.sample_ids,
                inputs.sample_ids,
                negatives=negatives.embedding if negatives is not None else None,
                negative_ids=negatives.sample_ids if negatives is not None else None,
            )
            return result

        dictionary = inputs.negatives.get(key)
        if self.batch_keys == "online":
            return [among(inputs.queries[key], dictionary)]
        by_key_encoder = among(inputs.keys[key], dictionary)
        if self.batch_keys == "momentum":
            return [by_key_encoder]
        # Never the dictionary together with online keys: negatives of another kind than the positive made retrieval
        # worse than no dictionary at all (docs/evidence-dictionary.md).
        return [by_key_encoder, among(inputs.queries[key], None)]


def _figures(terms: list[DirectionLoss]) -> dict[str, Tensor]:
    first, last = terms[0], terms[-1]
    loss = _unless_alone(first.loss.detach(), first.ceiling)
    return {
        "loss": loss,
        "top1": first.top1,
        "mutual_information": first.ceiling - _unless_alone(first.cross_entropy, first.ceiling),
        "batch_loss": last.batch_loss.detach(),
    }


def _unless_alone(loss: Tensor, ceiling: Tensor) -> Tensor:
    """NaN if the positive had no negatives: a loss of 0 would look like the best possible one."""
    return torch.where(ceiling > 0, loss, torch.nan)
