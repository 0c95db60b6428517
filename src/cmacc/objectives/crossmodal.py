"""The contrastive loss between two modalities (Ma et al., 2021, eq. 2; InfoNCE, van den Oord et al., 2018).

Alternatively, the decoupled loss (DCL; Yeh et al., 2022, arXiv:2110.06848, eq. 6) excludes the positive from the
denominator:

    InfoNCE_i = -s_ii + log(exp(s_ii) + sum_j exp(s_ij)),      DCL_i = -s_ii + log(sum_j exp(s_ij)),      s = q.k / tau

Their gradients have the same direction. InfoNCE's is DCL's times q_i, the negatives' share of the denominator. With few
negatives, q_i is soon close to 0 and the sample stops contributing. DCL has no such factor.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class DirectionLoss:
    """Results of one direction, all means over the queries. Only the loss has a gradient.

    Attributes
    ----------
    loss
        The loss to minimise, in nats: the cross entropy, or the decoupled loss, which can be negative.
    cross_entropy
        Cross entropy of the positive against all negatives, whichever loss is minimised.
    top1
        Share of queries whose positive scores above every negative; NaN if no query has negatives.
    ceiling
        log of the number of keys that a query is compared with, its positive included and other keys of its own sample
        excluded. ``ceiling - cross_entropy`` is the InfoNCE estimate of the mutual information between the modalities,
        which cannot exceed ``ceiling`` (van den Oord et al., 2018, eq. 9; Poole et al., 2019, section 2.2). It is a
        lower bound only for negatives drawn at random. Selected ones are harder, and the estimate is lower.
    batch_loss
        Cross entropy over the batch's keys only; NaN if they are not negatives. At ``log`` of the batch size, nothing
        within the batch is distinguished yet, whatever the dictionary does to ``loss``.
    """

    loss: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]
    top1: Float[Tensor, ""]
    ceiling: Float[Tensor, ""]
    batch_loss: Float[Tensor, ""]


class CrossModalContrast(nn.Module):
    """Contrastive loss of every query's positive against its negatives: InfoNCE, or the decoupled loss.

    Parameters
    ----------
    temperature
        tau > 0.
    in_batch
        Whether the other keys of the batch are negatives too.
    decoupled
        Whether to exclude the positive from the denominator (DCL). A query without negatives then has a loss of 0.

    Examples
    --------
    >>> loss = CrossModalContrast(temperature=0.1)
    >>> ids = torch.arange(3)
    >>> perfect = loss(torch.eye(3), torch.eye(3), ids, ids, negatives=-torch.eye(3), negative_ids=ids + 3)
    >>> round(perfect.loss.item(), 4), perfect.top1.item()
    (0.0002, 1.0)
    >>> decoupled = CrossModalContrast(temperature=0.1, decoupled=True)
    >>> round(decoupled(torch.eye(3), torch.eye(3), ids, ids).loss.item(), 4)  # log 2 - 1 / 0.1
    -9.3069
    """

    def __init__(self, temperature: float = 0.07, in_batch: bool = True, decoupled: bool = False) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"CrossModalContrast: temperature must be positive, got {temperature}")
        self.temperature = temperature
        self.in_batch = in_batch
        self.decoupled = decoupled

    def forward(
        self,
        queries: Float[Tensor, "batch dim"],
        keys: Float[Tensor, "keys dim"],
        query_ids: Int[Tensor, " batch"],
        key_ids: Int[Tensor, " keys"],
        *,
        negatives: Float[Tensor, "negatives dim"] | None = None,
        negative_ids: Int[Tensor, " negatives"] | None = None,
    ) -> DirectionLoss:
        """Loss of queries of one modality against keys of the other. Call it once per direction and add the losses.

        Parameters
        ----------
        queries
            ``(M, d)``, L2-normalised. The positive of query ``i`` is ``keys[i]``.
        keys
            ``(M', d)``, M' >= M: the batch's keys (of all processes, this one's first).
        query_ids, key_ids
            Sample ids. Keys and negatives of a query's own sample are not negatives of that query.
        negatives, negative_ids
            ``(K, d)`` and ``(K,)``: the dictionary. None or K = 0: no dictionary.

        Raises
        ------
        ValueError
            Negatives without ids or ids without negatives; fewer keys than queries; not one id for every row.
        """
        if (negatives is None) != (negative_ids is None):
            raise ValueError("CrossModalContrast: negatives and negative_ids must be given together, got one of them")
        if len(keys) < len(queries):
            raise ValueError(
                f"CrossModalContrast: keys must be at least as many as queries, got {len(keys)} and {len(queries)}"
            )
        _check_ids("query_ids", query_ids, queries)
        _check_ids("key_ids", key_ids, keys)
        # At least float32, also under autocast: half precision has three digits, and 1 / tau amplifies the error.
        dtype = torch.promote_types(queries.dtype, torch.float32)
        with torch.autocast(queries.device.type, enabled=False):
            queries, keys = queries.to(dtype), keys.to(dtype)
            logits = [(queries * keys[: len(queries)]).sum(1, keepdim=True)]
            if self.in_batch:
                logits.append(_masked(queries @ keys.T, query_ids[:, None] == key_ids[None]))
            if negatives is not None and negative_ids is not None:
                _check_ids("negative_ids", negative_ids, negatives)
                logits.append(_masked(queries @ negatives.to(dtype).T, query_ids[:, None] == negative_ids[None]))
            scores = torch.cat(logits, dim=1) / self.temperature
        cross_entropy = functional.cross_entropy(scores, scores.new_zeros(len(scores), dtype=torch.int64))
        loss = _decoupled(scores) if self.decoupled else cross_entropy
        with torch.no_grad():
            top1 = (scores[:, :1] > scores[:, 1:]).all(1).to(dtype).mean()
            ceiling = scores.isfinite().sum(1).to(dtype).log().mean()
            top1 = torch.where(ceiling > 0, top1, torch.nan)  # without negatives every positive is first
            # The first column is the positive; the batch's keys follow.
            among = scores[:, : 1 + len(keys)] if self.in_batch else scores.new_full((len(queries), 1), torch.nan)
            batch_loss = (among.logsumexp(1) - among[:, 0]).mean()
        return DirectionLoss(loss, cross_entropy.detach(), top1, ceiling, batch_loss)


def _decoupled(scores: Float[Tensor, "batch columns"]) -> Float[Tensor, ""]:
    """Mean over the queries of logsumexp of the negatives minus the positive, which is the first column."""
    positive, negatives = scores[:, 0], scores[:, 1:]
    alone = negatives.isneginf().all(1)
    # Filled before logsumexp, not after: its gradient is NaN if all inputs are -inf, and NaN times 0 is NaN.
    negatives = torch.where(alone[:, None], positive[:, None].detach(), negatives)
    total = negatives.logsumexp(1) if negatives.shape[1] > 0 else positive
    return torch.where(alone, 0.0, total - positive).mean()


def _masked(scores: Float[Tensor, "batch others"], own: Bool[Tensor, "batch others"]) -> Float[Tensor, "batch others"]:
    """Scores without a query's own sample. This also removes the positive's second column, among the batch's keys."""
    return scores.masked_fill(own, float("-inf"))


def _check_ids(name: str, ids: Tensor, rows: Tensor) -> None:
    # A single id would be broadcast over all rows, and mask all of them or none.
    if ids.shape != rows.shape[:1]:
        raise ValueError(
            f"CrossModalContrast: {name} must have one id for each of the {len(rows)} rows, got {tuple(ids.shape)}"
        )
