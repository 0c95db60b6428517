"""Results of the card as text, tiles and tables, each compared with the untrained encoders and chance."""

import math
from collections.abc import Mapping
from itertools import groupby

from cmacc.transfer import Result
from cmacc.viewer.run_folder import RunFolder

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
}
PROTOCOLS = {
    "retrieval": "Retrieval",
    "linear": "Linear probe",
    "svm": "Linear SVM",
    "knn": "Nearest neighbours",
    "finetune": "Fine-tuned",
    "zero_shot": "Zero-shot",
}
MODALITIES = {
    "video_to_audio": "video → audio",
    "audio_to_video": "audio → video",
    "video": "video",
    "audio": "audio",
    "both": "both together",
}
METRICS = {
    "R@1": "Recall@1",
    "R@5": "Recall@5",
    "R@10": "Recall@10",
    "median_rank": "median rank",
    "accuracy": "accuracy",
    "top-5": "top-5 accuracy",
}


def results_by_task(run: RunFolder) -> dict[str, list[Result]]:
    """Results in the order of the page; empty if nothing was evaluated."""
    ordered = sorted(
        run.card.results if run.card else (),
        key=lambda r: (
            _place(TASKS, r.task), r.task, _place(PROTOCOLS, r.protocol), _place(MODALITIES, r.modality),
            _place(METRICS, r.metric),
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


def shown(metric: str, value: float | None) -> str:
    """A value in its unit: shares in percent, ranks as numbers.

    Examples
    --------
    >>> shown("R@1", 0.235), shown("median_rank", 12.5), shown("accuracy", float("nan"))
    ('23.5 %', '12.5', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:g}" if metric == "median_rank" else f"{100 * value:.1f} %"


def verdict(result: Result) -> str:
    """``up``, ``down`` or ``level`` compared with the untrained encoders, by two standard errors of the difference."""
    metric, value, untrained, count = result.metric, result.value, result.untrained, result.count
    if untrained is None or not (math.isfinite(value) and math.isfinite(untrained)):
        return "level"
    gain = value - untrained
    if metric == "median_rank":
        return "up" if gain < 0 else "down" if gain > 0 else "level"
    variances = [p * (1 - p) / max(1, count) for p in (value, untrained)]
    # Both are measured on the same items, so the true error is smaller: the test is biased towards "level".
    if gain == 0 or abs(gain) < 2 * math.sqrt(max(0.0, sum(variances))):
        return "level"
    return "up" if gain > 0 else "down"


def _place(names: Mapping[str, object], name: str) -> int:
    return list(names).index(name) if name in names else len(names)


def bar_length(result: Result, value: float) -> float:
    """Length of a bar in percent."""
    if not math.isfinite(value):
        return 0.0
    # A rank as the share of the other items that are ranked lower: 1 for first, 0 for last, 0.5 by chance.
    length = 1 - (value - 1) / max(1, result.count - 1) if result.metric == "median_rank" else value
    return 100 * min(1.0, max(0.0, length))
