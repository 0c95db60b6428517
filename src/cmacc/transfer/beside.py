"""Accuracies of cards beside published ones (`cmacc.transfer.published`), with all that is known to differ.

They were not measured in the same way, so nothing is ranked: each published row lists its differences to one's own.
"""

from collections.abc import Sequence

from cmacc.transfer.card import Card, CardError, Result
from cmacc.transfer.card_text import NONE, NOT_STATED, as_table, plain, presence, with_interval
from cmacc.transfer.official import OFFICIAL, OfficialSet
from cmacc.transfer.published import PUBLISHED_TASKS, PublishedResult, PublishedTask

_NOTE = (
    "Numbered rows are measured, with their 95 % interval; the others are published results of other code. {}There may "
    "be further differences: these numbers are for orientation and are not a comparison."
)
_OF_OFFICIAL = (
    "Usually, published UCF101 and HMDB51 results are fine-tuned and averaged over three splits, and ESC-50 results "
    "are from a linear classifier, averaged over five folds; a row says if this is different or not stated. "
)
_OF_AVE = (
    "Published AVE results are, by their code, of the epoch that is best on the test part, and are higher for it; here "
    "validation chooses the epoch. M1 to M4 are rules by which seconds get their class "
    "(`cmacc.heads.segment_accuracy`), and `ceiling` is the most that a method can reach which never says background. "
)


def beside_published(cards: Sequence[Card], published: Sequence[PublishedResult]) -> str:
    """Accuracies of cards on `PUBLISHED_TASKS`, above published results, with the differences between them.

    Parameters
    ----------
    cards
        Their accuracies on those tasks are shown, numbered within each task.
    published
        From `cmacc.transfer.published.published_results`. A difference to only some of the numbered rows names them.

    Raises
    ------
    CardError
        No card holds an accuracy on one of those tasks.
    """
    sections: list[str] = []
    tasks = []
    for task in PUBLISHED_TASKS:
        own = [
            (card, result)
            for card in cards
            for result in card.results
            if result.task == task and result.metric == "accuracy"
        ]
        if not own:
            continue
        tasks.append(task)
        rows: list[tuple[str, ...]] = [
            (
                str(number),
                plain(card.encoder.name),
                plain(card.encoder.kind),
                plain(card.encoder.pretraining_data or "unknown"),
                with_interval(result),
                plain(_own_protocol(task, card, result)),
                "this card",
                NONE,
            )
            for number, (card, result) in enumerate(own, 1)
        ]
        for row in published:
            accuracy = row.accuracy(task)
            if accuracy is not None:
                words = map(plain, (row.protocol, row.source, _all_differences(task, row, own)))
                who = map(plain, (row.method, row.backbone, row.pretraining))
                rows.append(("", *who, f"{accuracy:.1f} %", *words))
        heading = ["row", "encoder", "backbone", "pretraining", "accuracy", "protocol", "source", "differs in"]
        sections += [f"## {task}", as_table(heading, rows)]
    if not sections:
        held = sorted({result.task for card in cards for result in card.results})
        raise CardError(
            f"cards: must hold accuracy on one of {', '.join(PUBLISHED_TASKS)} to stand beside published results, "
            f"got {', '.join(held) or 'no results'}"
        )
    notes = (_OF_OFFICIAL if set(tasks) - {"ave"} else "", _OF_AVE if "ave" in tasks else "")
    sections.append(_NOTE.format("".join(notes)))
    return "\n\n".join(sections) + "\n"


def _official(task: PublishedTask) -> OfficialSet | None:
    """None for AVE: its one split is not a choice, and all heads take both modalities."""
    return None if task == "ave" else OFFICIAL[task]


def _own_protocol(task: PublishedTask, card: Card, result: Result) -> str:
    facts, official, count = card.data.get(task), _official(task), len(result.by_split)
    parts = [
        f"{result.protocol}@{result.version}",
        result.modality,
        f"{count} seed{'s' if count > 1 else ''}" if official is None else f"{count} of {official.parts} splits",
        f"data {NOT_STATED}" if facts is None else presence(facts),
        *result.settings,
    ]
    return "; ".join(parts)


def _all_differences(task: PublishedTask, row: PublishedResult, own: Sequence[tuple[Card, Result]]) -> str:
    against: dict[str, list[int]] = {}
    for number, (card, result) in enumerate(own, 1):
        for difference in _differences(task, row, card, result):
            against.setdefault(difference, []).append(number)
    parts = [
        text if len(numbers) == len(own) else f"{text} (row {', '.join(map(str, numbers))})"
        for text, numbers in against.items()
    ]
    return "; ".join(parts) or "nothing that is known"


def _differences(task: PublishedTask, row: PublishedResult, card: Card, result: Result) -> list[str]:
    """The known differences between a published number and a measured one."""
    facts, official, here = card.data.get(task), _official(task), card.encoder
    found = []
    if row.kind != result.protocol:
        found.append(f"protocol: {row.kind} there, {result.protocol} here")
    if row.departures:
        found.append(f"departures from {row.kind} there: {row.departures}")
    # A condition that both have, such as AVE's leaks, is no difference.
    settings = [setting for setting in result.settings if setting not in row.details]
    if settings:
        found.append(f"departures and conditions here: {', '.join(settings)}")
    if official is not None and result.modality != official.modality:
        found.append(f"modality: {official.modality} there, {result.modality} here")
    if facts is None or facts.is_partial:
        found.append(f"data here {NOT_STATED if facts is None else presence(facts)}")
    if official is not None and len(result.by_split) != official.parts:
        found.append(f"splits: {len(result.by_split)} of {official.parts} here")
    if row.backbone != here.kind:
        found.append(f"backbone: {row.backbone} there, {here.kind} here")
    if row.pretraining != here.pretraining_data:
        found.append(f"pretraining: {row.pretraining} there, {here.pretraining_data or 'unknown'} here")
    clip = (here.clip.get("frame_count"), here.clip.get("frame_height"))
    if row.clip is not None and row.clip != clip:
        found.append(f"clip: {row.clip[0]} frames of {row.clip[1]} px there, {clip[0]} of {clip[1]} px here")
    return found
