"""Results of the card in words, tiles and tables: every number beside the untrained encoders' and chance."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

from cmacc.transfer import Result
from cmacc.viewer.run_folder import RunFolder

_TASKS = {
    "pairs": (
        "Pairs: which sound belongs to which picture",
        "Every held-out clip is split into picture and sound; from one, the encoders look for the other among all "
        "held-out clips. No labels are involved.",
    ),
    "labelled": (
        "Labelled: how much the features know of the classes",
        "The trained encoders stay as they are; a simple classifier on top of their features learns the "
        "labels of the training files and names those of held-out ones. Chance is always naming the most frequent "
        "training class.",
    ),
}
_PROTOCOLS = {
    "retrieval": "Retrieval",
    "linear": "Linear probe",
    "svm": "Linear SVM",
    "knn": "Nearest neighbours",
    "finetune": "Fine-tuned",
}
_MODALITIES = {
    "video_to_audio": "picture → sound",
    "audio_to_video": "sound → picture",
    "video": "picture",
    "audio": "sound",
    "both": "both together",
}
_METRICS = {
    "R@1": "Recall@1",
    "R@5": "Recall@5",
    "R@10": "Recall@10",
    "median_rank": "median rank",
    "accuracy": "accuracy",
}


@dataclass(frozen=True)
class Shown:
    """A row of a result table; ``group`` is empty where it is that of the row above, bars are in percent."""

    group: str
    metric: str
    count: int
    verdict: str
    value: str
    untrained: str
    chance: str
    bar: float
    chance_bar: float


@dataclass(frozen=True)
class TaskTable:
    """The results of one task, and what the task is."""

    title: str
    meaning: str
    rows: list[Shown]


def task_tables(run: RunFolder) -> list[TaskTable]:
    """A table a task; none where nothing was evaluated."""
    ordered = sorted(
        run.card.results if run.card else (),
        key=lambda r: (
            _place(_TASKS, r.task), r.task, _place(_PROTOCOLS, r.protocol), _place(_MODALITIES, r.modality),
            _place(_METRICS, r.metric),
        ),
    )  # fmt: skip
    tables = []
    for task, results in groupby(ordered, lambda r: r.task):
        title, meaning = _TASKS.get(task, (task, ""))
        tables.append(TaskTable(title, meaning, _rows(results)))
    return tables


def headline_tiles(run: RunFolder) -> list[tuple[str, str, str]]:
    """The few results to see first, as (value, what, compared with what); empty where nothing was evaluated."""
    found = {(r.protocol, r.modality, r.metric): r for r in (run.card.results if run.card else ())}
    wanted = (
        ("retrieval", "video_to_audio", "R@1", "Recall@1, audio from video"),
        ("retrieval", "audio_to_video", "R@1", "Recall@1, video from audio"),
        ("linear", "both", "accuracy", "linear probe, picture and sound"),
    )
    return [
        (shown(r.metric, r.value), what, f"{_beside(r)}chance {shown(r.metric, r.chance)}")
        for protocol, modality, metric, what in wanted
        if (r := found.get((protocol, modality, metric))) is not None
    ]


def _beside(result: Result) -> str:
    return "" if result.untrained is None else f"untrained {shown(result.metric, result.untrained)}, "


def shown(metric: str, value: float | None) -> str:
    """A value in its unit: shares in percent, ranks as ranks.

    Examples
    --------
    >>> shown("R@1", 0.235), shown("median_rank", 12.5), shown("accuracy", float("nan"))
    ('23.5 %', '12.5', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:g}" if metric == "median_rank" else f"{100 * value:.1f} %"


def verdict(metric: str, value: float, untrained: float | None, count: int) -> str:
    """``up``, ``down`` or ``level`` against the untrained encoders.

    Examples
    --------
    >>> verdict("R@1", 0.30, 0.01, 200), verdict("R@1", 0.02, 0.01, 200)
    ('up', 'level')
    """
    if untrained is None or not (math.isfinite(value) and math.isfinite(untrained)):
        return "level"
    gain = value - untrained
    if metric == "median_rank":
        return "up" if gain < 0 else "down" if gain > 0 else "level"
    variances = [p * (1 - p) / max(1, count) for p in (value, untrained)]
    # Both are measured on the same items, so that the true error is rather smaller: the test errs towards "level".
    if gain == 0 or abs(gain) < 2 * math.sqrt(max(0.0, sum(variances))):
        return "level"
    return "up" if gain > 0 else "down"


def _place(names: Mapping[str, object], name: str) -> int:
    return list(names).index(name) if name in names else len(names)


def _rows(results: Iterable[Result]) -> list[Shown]:
    rows = []
    previous: tuple[str, str] | None = None
    for result in results:
        group = (result.protocol, result.modality)
        protocol = _PROTOCOLS.get(result.protocol, result.protocol)
        modality = _MODALITIES.get(result.modality, result.modality)
        rows.append(
            Shown(
                group=f"{protocol}, {modality}" if group != previous else "",
                metric=_METRICS.get(result.metric, result.metric),
                count=result.count,
                verdict=verdict(result.metric, result.value, result.untrained, result.count),
                value=shown(result.metric, result.value),
                untrained=shown(result.metric, result.untrained),
                chance=shown(result.metric, result.chance),
                bar=_share(result, result.value),
                chance_bar=_share(result, result.chance),
            )
        )
        previous = group
    return rows


def _share(result: Result, value: float) -> float:
    """Length of a bar in percent."""
    if not math.isfinite(value):
        return 0.0
    # A rank as the share of the other items that are left behind: 1 for first, 0 for last, one half by chance.
    length = 1 - (value - 1) / max(1, result.count - 1) if result.metric == "median_rank" else value
    return 100 * min(1.0, max(0.0, length))
