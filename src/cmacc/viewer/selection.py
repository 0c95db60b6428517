"""Metrics of a selection: the chosen keys compared with random draws of as many eligible keys."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cmacc.negatives import Factors, GradientName, Keys, gradient_factors
from cmacc.viewer.replay import Selection

_DRAWS = 50
_MOST_COVERED = 4096  # for a larger pool, coverage is measured on this many evenly spaced keys


@dataclass(frozen=True)
class Measure:
    """One metric of the chosen keys, and of random draws of as many.

    Attributes
    ----------
    chosen
        Value for the chosen keys.
    random
        Mean over the draws.
    low, high
        5th and 95th percentile of the draws.
    pool
        Value for all eligible keys; NaN if it is meaningless.
    """

    chosen: float
    random: float
    low: float
    high: float
    pool: float

    @property
    def verdict(self) -> int:
        """1 if the chosen keys are above nearly all draws, -1 if below, 0 if within their range."""
        return (self.chosen > self.high) - (self.chosen < self.low)


@dataclass(frozen=True)
class SelectionFacts:
    """Metrics of a selection.

    Attributes
    ----------
    drawn
        ``(m,)``: places in the pool of the random draw to show.
    pseudo_labels
        ``(N,)``: the query that each pool key was assigned to.
    posteriors
        ``(N,)``: its pseudo-posterior, in (0, 1].
    gradient_norms
        ``(N,)``: norm of the gradient embedding.
    measures
        By name: ``gradient_norm`` and ``key_age`` (means), ``cosine`` (mean over distinct pairs), ``key_coverage``
        (mean cosine distance from an eligible key to the nearest of the group), ``gradient_coverage`` (the same with
        squared distances of gradient embeddings), ``queries`` (number of queries among the pseudo-labels of the group).
        If labels are known, also ``distinct_labels`` and ``false_negative_share`` (share of equal labels among pairs of
        query and key whose labels are known).
    """

    drawn: Int[Tensor, " chosen"]
    pseudo_labels: Int[Tensor, " pool"]
    posteriors: Float[Tensor, " pool"]
    gradient_norms: Float[Tensor, " pool"]
    measures: dict[str, Measure]


@dataclass(frozen=True)
class KeyPair:
    """Two keys of a group, by their places, and their similarity."""

    first: int
    second: int
    cosine: float


@dataclass(frozen=True)
class HardNegative:
    """A negative that is more similar to a query than the query's own right key; places of query and key."""

    query: int
    key: int
    cosine: float
    own_cosine: float


@torch.no_grad()
def selection_facts(
    selection: Selection,
    temperature: float,
    gradient: GradientName,
    labels_by_id: Int[Tensor, " samples"],
    generator: torch.Generator,
    draws: int = _DRAWS,
) -> SelectionFacts:
    """Measure a selection in which at least one key was chosen.

    Parameters
    ----------
    selection
        From `SelectionReplay`.
    temperature, gradient
        Settings of the run.
    labels_by_id
        Class of every sample id, -1 if unknown.
    generator
        Source of randomness of the draws.
    draws
        Number of draws; the first one is shown.

    Raises
    ------
    ValueError
        Nothing was chosen.
    """
    count = len(selection.chosen)
    if count == 0:
        raise ValueError("selection_facts: selection must hold at least one chosen key, got none")
    pool = selection.pool
    factors = gradient_factors(pool, selection.queries, temperature, gradient)
    posterior = (pool.embedding @ selection.queries.T / temperature).softmax(dim=1)
    posteriors, pseudo_labels = posterior.max(dim=1)
    norms = factors.squared_norms().sqrt()
    eligible = selection.eligible.nonzero().flatten()
    drawn = [eligible[torch.randperm(len(eligible), generator=generator)[:count]] for _ in range(draws)]
    spaced = torch.linspace(0, len(eligible) - 1, min(len(eligible), _MOST_COVERED)).round().long()
    covered = eligible[spaced]
    ages = (selection.step - pool.steps).float()
    # float64, because distances of similar gradients suffer cancellation.
    exact = Factors(factors.left.double(), factors.right.double())
    squared_norms = exact.squared_norms()

    def measured(of: Callable[[Tensor], float], whole: bool = True) -> Measure:
        by_draw = torch.tensor([of(rows) for rows in drawn], dtype=torch.float64)
        # A draw of keys without labels has no share of false negatives.
        low, high = by_draw.nanquantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
        pooled = of(eligible) if whole else math.nan
        return Measure(of(selection.chosen), float(by_draw.nanmean()), low, high, pooled)

    measures = {
        "gradient_norm": measured(lambda rows: float(norms[rows].mean())),
        "key_age": measured(lambda rows: float(ages[rows].mean())),
        "cosine": measured(lambda rows: mean_cosine(pool.embedding[rows])),
        "key_coverage": measured(lambda rows: _key_coverage(pool.embedding, covered, rows), whole=False),
        "gradient_coverage": measured(
            lambda rows: _gradient_coverage(exact, squared_norms, covered, rows), whole=False
        ),
        "queries": measured(lambda rows: float(len(pseudo_labels[rows].unique()))),
    }
    labels, query_labels = labels_by_id[pool.sample_ids], labels_by_id[selection.query_ids]
    if bool((labels[eligible] >= 0).any()) and bool((query_labels >= 0).any()):
        measures["distinct_labels"] = measured(lambda rows: float(len(labels[rows][labels[rows] >= 0].unique())))
        measures["false_negative_share"] = measured(lambda rows: _same_label_share(labels[rows], query_labels))
    return SelectionFacts(drawn[0], pseudo_labels, posteriors, norms, measures)


def mean_cosine(embedding: Float[Tensor, "keys dim"]) -> float:
    """Mean cosine over distinct pairs of L2-normalised rows; NaN for a single row."""
    count = len(embedding)
    rows = embedding.double()
    # The sum of all pairwise products is |sum of rows|^2. The diagonal, each row with itself, is subtracted.
    total = rows.sum(0).square().sum() - rows.square().sum()
    return float(total) / (count * (count - 1)) if count > 1 else math.nan


def near_duplicates(keys: Keys, least: float = 0.98, most: int = 20) -> tuple[list[KeyPair], int]:
    """Pairs of keys of different samples with a cosine above ``least``: the ``most`` most similar, and their number."""
    cosine = keys.embedding @ keys.embedding.T
    other = keys.sample_ids[:, None] != keys.sample_ids[None]
    counted = ((cosine > least) & other).triu(1)
    count = int(counted.sum())
    # A collapsed dictionary has millions of such pairs, so objects are only made of those to show.
    top = torch.where(counted, cosine, -math.inf).flatten().topk(min(most, count))
    places = [divmod(place, len(keys)) for place in top.indices.tolist()]
    return [KeyPair(a, b, value) for (a, b), value in zip(places, top.values.tolist(), strict=True)], count


def repeated_samples(keys: Keys) -> int:
    """Number of keys whose sample has another key in the dictionary already."""
    return len(keys) - len(keys.sample_ids.unique())


@torch.no_grad()
def hard_negatives(selection: Selection) -> tuple[list[HardNegative], float]:
    """Negatives that are more similar to a query than the query's own right key, and their share of all pairs.

    As in the loss, keys of the query's own sample are excluded.

    Returns
    -------
    list
        At most one per key, with the query for which its lead is largest; sorted by the lead, largest first.
    float
        Share of hard negatives among all pairs of a query and a key of the dictionary.
    """
    keys = selection.dictionary
    cosine = selection.contrasted @ keys.embedding.T
    own = (selection.contrasted * selection.positives).sum(1)
    counted: Bool[Tensor, "batch keys"] = selection.query_ids[:, None] != keys.sample_ids[None]
    lead = torch.where(counted, cosine - own[:, None], -math.inf)
    share = float((lead > 0).sum()) / max(1, int(counted.sum()))
    if len(keys) == 0:
        return [], share
    best, query = lead.max(dim=0)
    order = best.argsort(descending=True, stable=True)
    found = [
        HardNegative(int(query[key]), int(key), float(cosine[query[key], key]), float(own[query[key]]))
        for key in order[best[order] > 0]
    ]
    return found, share


def _key_coverage(embedding: Float[Tensor, "pool dim"], covered: Int[Tensor, " n"], rows: Int[Tensor, " m"]) -> float:
    nearest = (embedding[covered] @ embedding[rows].T).amax(dim=1)
    return float((1 - nearest).mean())


def _gradient_coverage(
    factors: Factors, squared_norms: Float[Tensor, " pool"], covered: Int[Tensor, " n"], rows: Int[Tensor, " m"]
) -> float:
    products = (factors.left[covered] @ factors.left[rows].T) * (factors.right[covered] @ factors.right[rows].T)
    squared = squared_norms[covered, None] + squared_norms[None, rows] - 2 * products
    return float(squared.amin(dim=1).clamp_min(0).mean())


def _same_label_share(labels: Int[Tensor, " keys"], query_labels: Int[Tensor, " batch"]) -> float:
    known = (query_labels[:, None] >= 0) & (labels[None] >= 0)
    same = (query_labels[:, None] == labels[None]) & known
    return float(same.sum()) / int(known.sum()) if bool(known.any()) else math.nan
