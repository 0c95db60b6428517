"""The nearest class by cosine, where a class is the mean of its files (its prototype) or a text; and their order.

Both name the same files in one space, so that their accuracies can be subtracted: what a prototype knows and the text
does not is lost in the text. Triplets of an ontology need no files: they tell whether classes are arranged as there.

Source: Vasilakis, Bittner and Pauwels 2024, "I can listen but cannot read: an evaluation of two-tower multimodal
systems for instrument recognition" (ISMIR, arXiv 2407.18058). There, a prototype contains the sound that is asked
about, which flatters small classes most; here, it is the mean of training files.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmacc.pretraining.features import unit_rows
from cmacc.transfer.metrics import Metric, ProtocolError
from cmacc.transfer.protocols import Rows, averaged, check_finite, check_sides

_TOP = 5


def prototypes(train: Rows, test: Rows) -> list[Metric]:
    """Accuracy of the class whose prototype is nearest by cosine of window-averaged features.

    A prototype is the direction of the mean of a class's normalised training rows. In a tie, the wrong class ranks
    first, so that a collapsed encoder does not score best. Chance draws classes uniformly, as for `zero_shot`.

    Raises
    ------
    ProtocolError
        If the widths differ, training has fewer than 2 classes, or a test class has no training row.

    References
    ----------
    Snell, Swersky and Zemel 2017, "Prototypical Networks for Few-shot Learning", with cosines and no training.
    """
    check_sides(train, test)
    classes, directions = class_prototypes(averaged(train.features), train.labels)
    ahead = _wrong_ahead(averaged(test.features), directions, np.searchsorted(classes, test.labels))
    return [Metric("accuracy", (ahead < 1).astype(np.float64), 1 / len(classes))]


def class_prototypes(
    features: NDArray[np.floating[Any]], labels: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The classes of some rows, ascending, and the direction ``(classes, width)`` of the mean of each one's rows."""
    classes, place = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(classes), features.shape[1]))
    np.add.at(sums, place, unit_rows(features))  # only the direction of a mean matters, so that sums do
    return classes, unit_rows(sums)


def zero_shot(test: Rows, texts: NDArray[np.float32]) -> list[Metric]:
    """Accuracy of the class whose text is nearest by cosine, and for more than 5 classes, ``top-5``.

    In a tie, the wrong class ranks first, so that a collapsed encoder does not score best. Chance draws classes
    uniformly.

    Parameters
    ----------
    test
        The held-out rows.
    texts
        Shape (templates, classes, width), all at least 1: embeddings of the classes in each template, which become one
        by `text_directions`.

    Raises
    ------
    ProtocolError
        If the width is not that of the features, texts are not finite, or a label is not one of the classes.

    References
    ----------
    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 3.1.4.
    """
    width = test.features.shape[2]
    if texts.ndim != 3 or 0 in texts.shape or texts.shape[2] != width:
        raise ProtocolError(f"texts: must have shape (templates, classes, {width}), got {texts.shape}")
    check_finite("texts", texts.reshape(-1, width))
    count = texts.shape[1]
    if test.labels.max() >= count:
        raise ProtocolError(f"test labels: must be below the {count} classes with a text, got {test.labels.max()}")
    ahead = _wrong_ahead(averaged(test.features), text_directions(texts), test.labels)
    metrics = [Metric("accuracy", (ahead < 1).astype(np.float64), 1 / count)]
    if count > _TOP:
        metrics.append(Metric(f"top-{_TOP}", (ahead < _TOP).astype(np.float64), _TOP / count))
    return metrics


def text_directions(texts: NDArray[np.float32]) -> NDArray[np.float64]:
    """``(classes, width)``: direction of the mean over templates of the normalised ``(templates, classes, width)``."""
    return unit_rows(np.stack([unit_rows(of_template) for of_template in texts]).mean(axis=0))


def triplets_kept(directions: NDArray[np.float64], triplets: NDArray[np.int64]) -> Metric:
    """Whether classes keep the order of triplets (anchor, positive, negative): cos(a, p) > cos(a, n); chance is 0.5.

    A tie counts as lost, so that a collapsed encoder scores worst and not best.

    Parameters
    ----------
    directions
        Shape (classes, width): unit rows, of prototypes or texts.
    triplets
        Shape (n, 3), n at least 1: row numbers of ``directions``. Triplets of one anchor are not independent: an
        interval must draw anchors, not triplets.

    Raises
    ------
    ProtocolError
        There is no triplet, or one has no row.
    """
    if not len(triplets) or triplets.min() < 0 or triplets.max() >= len(directions):
        got = f"{triplets.min()} to {triplets.max()}" if len(triplets) else "none"
        raise ProtocolError(f"triplets: must be rows of the {len(directions)} classes, at least one, got {got}")
    anchors, positives, negatives = triplets.T
    cosines = _rounded(directions @ directions.T)
    kept = cosines[anchors, positives] > cosines[anchors, negatives]
    return Metric("triplets", kept.astype(np.float64), 0.5)


def _wrong_ahead(
    features: NDArray[np.floating[Any]], directions: NDArray[np.float64], labels: NDArray[np.int64]
) -> NDArray[np.int64]:
    """``(n,)`` number of wrong classes that are at least as near as the right one."""
    cosines = _rounded(unit_rows(features) @ directions.T)
    own = np.take_along_axis(cosines, labels[:, None], axis=1)
    return np.asarray((cosines >= own).sum(axis=1) - 1, np.int64)


def _rounded(cosines: NDArray[np.float64]) -> NDArray[np.float64]:
    """To 12 decimals, so that identical rows tie in whichever order BLAS sums."""
    return np.asarray(np.round(cosines, 12), np.float64)
