"""What frozen encoders are worth, in seconds: a probe by ridge regression, and retrieval between the modalities.

The field's protocols (`cmacc.transfer`) search the regularisation strength C by cross-validation, which takes longer
than a run here.
"""

import numpy as np
from numpy.typing import NDArray

from cmacc.ablation.problem import Measured
from cmacc.transfer import ranks

_PENALTIES = tuple(10.0 ** np.arange(0, 5))
_MOST_PROBED = 4096
_MOST_RANKED = 500


def scores_of(measured: Measured, labels: NDArray[np.int64], held_out_labels: NDArray[np.int64]) -> dict[str, float]:
    """Probes on labelled samples and retrieval among held-out ones.

    Returns
    -------
    dict
        ``probe_video``, ``probe_audio``: accuracy of a ridge classifier on standardised features, its penalty chosen
        by leave-one-out on the training part (at most 4,096 samples); ``balanced_*``: the mean over classes of the same
        (classes with at least one sample on both sides). Absent where no two classes are known. ``R@1``, ``R@10``
        (shares, mean of both directions) and ``median_rank`` among the held-out samples (the first 500).
        ``R@1_in_class``: among those of the own class alone, of samples whose class has another (absent where none
        has): what is left when the class is known.
    """
    scores: dict[str, float] = {}
    for name, (train, test) in measured.features.items():
        known, asked = np.flatnonzero(labels >= 0)[:_MOST_PROBED], np.flatnonzero(held_out_labels >= 0)
        if len(np.unique(labels[known])) < 2 or len(asked) == 0:
            continue
        right = _right(train[known], labels[known], test[asked]) == held_out_labels[asked]
        scores[f"probe_{name}"] = float(right.mean())
        by_class = [right[held_out_labels[asked] == c] for c in np.intersect1d(labels[known], held_out_labels[asked])]
        scores[f"balanced_{name}"] = float(np.mean([of_class.mean() for of_class in by_class]))
    video, audio = (measured.matched[name][:_MOST_RANKED] for name in ("video", "audio"))
    found = np.stack([ranks(video, audio), ranks(audio, video)])
    scores |= _in_class(video, audio, held_out_labels[:_MOST_RANKED])
    return scores | {
        "R@1": float((found <= 1).mean()),
        "R@10": float((found <= 10).mean()),
        "median_rank": float(np.median(found, axis=1).mean()),
    }


def _in_class(video: NDArray[np.float32], audio: NDArray[np.float32], labels: NDArray[np.int64]) -> dict[str, float]:
    classes, sizes = np.unique(labels[labels >= 0], return_counts=True)
    found = [
        np.stack([ranks(video[own], audio[own]), ranks(audio[own], video[own])]) <= 1
        for own in (labels == c for c in classes[sizes > 1])
    ]
    return {"R@1_in_class": float(np.concatenate(found, axis=1).mean())} if found else {}


def _right(train: NDArray[np.float32], labels: NDArray[np.int64], test: NDArray[np.float32]) -> NDArray[np.int64]:
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train.astype(np.float64))
    probe = RidgeClassifierCV(_PENALTIES).fit(scaler.transform(train.astype(np.float64)), labels)
    predicted: NDArray[np.int64] = probe.predict(scaler.transform(test.astype(np.float64)))
    return predicted
