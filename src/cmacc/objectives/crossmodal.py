"""The contrastive loss between two modalities (Ma et al., 2021, eq. 2; InfoNCE, van den Oord et al., 2018).

Or the decoupled one (DCL; Yeh et al., 2022, arXiv:2110.06848, eq. 6), which leaves the positive out of the denominator:

    InfoNCE_i = -s_ii + log(exp(s_ii) + sum_j exp(s_ij)),      DCL_i = -s_ii + log(sum_j exp(s_ij)),      s = q.k / tau

Their gradients point the same way: InfoNCE's is DCL's times q_i, the negatives' share of the denominator. With few
negatives q_i is soon near 0, and the sample teaches nothing more; DCL does without that factor.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class DirectionLoss:
    """One direction's outcome, all means over the queries; only the loss has a gradient.

    Attributes
    ----------
    loss
        What is minimised, in nats: the cross entropy, or the decoupled loss, which may be below zero.
    cross_entropy
        Of the positive among itself and all negatives, whatever is minimised.
    top1
        Share of queries whose positive scores above every negative; NaN where no query has any.
    ceiling
        log of how many keys a query's positive stands among, itself included; a query's own sample is not counted.
        ``ceiling - cross_entropy`` is the InfoNCE estimate of the mutual information between the modalities, which can
        never be above ``ceiling`` (van den Oord et al., 2018, eq. 9; Poole et al., 2019, section 2.2). It is a lower
        bound only for negatives that are drawn at random: chosen ones are harder than that, and the estimate lower.
    batch_loss
        The cross entropy among the batch's keys alone; NaN where they are no negatives. At ``log`` of the batch's size
        nothing within the batch is told apart, whatever the dictionary does to ``loss``.
    """

    loss: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]
    top1: Float[Tensor, ""]
    ceiling: Float[Tensor, ""]
    batch_loss: Float[Tensor, ""]


class CrossModalContrast(nn.Module):
    """Every query's positive against its negatives, at a temperature: InfoNCE, or the decoupled loss.

    Parameters
    ----------
    temperature
        tau > 0.
    in_batch
        Whether the other keys of the batch are negatives too.
    decoupled
        Whether to leave the positive out of the denominator (DCL). A query without any negative then has a loss of 0.

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
        """Loss of queries of one modality against keys of the other. Call it once a direction and add.

        Parameters
        ----------
        queries
            ``(M, d)``, of length one. Query ``i``'s positive is ``keys[i]``.
        keys
            ``(M', d)``, M' >= M: the batch's keys (of all processes, this one's first).
        query_ids, key_ids
            Sample ids. A key or negative of a query's own sample is no negative of that query.
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
        # float32 at least, also under autocast: half precision leaves three digits of a score that 1 / tau blows up.
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
            top1 = torch.where(ceiling > 0, top1, torch.nan)  # alone, every positive would lead
            # Of the columns the first is the positive, then come the batch's keys.
            among = scores[:, : 1 + len(keys)] if self.in_batch else scores.new_full((len(queries), 1), torch.nan)
            batch_loss = (among.logsumexp(1) - among[:, 0]).mean()
        return DirectionLoss(loss, cross_entropy.detach(), top1, ceiling, batch_loss)


def _decoupled(scores: Float[Tensor, "batch columns"]) -> Float[Tensor, ""]:
    """Mean over the queries of log sum exp of the negatives less the positive, which is the first column."""
    positive, negatives = scores[:, 0], scores[:, 1:]
    alone = negatives.isneginf().all(1)
    # Filled before, not after: the gradient of logsumexp over nothing but -inf is NaN, and NaN times 0 is NaN.
    negatives = torch.where(alone[:, None], positive[:, None].detach(), negatives)
    total = negatives.logsumexp(1) if negatives.shape[1] > 0 else positive
    return torch.where(alone, 0.0, total - positive).mean()


def _masked(scores: Float[Tensor, "batch others"], own: Bool[Tensor, "batch others"]) -> Float[Tensor, "batch others"]:
    """Scores with a query's own sample taken out; the positive's own column among the batch's keys goes with it."""
    return scores.masked_fill(own, float("-inf"))


def _check_ids(name: str, ids: Tensor, rows: Tensor) -> None:
    # A single id would otherwise be broadcast over all rows, and mask all of them or none.
    if ids.shape != rows.shape[:1]:
        raise ValueError(
            f"CrossModalContrast: {name} must have one id for each of the {len(rows)} rows, got {tuple(ids.shape)}"
        )
