"""What accuracy an encoder loses from stage to stage, in words: before a projection, after it, against texts.

Rows of the protocols ``prototypes`` and ``zero_shot`` name the same files by cosine, without training. Their accuracies
can be subtracted: the difference is what the step between them loses.
"""

from cmacc.transfer.card import Card, Result

_Key = tuple[str, str, str]


def losses_in_words(card: Card) -> list[str]:
    """A line for each task and modality of which a card has two stages; for people, below the table."""
    accuracies = {(r.task, r.protocol, r.modality): r for r in card.results if r.metric == "accuracy"}
    tasks = dict.fromkeys(r.task for r in card.results)
    lines = []
    for task, modality in ((task, modality) for task in tasks for modality in ("video", "audio")):
        own: _Key = (task, "prototypes", modality)
        steps = (
            ("the projection", (task, "prototypes", f"{modality}_tower"), own),
            ("the projection", own, (task, "prototypes", f"{modality}_joint")),
            ("the text", own, (task, "zero_shot", modality)),
        )
        parts = [
            _step(where, accuracies[before], accuracies[after])
            for where, before, after in steps
            if before in accuracies and after in accuracies and _are_alike(accuracies[before], accuracies[after])
        ]
        if parts:
            lines.append(f"{task}, {modality}: {'; '.join(parts)}")
    return lines


def _are_alike(one: Result, other: Result) -> bool:
    """Whether both measured the same windows of the same files."""
    return (one.windows, one.count, list(one.by_split)) == (other.windows, other.count, list(other.by_split))


def _step(where: str, before: Result, after: Result) -> str:
    points = round(100 * (before.value - after.value), 1)
    verb = "lost" if points >= 0 else "gained"
    names = [row.protocol if row.protocol == "zero_shot" else row.modality for row in (before, after)]
    shares = f"{names[0]} {100 * before.value:.1f} %, {names[1]} {100 * after.value:.1f} %"
    overlap = "; their intervals overlap" if before.low <= after.high and after.low <= before.high else ""
    return f"{verb} in {where}: {abs(points):.1f} points ({shares}{overlap})"
