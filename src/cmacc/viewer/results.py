"""Results of the card as text, tiles and tables, each compared with the untrained encoders and chance."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

from cmacc.transfer import Result
from cmacc.transfer.metrics import DECIMALS, LESS_IS_BETTER
from cmacc.transfer.metrics import shown as with_unit
from cmacc.viewer.run_folder import RunFolder

_WITHOUT_BAR = ("mae",)  # has no largest value
TASKS = {
    "pairs": (
        "Pairs: cross-modal retrieval",
        "The video of every held-out clip queries the audio of all held-out clips for its own, and vice versa. No "
        "labels are used.",
    ),
    "labelled": (
        "Labelled: classification",
        "A simple classifier on frozen features is trained on the labels of the training files, and predicts those of "
        "the held-out files. Chance is to always predict the most frequent class of the training files.",
    ),
    "zero_shot": (
        "Zero-shot: classification by text",
        "Frozen features of the held-out files are compared with the names of the classes in words, without any "
        "training. Chance is to draw a class.",
    ),
    "ave": (
        "Event localisation",
        "A head on frozen features says of each second of a film which event is seen and heard, or that there is none. "
        "Accuracy is of seconds. AUROC is the probability that an event second has a higher score than another one. "
        "Chance is to never say an event. The ceiling is the most that a method can reach which always says one, and "
        "leaks are test films that are also trained on under another class. Means over seeds of the head.",
    ),
    "emotion": (
        "Emotion from speech",
        "A simple classifier on frozen features predicts the emotion of speakers that it was not trained on. The "
        "unweighted average recall counts all emotions alike, however frequent. Chance is to always predict the most "
        "frequent one.",
    ),
    "instruments": (
        "Instruments",
        "Which instrument plays a held-out note: by a simple classifier on frozen features, by the nearest mean of the "
        "training notes (prototypes), or by its name in words (zero-shot). Chance is to always predict the most "
        "frequent one, or to draw one. Triplets are the share of an instrument, a nearer and a farther one in a tree "
        "of instruments that the prototypes, or the names, keep in that order.",
    ),
    "fusion": (
        "Fusion of feature sequences",
        "A head joins feature sequences of several modalities, and predicts sentiment (a number), a class or several "
        "labels. Chance is the best constant of the training part. Means over seeds of the head.",
    ),
}
PROTOCOLS = {
    "retrieval": "Retrieval",
    "linear": "Linear probe",
    "svm": "Linear SVM",
    "knn": "Nearest neighbours",
    "finetune": "Fine-tuned",
    "prototypes": "Prototypes",
    "zero_shot": "Zero-shot",
    "cmbs": "CMBS",
    "cace_net": "CACE-Net",
    "linear_weak": "Linear, weakly supervised",
    "cmbs_weak": "CMBS, weakly supervised",
    "early": "Early fusion",
    "late": "Late fusion",
    "tensor": "Tensor fusion",
    "low_rank": "Low-rank fusion",
    "gated": "Gated fusion",
    "cross_modal": "Cross-modal attention",
}
MODALITIES = {
    "video_to_audio": "video → audio",
    "audio_to_video": "audio → video",
    "video": "video",
    "audio": "audio",
    "both": "both together",
    "audio_tower": "audio, before its projection",
    "video_joint": "video, in the space of both",
    "audio_joint": "audio, in the space of both",
    "audio_text": "names",
}
METRICS = {
    "R@1": "Recall@1",
    "R@5": "Recall@5",
    "R@10": "Recall@10",
    "R@20": "Recall@20",
    "R@50": "Recall@50",
    "median_rank": "median rank",
    "mae": "mean absolute error",
    "pearson": "correlation",
    "accuracy": "accuracy",
    "top-5": "top-5 accuracy",
    "UAR": "unweighted average recall",
    "uar": "unweighted average recall",
    "weighted_accuracy": "mean recall of yes and no",
    "event AUROC": "AUROC of events",
    "gate AUROC": "AUROC of gates",
    "triplets": "triplets kept",
    "acc7": "accuracy, 7 levels",
    "acc5": "accuracy, 5 levels",
    "acc2_has0": "accuracy, neutral is positive",
    "acc2_non0": "accuracy, without neutral",
    "acc2_zero_negative": "accuracy, neutral is negative",
    "f1": "F1",
    "f1_positive": "F1 of yes",
    "f1_has0": "F1, neutral is positive",
    "f1_non0": "F1, without neutral",
    "f1_zero_negative": "F1, neutral is negative",
    "f1_has0_positive": "F1 of positive, neutral is positive",
}


def results_by_task(run: RunFolder) -> dict[str, list[Result]]:
    """Results in the order of the page; empty if nothing was evaluated."""
    ordered = sorted(
        run.card.results if run.card else (),
        key=lambda r: (
            _place(TASKS, r.task), r.task, _place(PROTOCOLS, r.protocol), r.protocol,
            _place(MODALITIES, r.modality), r.modality, _place(METRICS, r.metric.partition("/")[0]), "/" in r.metric,
        ),
    )  # fmt: skip
    return {task: list(results) for task, results in groupby(ordered, lambda r: r.task)}


def headline_tiles(run: RunFolder) -> list[tuple[str, str, str]]:
    """The headline results as (value, metric, comparison); empty if nothing was evaluated."""
    found = {(r.task, r.protocol, r.modality, r.metric): r for r in (run.card.results if run.card else ())}
    wanted = (
        ("pairs", "retrieval", "video_to_audio", "R@1", "Recall@1, audio from video"),
        ("pairs", "retrieval", "audio_to_video", "R@1", "Recall@1, video from audio"),
        ("labelled", "linear", "both", "accuracy", "linear probe, video and audio"),
    )
    return [
        (shown(r.metric, r.value), what, f"{_beside(r)}chance {shown(r.metric, r.chance)}")
        for task, protocol, modality, metric, what in wanted
        if (r := found.get((task, protocol, modality, metric))) is not None
    ]


def _beside(result: Result) -> str:
    return "" if result.untrained is None else f"untrained {shown(result.metric, result.untrained)}, "


def metric_in_words(metric: str) -> str:
    """The name of a metric, and of the label that it is of.

    Examples
    --------
    >>> metric_in_words("mae"), metric_in_words("f1/label 2"), metric_in_words("new one")
    ('mean absolute error', 'F1, label 2', 'new one')
    """
    name, _, label = metric.partition("/")
    return METRICS.get(name, name) + (f", {label}" if label else "")


def shown(metric: str, value: float | None) -> str:
    """A value in its unit, as `cmacc.transfer.metrics.shown` has it; a dash if there is none.

    Examples
    --------
    >>> shown("R@1", 0.235), shown("median_rank", 12.5), shown("accuracy", float("nan"))
    ('23.5 %', '12.5', '–')
    """
    return "–" if value is None or not math.isfinite(value) else with_unit(metric, value)


def verdict(result: Result) -> str:
    """``up``, ``down`` or ``level`` compared with the untrained encoders; empty if those were not measured.

    Level is a gain of less than two standard errors of the difference: of shares, given the number of items; of
    triplets, which share anchors, and of other metrics, by the interval. Of ranks, every gain is one.
    """
    metric, value, untrained, count = result.metric, result.value, result.untrained, result.count
    if untrained is None:
        return ""
    if not (math.isfinite(value) and math.isfinite(untrained)):
        return "level"
    gain = untrained - value if metric in LESS_IS_BETTER else value - untrained
    if metric == "median_rank":
        variances = [0.0]
    elif metric in DECIMALS or metric == "triplets":
        # Of the untrained encoders there is no interval; theirs is taken to be as wide.
        variances = [((result.high - result.low) / (2 * 1.96)) ** 2] * 2
    else:
        variances = [p * (1 - p) / max(1, count) for p in (value, untrained)]
    # Both are measured on the same items, so the true error is smaller: the test is biased towards "level".
    if gain == 0 or abs(gain) < 2 * math.sqrt(max(0.0, sum(variances))):
        return "level"
    return "up" if gain > 0 else "down"


def conditions(results: Sequence[Result]) -> list[str]:
    """Departures and conditions of a task's results, with the protocols that they are of if not of all."""
    protocols: dict[tuple[str, ...], list[str]] = {}
    for one in results:
        names = protocols.setdefault(one.settings, [])
        name = PROTOCOLS.get(one.protocol, one.protocol)
        if name not in names:
            names.append(name)
    return [
        ", ".join(settings) if len(protocols) == 1 else f"{'; '.join(names)}: {', '.join(settings)}"
        for settings, names in protocols.items()
        if settings
    ]


def _place(names: Mapping[str, object], name: str) -> int:
    return list(names).index(name) if name in names else len(names)


def bar_length(result: Result, value: float) -> float | None:
    """Length of a bar in percent; None for a metric without a largest value."""
    if result.metric in _WITHOUT_BAR:
        return None
    if not math.isfinite(value):
        return 0.0
    # A rank as the share of the other items that are ranked lower: 1 for first, 0 for last, 0.5 by chance.
    length = 1 - (value - 1) / max(1, result.count - 1) if result.metric == "median_rank" else value
    return 100 * min(1.0, max(0.0, length))
