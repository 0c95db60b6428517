"""Health metrics of a dictionary: age, redundancy, spread, and the share of false negatives."""

import torch
from jaxtyping import Int
from torch import Tensor

from cmacc.negatives import Keys
from cmacc.pretraining.learner import Learner


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
        ``key_age`` (mean, in steps), ``pairwise_cosine`` (mean over distinct pairs), ``effective_rank`` (exponential
        of the entropy of the normalised singular values; Roy and Vetterli, 2007), ``distinct_samples`` (share of the
        keys). If labels are known, also ``distinct_labels`` (count) and ``false_negative_share`` (share of equal labels
        among pairs of query and negative whose labels are known). Empty while there are fewer than two keys.
    """
    count = len(negatives)
    if count < 2:
        return {}
    keys = negatives.embedding.float()
    singular = torch.linalg.svdvals(keys)
    shares = singular / singular.sum().clamp_min(1e-12)
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
    # The sum of all pairwise products is |sum of keys|^2. It includes the `count` products of a key with itself.
    cosine = (keys.sum(0).square().sum() - keys.square().sum()) / (count * (count - 1))
    health = {
        "key_age": float((step - negatives.steps).float().mean()),
        "pairwise_cosine": float(cosine),
        "effective_rank": float(entropy.exp()),
        "distinct_samples": len(negatives.sample_ids.unique()) / count,
    }
    negative_labels = labels_by_id[negatives.sample_ids]
    known = (query_labels[:, None] >= 0) & (negative_labels[None] >= 0)
    if bool(known.any()):
        same = (query_labels[:, None] == negative_labels[None]) & known
        health["distinct_labels"] = float(len(negative_labels[negative_labels >= 0].unique()))
        health["false_negative_share"] = float(same.sum() / known.sum())
    return health
