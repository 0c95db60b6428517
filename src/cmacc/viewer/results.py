"""Results of the card in words, tiles and tables: every number beside the untrained encoders' and chance."""

import math
from collections.abc import Sequence
from itertools import groupby

from cmacc.transfer import Result
from cmacc.viewer.page import escape, note, section
from cmacc.viewer.run_folder import RunFolder

_TASKS = {
    "pairs": (
        "Pairs: which sound belongs to which picture",
        "Every held-out clip is split into picture and sound; from one, the encoders look for the other among all "
        "held-out "
        "clips. No labels are involved.",
    ),
    "labelled": (
        "Labelled: how much the features know of the classes",
        "The trained encoders stay as they are; a simple classifier on top of their features learns the labels of "
        "the training "
        "files and names those of held-out ones. Chance is always naming the most frequent training class.",
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
    "R@5": "right one in the first 5 (R@5)",
    "R@10": "right one in the first 10 (R@10)",
    "median_rank": "median rank of the right one",
    "accuracy": "accuracy",
}


def results_section(run: RunFolder) -> str:
    """The result tables, or a note that nothing was evaluated."""
    if run.card is None or not run.card.results:
        return section(
            "results",
            "Results",
            note(
                "Nothing has been evaluated yet: <code>cmacc evaluate</code> measures this run and writes its "
                "results here."
            ),
        )
    parts = [
        '<p class="quiet">Bars show the result, the stroke is chance. ▲ is better than the same encoders before '
        "training, "
        "▼ worse, = too close to tell: by less than two standard errors of the difference, from the number of "
        "held-out "
        "items (ranks have no such test).</p>"
    ]
    for task, results in groupby(sorted(run.card.results, key=lambda r: _place(_TASKS, r.task)), lambda r: r.task):
        heading, meaning = _TASKS.get(task, (task, ""))
        parts += [f"<h3>{escape(heading)}</h3><p>{escape(meaning)}</p>", _table(list(results))]
    return section("results", "Results", *parts)


def headline_tiles(run: RunFolder) -> list[tuple[str, str, str]]:
    """The few results to see first, as (value, what, compared with what); empty where nothing was evaluated."""
    found = {(r.protocol, r.modality, r.metric): r for r in (run.card.results if run.card else ())}
    wanted = (
        ("retrieval", "video_to_audio", "R@1", "Recall@1, audio from video"),
        ("retrieval", "audio_to_video", "R@1", "Recall@1, video from audio"),
        ("linear", "both", "accuracy", "linear probe, picture and sound"),
    )
    return [
        (
            shown(r.metric, r.value),
            what,
            f"{_beside(r)}chance {shown(r.metric, r.chance)}",
        )
        for *key, what in wanted
        if (r := found.get((key[0], key[1], key[2]))) is not None
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


def _place(names: dict[str, object] | dict[str, str] | dict[str, tuple[str, str]], name: str) -> int:
    return list(names).index(name) if name in names else len(names)


def _table(results: Sequence[Result]) -> str:
    ordered = sorted(
        results,
        key=lambda r: (_place(_PROTOCOLS, r.protocol), _place(_MODALITIES, r.modality), _place(_METRICS, r.metric)),
    )
    rows = []
    previous: tuple[str, str] | None = None
    for result in ordered:
        group = (result.protocol, result.modality)
        protocol = _PROTOCOLS.get(result.protocol, result.protocol)
        name = f"{protocol}, {_MODALITIES.get(result.modality, result.modality)}" if group != previous else ""
        rows.append(_row(name, result))
        previous = group
    return (
        '<div class="scroll"><table><thead><tr><th>measured</th><th></th><th class="number">result</th><th></th>'
        '<th class="number">untrained</th><th class="number">chance</th><th '
        'class="number">items</th></tr></thead><tbody>' + "\n".join(rows) + "</tbody></table></div>"
    )


def _row(name: str, result: Result) -> str:
    outcome = verdict(result.metric, result.value, result.untrained, result.count)
    sign = {"up": "▲", "down": "▼", "level": "="}[outcome]
    reading = {"up": "better than untrained", "down": "worse than untrained", "level": "not clearly different"}[outcome]
    value, untrained, chance = (shown(result.metric, v) for v in (result.value, result.untrained, result.chance))
    return (
        f'<tr class="{"new" if name else ""}"><th scope="row">{escape(name)}</th>'
        f"<td>{escape(_METRICS.get(result.metric, result.metric))}</td>"
        f'<td class="number value">{value} <span class="{outcome}" title="{reading}">{sign}</span></td>'
        f"<td>{_bar(result, outcome)}</td>"
        f'<td class="number" data-name="untrained">{untrained}</td><td class="number" data-name="chance">{chance}</td>'
        f'<td class="number" data-name="items">{result.count:,}</td></tr>'
    )


def _bar(result: Result, outcome: str) -> str:
    def share(value: float) -> float:
        if not math.isfinite(value):
            return 0.0
        # A rank as the share of the other items that are left behind: 1 for first, 0 for last, one half by chance.
        length = 1 - (value - 1) / max(1, result.count - 1) if result.metric == "median_rank" else value
        return 100 * min(1.0, max(0.0, length))

    return (
        f'<span class="bar {outcome}"><i style="width:{share(result.value):.1f}%"></i>'
        f'<u style="left:calc({share(result.chance):.1f}% - 1px)"></u></span>'
    )
