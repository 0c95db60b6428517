"""Metrics of one split, and their summary over all splits with a bootstrap interval; the units of all metrics."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DECIMALS = {"median_rank": 1, "mae": 3, "pearson": 3, "event AUROC": 3, "gate AUROC": 3}
"""Metrics that are no shares, with the number of decimals that they are shown with."""
LESS_IS_BETTER = ("median_rank", "mae")
"""Metrics of which the smallest value is the best."""
_SEED = 0
_RESAMPLES = 2000


class ProtocolError(ValueError):
    """Features, labels or scores that a protocol cannot be run on; the message says which and why."""


@dataclass(frozen=True, eq=False)
class Metric:
    """One metric of one split, with the value of each item, from which `summarised` computes an interval.

    Attributes
    ----------
    name
        ``accuracy``, ``R@1``, ... or ``median_rank``.
    per_item
        Shape (n,): 1 if correct, else 0; for ``UAR``, weighted by class; for ``median_rank``, the rank, from 1.
    chance
        Expected value of random guessing.
    """

    name: str
    per_item: NDArray[np.float64]
    chance: float

    @property
    def value(self) -> float:
        """Mean over the items; their median for ``median_rank``."""
        return _value(self.name, self.per_item)


@dataclass(frozen=True)
class Summary:
    """One metric over the splits of a task.

    Attributes
    ----------
    value
        Mean over the splits.
    by_split
        Value of every split.
    low, high
        95 % interval of ``value`` (`summarised`).
    chance
        Expected value of random guessing, averaged over the splits.
    count
        Number of held-out items over all splits.
    """

    value: float
    by_split: list[float]
    low: float
    high: float
    chance: float
    count: int


def summarised(metrics: Sequence[Metric], groups: Sequence[NDArray[np.int64]]) -> Summary:
    """Mean over splits of one metric, with a 95 % percentile bootstrap interval.

    In each of 2,000 resamples, as many groups as a split has are drawn with replacement, with all of their items. The
    value of the split is computed again, and averaged over the splits. Whole groups are drawn because clips cut from
    one scene are not independent: they succeed and fail together, and drawing single clips would give too narrow an
    interval. With few groups (fewer than about 20), the interval is coarse and usually too narrow. If every item is its
    own group, this is the bootstrap over items. A split with one group is the same in every resample. If all splits are
    like that, ``low`` and ``high`` equal ``value``, which means that the uncertainty is unknown, not zero.

    The interval only covers the choice of held-out items: neither the training part nor the encoder's seed is varied.
    Splits are resampled independently. If their held-out parts share items, the interval is too narrow.

    Parameters
    ----------
    metrics
        The same metric of each split.
    groups
        For each split, shape (n,): group of each item.

    Raises
    ------
    ProtocolError
        There is no split or an empty one, the metrics differ in name, or groups do not fit the items.

    References
    ----------
    Field and Welsh 2007, "Bootstrapping clustered data" (the cluster bootstrap); Efron and Tibshirani 1993, "An
    Introduction to the Bootstrap" (the percentile interval).
    """
    names = sorted({metric.name for metric in metrics})
    if len(names) != 1 or len(groups) != len(metrics):
        raise ProtocolError(
            f"summarised: must get one metric, and groups, of every split, got {names or 'none'} of {len(metrics)} "
            f"splits and groups of {len(groups)}"
        )
    for metric, of_items in zip(metrics, groups, strict=True):
        if not metric.per_item.size or metric.per_item.shape != of_items.shape:
            got = f"{of_items.shape} and {metric.per_item.shape}"
            raise ProtocolError(f"groups: must have the metric's shape (n,), n at least 1, got {got}")
    by_split = [metric.value for metric in metrics]
    generator = np.random.default_rng(_SEED)
    resampled = np.mean([_resampled(*split, generator) for split in zip(metrics, groups, strict=True)], axis=0)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Summary(
        value=float(np.mean(by_split)),
        by_split=by_split,
        low=float(low),
        high=float(high),
        chance=float(np.mean([metric.chance for metric in metrics])),
        count=sum(len(metric.per_item) for metric in metrics),
    )


def shown(metric: str, value: float) -> str:
    """A value in its unit: shares in percent, other metrics as numbers.

    Examples
    --------
    >>> shown("R@1", 0.235), shown("median_rank", 12.5), shown("mae", 0.6)
    ('23.5 %', '12.5', '0.600')
    """
    return f"{value:.{DECIMALS[metric]}f}" if metric in DECIMALS else f"{100 * value:.1f} %"


def _value(name: str, per_item: NDArray[np.float64]) -> float:
    return float(np.median(per_item) if name == "median_rank" else per_item.mean())


def _resampled(metric: Metric, groups: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Value of one split in each bootstrap resample of its groups."""
    names, group = np.unique(groups, return_inverse=True)
    values = np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):
        times = np.bincount(generator.integers(len(names), size=len(names)), minlength=len(names))
        values[i] = _value(metric.name, np.repeat(metric.per_item, times[group]))
    return values
