"""From predictions for the test part to numbers with intervals.

1. Accuracy: the share of seconds with the right class (`segment_accuracy`) of each seed. For the interval, a video's
   value is its share of right seconds, averaged over seeds; videos are resampled (`cmacc.transfer.metrics.summarised`).
2. Event AUROC, of the event's probability, and gate AUROC, of heads with gates: `event_auroc` of each seed. The same
   videos are resampled for all seeds.

Intervals only cover the choice of test videos. The values of the seeds stand beside them.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from cmacc.heads.segment_accuracy import event_auroc
from cmacc.transfer.metrics import Metric, Summary, summarised

ACCURACY = "accuracy"
# By what a head predicts for each second.
AUROCS = {"event": "event AUROC", "gates": "gate AUROC"}
_SEED = 0
_RESAMPLES = 2000


def summaries(
    predicted: Sequence[Mapping[str, Tensor]],
    labels: Int[Tensor, "videos seconds"],
    background: int,
    videos: Int[NDArray[np.int64], " videos"],
) -> dict[str, Summary]:
    """The metrics of a head.

    Parameters
    ----------
    predicted
        What each seed's head predicted: ``classes``, ``event`` and, if it has gates, ``gates``; (videos, seconds).
    labels
        Classes of the seconds.
    background
        Label of seconds without an event.
    videos
        Number of the video of each row, for rows of one video.

    Returns
    -------
    By the name of the metric; ``by_split`` has the values of the seeds. Chance is to always say background, or 0.5.
    Where all seconds or none have an event, there is no AUROC.
    """
    right = np.stack([(of_seed["classes"] == labels).double().mean(1).numpy() for of_seed in predicted])
    of_background = float((labels == background).double().mean())
    mean = summarised([Metric(ACCURACY, right.mean(0), of_background)], [videos])
    found = {ACCURACY: _of_seeds(mean, right.mean(1))}
    event = labels != background
    for name, metric in AUROCS.items():
        if all(name in of_seed for of_seed in predicted) and 0 < int(event.sum()) < event.numel():
            found[metric] = auroc_summary([of_seed[name] for of_seed in predicted], event, videos)
    return found


def auroc_summary(
    scores: Sequence[Float[Tensor, "videos seconds"]],
    event: Bool[Tensor, "videos seconds"],
    videos: Int[NDArray[np.int64], " videos"],
) -> Summary:
    """`event_auroc` of each seed, and of their mean a 95 % interval by resampling videos.

    In the AUROC of a resample, each pair of an event second in row a and one without in row b counts as often as a and
    b were drawn, together. So the pairs are compared once, and summed by (a, b). Resamples without either kind of
    second are skipped. ``low`` and ``high`` are the value if there is one video only.
    """
    truth = event.numpy()
    wins = np.mean([_wins(of_seed.double().numpy(), truth) for of_seed in scores], axis=0)
    events, others = truth.sum(1).astype(np.float64), (~truth).sum(1).astype(np.float64)
    by_seed = np.asarray([event_auroc(of_seed, event) for of_seed in scores])
    names, group = np.unique(videos, return_inverse=True)
    generator = np.random.default_rng(_SEED)
    values = []
    for _ in range(_RESAMPLES):
        times = np.bincount(generator.integers(len(names), size=len(names)), minlength=len(names))[group]
        pairs = (times @ events) * (times @ others)
        if pairs > 0:
            values.append(float(times @ wins @ times / pairs))
    low, high = np.percentile(values, [2.5, 97.5])
    return Summary(float(by_seed.mean()), by_seed.tolist(), float(low), float(high), 0.5, len(truth))


def _wins(scores: NDArray[np.float64], event: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(a, b): number of pairs of an event second of row a and another of row b in which the former's score is higher.

    Ties count half. By ranks among each row's other seconds, not by all pairs at once, which of AVE's test part would
    be 2.4 million.
    """
    found = np.zeros((len(scores), len(scores)))
    for row, (of_row, is_event) in enumerate(zip(scores, event, strict=True)):
        others = np.sort(of_row[~is_event])
        below, upto = (np.searchsorted(others, scores, side=side) for side in ("left", "right"))
        found[:, row] = ((below + upto) / 2 * event).sum(1)
    return found


def _of_seeds(mean: Summary, by_seed: NDArray[np.float64]) -> Summary:
    return Summary(mean.value, by_seed.tolist(), mean.low, mean.high, mean.chance, mean.count)
