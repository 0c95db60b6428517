"""Metrics of CMU-MOSI and CMU-MOSEI as the field computes them, and metrics of emotions.

Sentiment y and its prediction p are real numbers in [-3, 3]:

1. MAE and Pearson's r of the raw values, all items, predictions not clipped.
2. Acc-7: both sides are clipped to [-3, 3] and rounded; Acc-5: the same with [-2, 2]. Halves are rounded to *even*, as
   NumPy does: 0.5 is 0, 1.5 and 2.5 are 2.
3. Binary accuracy and F1 exist in three forms, which differ in what an item with y = 0 is. A figure without the name of
   its form says little: on MOSI, one system's forms differ by about a point, on MOSEI by more than three.

   ============= ==================================== =========================================================
   name          items and sides                      who reports it
   ============= ==================================== =========================================================
   has0          all; (p >= 0) against (y >= 0)       LMF, TFN's released code, MMSA's "Has0"
   non0          y != 0; (p > 0) against (y > 0)      MulT's main program, MMSA's "Non0"; F1 without a note
   zero_negative all; (p > 0) against (y > 0)         MulT's function called by default; CH-SIMS in MMSA
   ============= ==================================== =========================================================

   The authors of the data advise has0 on MOSI and non0 on MOSEI. F1 is the mean over both classes, weighted by how many
   items are truly in each. TFN's code alone reports that of the positive class, ``f1_has0_positive``.

Sources: Tsai et al. 2019 (MulT), Liu et al. 2018 (LMF), Zadeh et al. 2017 (TFN), with their released code; MMSA.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

STRONGEST = 3.0
"""Sentiment is in [-STRONGEST, STRONGEST]."""


class SentimentMetricsError(ValueError):
    """Predictions or labels that metrics cannot be computed of; the message says which and why."""


def sentiment_metrics(predicted: NDArray[np.floating[Any]], true: NDArray[np.floating[Any]]) -> dict[str, float]:
    """Metrics of sentiment as a number; the module's docstring says what each is.

    Parameters
    ----------
    predicted
        Shape (n,), n at least 1: finite.
    true
        Shape (n,): in [-3, 3].

    Returns
    -------
    dict
        ``mae``, ``pearson``, ``acc7``, ``acc5``; for each form of has0, non0 and zero_negative, ``acc2_<form>`` and
        ``f1_<form>``; ``f1_has0_positive``. Shares are in [0, 1]; ``pearson`` in [-1, 1]. What is not defined is NaN:
        ``pearson`` of constants, the metrics of non0 if all items are neutral, and
        ``f1_has0_positive`` if no item is positive on either side.

    Raises
    ------
    SentimentMetricsError
        The shapes differ or are not (n,), there is no item, or a value is out of range.
    """
    _check_numbers("predicted", predicted, predicted.shape)
    _check_numbers("true", true, predicted.shape)
    outside = np.abs(true) > STRONGEST
    if outside.any():
        raise SentimentMetricsError(
            f"true: sentiment must be in [-3, 3], got {true[outside][0]:g}; labels on another scale have other metrics"
        )
    p, y = predicted.astype(np.float64), true.astype(np.float64)
    polar = y != 0
    forms = {
        "has0": (p >= 0, y >= 0),
        "non0": (p[polar] > 0, y[polar] > 0),
        "zero_negative": (p > 0, y > 0),
    }
    metrics = {
        "mae": float(np.abs(p - y).mean()),
        "pearson": _pearson(p, y),
        "acc7": _rounded_accuracy(p, y, 3),
        "acc5": _rounded_accuracy(p, y, 2),
    }
    for form, (said, truly) in forms.items():
        metrics[f"acc2_{form}"] = float((said == truly).mean()) if truly.size else np.nan
        metrics[f"f1_{form}"] = _weighted_f1(said, truly)
    metrics["f1_has0_positive"] = _f1(*forms["has0"])
    return metrics


def emotion_metrics(predicted: NDArray[np.bool_], true: NDArray[np.bool_], names: Sequence[str]) -> dict[str, float]:
    """Metrics of emotions of which an item may have several, or none (CMU-MOSEI, or IEMOCAP as MulT uses it).

    All-negative predictions already have a high ``accuracy`` and ``f1`` on rare emotions. ``weighted_accuracy`` is then
    0.5 and ``f1_positive`` 0, so one of these belongs beside them.

    Parameters
    ----------
    predicted, true
        Shape (n, emotions), both at least 1: whether the item has the emotion.
    names
        Names of the emotions.

    Returns
    -------
    dict
        ``<metric>/<name>`` for every emotion, and ``<metric>`` for their mean: ``accuracy``; ``weighted_accuracy``,
        (TP N / P + TN) / (2 N) with P positive and N negative items (Tong et al. 2017), which is the mean recall of
        both classes; ``f1``, weighted by true class as in MulT; ``f1_positive``, of the emotion's presence. What is not
        defined, such as the weighted accuracy of an emotion that no item has, is NaN, as is then the mean.

    Raises
    ------
    SentimentMetricsError
        The shapes or the number of names do not fit, or there is no item or no emotion.
    """
    shape = true.shape
    if len(shape) != 2 or 0 in shape or predicted.shape != shape or len(names) != shape[1]:
        raise SentimentMetricsError(
            "emotions: predicted and true must have shape (n, emotions), none of them 0, with a name for each, "
            f"got {predicted.shape}, {shape} and {len(names)} names"
        )
    if len(set(names)) != len(names):
        raise SentimentMetricsError(f"emotions: names must differ, got {', '.join(names)}")
    metrics: dict[str, float] = {}
    for index, name in enumerate(names):
        said, truly = predicted[:, index], true[:, index]
        metrics[f"accuracy/{name}"] = float((said == truly).mean())
        metrics[f"weighted_accuracy/{name}"] = _mean_recall(said, truly, (False, True))
        metrics[f"f1/{name}"] = _weighted_f1(said, truly)
        metrics[f"f1_positive/{name}"] = _f1(said, truly)
    for metric in ("accuracy", "weighted_accuracy", "f1", "f1_positive"):
        metrics[metric] = float(np.mean([metrics[f"{metric}/{name}"] for name in names]))
    return metrics


def class_metrics(predicted: NDArray[np.int64], true: NDArray[np.int64]) -> dict[str, float]:
    """Metrics of one class per item.

    Parameters
    ----------
    predicted, true
        Shape (n,), n at least 1: class numbers.

    Returns
    -------
    dict
        ``accuracy``; ``uar``, the unweighted average recall, a mean over the classes that ``true`` has; ``f1``,
        weighted by true class. All in [0, 1].

    Raises
    ------
    SentimentMetricsError
        The shapes differ or are not (n,), or there is no item.
    """
    _check_numbers("predicted", predicted, predicted.shape)
    _check_numbers("true", true, predicted.shape)
    return {
        "accuracy": float((predicted == true).mean()),
        "uar": _mean_recall(predicted, true, np.unique(true).tolist()),
        "f1": _weighted_f1(predicted, true),
    }


def _check_numbers(side: str, values: NDArray[Any], shape: tuple[int, ...]) -> None:
    if values.ndim != 1 or not values.size or values.shape != shape:
        raise SentimentMetricsError(
            f"{side}: must have shape (n,), n at least 1 and the same on both sides, got {values.shape}"
            f"{'' if values.shape == shape else f' against {shape}'}"
        )
    if not np.isfinite(values).all():
        raise SentimentMetricsError(
            f"{side}: must be finite, got {int((~np.isfinite(values)).sum())} values that are not"
        )


def _rounded_accuracy(p: NDArray[np.float64], y: NDArray[np.float64], bound: int) -> float:
    """Clipped first: LMF's and TFN's code only rounds, so that a prediction of 3.6 for a label of 3 counts as wrong."""
    return float((np.rint(p.clip(-bound, bound)) == np.rint(y.clip(-bound, bound))).mean())


def _pearson(p: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    # Asked of the values: rounding can leave constants a tiny deviation, and a correlation that means nothing.
    if np.ptp(p) == 0 or np.ptp(y) == 0:
        return np.nan
    return float(np.corrcoef(p, y)[0, 1])


def _f1(said: NDArray[np.bool_], truly: NDArray[np.bool_]) -> float:
    """2 TP / (2 TP + FP + FN), where the denominator is the number of positives on both sides; NaN without any."""
    positives = int(said.sum()) + int(truly.sum())
    return 2 * int((said & truly).sum()) / positives if positives else np.nan


def _weighted_f1(predicted: NDArray[Any], true: NDArray[Any]) -> float:
    """Mean F1 of the classes, weighted by how many items are truly in each; NaN without items."""
    classes, counts = np.unique(true, return_counts=True)
    if not classes.size:
        return np.nan
    return float(np.average([_f1(predicted == one, true == one) for one in classes], weights=counts))


def _mean_recall(predicted: NDArray[Any], true: NDArray[Any], classes: Sequence[Any]) -> float:
    """Mean over the classes of the share of their items that are found; NaN if one has no item."""
    recalls = [float((predicted == one)[true == one].mean()) if (true == one).any() else np.nan for one in classes]
    return float(np.mean(recalls))
