"""Health of the embeddings of a batch and of a dictionary: spread, age, redundancy, share of false negatives."""

import logging
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cmacc.encoders import MODALITIES, Modality
from cmacc.negatives import Keys
from cmacc.pretraining.learner import Learner

log = logging.getLogger("cmacc")

# Limits of `CollapseAlarm`. Measured at every step, untrained and while learning (up to 1,500 steps), on vectors of 2
# to 200 classes with random and active batches, and on rendered clips of 2 and 4 classes; on the same runs that the
# limits were chosen by:
#   healthy, at learning rates up to 0.02: standard deviation at least 0.71, effective rank at least 3.1 with 8 samples
#   in a batch and 8.4 with 32; at 0.03 and above down to 0.22 and 2.65, while the loss still came down;
#   pulled to one point: standard deviation 0.02 and rank 1.9 with 32 samples; with 8, the standard deviation of one
#   modality stopped at 0.118, above the limit;
#   pairs pulled together without negatives: ranks of 2 to 6.5 after 400 steps, with 8, 32 and 128 samples, but a
#   standard deviation above 0.7, since the head's batch norm centres what it projects. With 8 samples, such ranks are
#   near healthy ones, and a collapse of this kind is told late or not at all.
_LEAST_STD = 0.1  # cosines of about 0.99 between the samples of a batch
_LEAST_RANK = 4.0
_LEAST_RANK_SHARE = 1 / 4  # of the possible rank, where that is below 16
# Recovery is well above the limit, or an encoder that stays at it would be told of again and again.
_RECOVERED = 1.5


class CollapseAlarm:
    """Logs a warning when the embeddings of a modality collapse, and another one when they have recovered.

    Collapsed are embeddings that are all alike (`embedding_health`: ``embedding_std`` below 0.1), or that lie along few
    directions (``effective_rank`` below 4, or below a quarter of the possible rank where that is less). Recovered are
    those that are at least 1.5 times above both limits.

    Parameters
    ----------
    possible_rank
        The largest possible rank: the batch size or the size of the embeddings, whichever is less.

    Attributes
    ----------
    collapsed
        The modalities that are collapsed.
    """

    def __init__(self, possible_rank: int) -> None:
        self._limits = {
            "embedding_std": _LEAST_STD,
            "effective_rank": min(_LEAST_RANK, _LEAST_RANK_SHARE * possible_rank),
        }
        self.collapsed: set[Modality] = set()

    def check(self, health: Mapping[str, float], step: int) -> None:
        """Compare the metrics of `embedding_health` at a step with the limits. Modalities without metrics are passed.

        Parameters
        ----------
        health
            Metrics, among others those of `embedding_health`.
        step
            Their step, for the message.
        """
        for modality in MODALITIES:
            # As shares of the limits: below 1 is too low.
            shares = {
                name: health[f"{modality}/{name}"] / limit
                for name, limit in self._limits.items()
                if f"{modality}/{name}" in health
            }
            if not shares:
                continue
            values = " and ".join(f"{name} {health[f'{modality}/{name}']:.3g}" for name in shares)
            if modality not in self.collapsed and min(shares.values()) < 1:
                self.collapsed.add(modality)
                limits = " and ".join(f"{limit:.3g}" for limit in self._limits.values())
                log.warning(
                    "step %s: the %s embeddings have collapsed: %s, healthy is above %s; if they do not recover, start "
                    "again with a lower optim.learning_rate, a larger optim.batch_size or more varied data",
                    step, modality, values, limits,
                )  # fmt: skip
            elif modality in self.collapsed and min(shares.values()) >= _RECOVERED:
                self.collapsed.remove(modality)
                log.warning("step %s: the %s embeddings have recovered: %s", step, modality, values)


@torch.no_grad()
def embedding_health(embeddings: Mapping[Modality, Float[Tensor, "batch dim"]]) -> dict[str, float]:
    """Spread of the query embeddings of a batch, over all processes.

    Parameters
    ----------
    embeddings
        ``(M, d)`` by modality, L2-normalised.

    Returns
    -------
    dict
        ``<modality>/embedding_std``: standard deviation over the batch, averaged over dimensions, times the square root
        of d. It is 1 for a uniform sphere and 0 for a point (Chen and He, 2021), but near 1 also for two points on
        opposite sides. ``<modality>/effective_rank``: see `effective_rank`. Nothing for a modality with fewer than two
        rows, or with rows that are not finite.
    """
    health: dict[str, float] = {}
    for modality, rows in embeddings.items():
        rows = rows.float()
        if len(rows) < 2 or not bool(rows.isfinite().all()):
            continue
        health[f"{modality}/embedding_std"] = float(rows.std(0).mean() * rows.shape[1] ** 0.5)
        health[f"{modality}/effective_rank"] = effective_rank(rows)
    return health


def effective_rank(rows: Float[Tensor, "rows dim"]) -> float:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli, 2007): 1 to min(rows, dim).

    The rows are not centred, as in RankMe (Garrido et al., 2023): rows close to one point have a rank near 1. Centred,
    they would have the rank of their small differences, and points that are alike up to rounding would have a high one.
    """
    singular = torch.linalg.svdvals(rows.float())
    shares = singular / singular.sum().clamp_min(1e-12)
    return float((-(shares * shares.clamp_min(1e-12).log()).sum()).exp())


def dictionaries_health(
    learner: Learner, query_labels: Int[Tensor, " batch"], labels_by_id: Int[Tensor, " samples"], step: int
) -> dict[str, float]:
    """`dictionary_health` of every dictionary, with names ``<modality>_dictionary/<metric>``."""
    health: dict[str, float] = {}
    for modality, dictionary in learner.dictionaries.items():
        measured = dictionary_health(dictionary.negatives(), query_labels, labels_by_id, step)
        health |= {f"{modality}_dictionary/{name}": value for name, value in measured.items()}
    return health


@torch.no_grad()
def dictionary_health(
    negatives: Keys, query_labels: Int[Tensor, " batch"], labels_by_id: Int[Tensor, " samples"], step: int
) -> dict[str, float]:
    """Measure the keys of a dictionary at a step.

    Parameters
    ----------
    negatives
        K keys.
    query_labels
        ``(M,)`` class of every query, -1 if unknown.
    labels_by_id
        Class of every sample id, -1 if unknown.
    step
        The current step.

    Returns
    -------
    dict
        ``key_age`` (mean, in steps), ``pairwise_cosine`` (mean over distinct pairs), ``effective_rank`` (see
        `effective_rank`), ``distinct_samples`` (share of the keys). If labels are known, also ``distinct_labels``
        (count) and ``false_negative_share`` (share of equal labels among pairs of query and negative whose labels are
        known). Empty while there are fewer than two keys.
    """
    count = len(negatives)
    if count < 2:
        return {}
    keys = negatives.embedding.float()
    # The sum of all pairwise products is |sum of keys|^2. It includes the `count` products of a key with itself.
    cosine = (keys.sum(0).square().sum() - keys.square().sum()) / (count * (count - 1))
    health = {
        "key_age": float((step - negatives.steps).float().mean()),
        "pairwise_cosine": float(cosine),
        "effective_rank": effective_rank(keys),
        "distinct_samples": len(negatives.sample_ids.unique()) / count,
    }
    negative_labels = labels_by_id[negatives.sample_ids]
    known = (query_labels[:, None] >= 0) & (negative_labels[None] >= 0)
    if bool(known.any()):
        same = (query_labels[:, None] == negative_labels[None]) & known
        health["distinct_labels"] = float(len(negative_labels[negative_labels >= 0].unique()))
        health["false_negative_share"] = float(same.sum() / known.sum())
    return health
