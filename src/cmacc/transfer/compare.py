"""Markdown from result cards: one card, a comparison of cards, a comparison with published numbers.

Numbers are only compared if they were measured in the same way on the same data; `compared` refuses anything else and
says why. Cards are files that others may have written, so all of their text goes through `_plain`.
"""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence

from cmacc.transfer.card import Card, CardError, DataFacts, Result
from cmacc.transfer.official import OFFICIAL
from cmacc.transfer.published import PUBLISHED_TASKS, PublishedResult
from cmacc.transfer.stages import losses_in_words
from cmacc.transfer.tasks import TaskName

_ROW = ("task", "protocol", "modality", "metric")
# Metrics that are no shares, with their number of decimals; and those of which less is better.
_DECIMALS = {"median_rank": 1, "mae": 3, "pearson": 3}
_LESS_IS_BETTER = ("median_rank", "mae")
_SKIPPED_SHOWN = 20
_DIRECTIONS = {"video_to_audio": "video -> audio", "audio_to_video": "audio -> video"}
_NONE = "—"
_OVERLAPS = "≈"
_NOT_STATED = "not stated"

_Row = tuple[str, str, str, str]


def markdown(card: Card) -> str:
    """Text of ``card.md``: the contents of a card for people.

    Parameters
    ----------
    card
        The card. Accuracies and recalls are shown in percent, median ranks as numbers.
    """
    encoder, made = card.encoder, card.provenance
    recipes = {
        (
            _plain(r.task),
            _plain(f"{r.protocol}@{r.version}"),
            _modality(r),
            f"{r.windows} x {r.crops}",
            _plain(", ".join(r.settings)) or "none",
            f"{r.seconds:.1f}",
        ): None
        for r in card.results
    }
    skipped = [f"{task}: {file}: {why}" for task, files in card.skipped.items() for file, why in files.items()]
    unnamed = len(skipped) - _SKIPPED_SHOWN
    sections = [
        f"# Results of {_plain(encoder.name)}",
        results_table(card),
        *map(_plain, losses_in_words(card)),
        "## Data",
        _table(
            ["task", "path", "fingerprint", "present"],
            [
                (_plain(task), _plain(facts.path), _plain(facts.fingerprint), _present(facts))
                for task, facts in card.data.items()
            ],
        ),
        "## How it was measured",
        _table(
            ["task", "protocol", "modality", "windows x crops", "departures from the recipe", "seconds"], list(recipes)
        ),
        "## Encoder",
        _list(
            [
                ("kind", encoder.kind),
                ("weights", encoder.weights),
                ("training steps", f"{encoder.checkpoint_step:,}"),
                ("seed of the weights", str(encoder.seed)),
                ("clip", _pairs(encoder.clip)),
                ("pretraining data", encoder.pretraining_data or "unknown"),
            ]
        ),
        "## Made with",
        _list(
            [
                ("versions", _pairs(made.versions)),
                ("hardware", _pairs(made.hardware)),
                ("created", made.created),
                ("seed", str(made.seed)),
                ("command", made.command or "unknown"),
            ]
        ),
        "## Skipped files",
        "\n".join(f"- {_plain(line)}" for line in skipped[:_SKIPPED_SHOWN]) or "None.",
    ]
    if unnamed > 0:
        sections.append(f"And {unnamed:,} more.")
    return "\n\n".join(sections) + "\n"


def results_table(card: Card) -> str:
    """The results of a card as a table."""
    return _table(
        [*_ROW, "value [95 %]", "spread over splits", "untrained", "chance", "items"],
        [
            (
                *_row_cells(r),
                _with_interval(r),
                f"{_number(r.metric, r.spread)} over {len(r.by_split)}" if len(r.by_split) > 1 else "one split",
                _NONE if r.untrained is None else _number(r.metric, r.untrained),
                _number(r.metric, r.chance),
                f"{r.count:,}",
            )
            for r in card.results
        ],
    )


def compared(cards: Sequence[Card], names: Sequence[str]) -> str:
    """A table with a row for every task, protocol, modality and metric, and a column for every card.

    The best value of a row is bold: the smallest median rank, or the largest of any other metric. ``≈`` marks values
    whose interval overlaps that of the best one.

    Parameters
    ----------
    cards
        At least two.
    names
        Heading of each card's column, all distinct.

    Raises
    ------
    CardError
        Two cards measured a row in different ways or on different data, no row is in two cards, there are fewer than
        two cards, or not one name for each.
    """
    if len(cards) < 2:
        raise CardError(f"cards: must be at least 2 to be compared, got {len(cards)}")
    if len(names) != len(cards) or len(set(names)) != len(names):
        raise CardError(f"names: must be {len(cards)} different ones, got {', '.join(names)}")
    found = [_by_row(card, name) for card, name in zip(cards, names, strict=True)]
    rows = list(dict.fromkeys(row for results in found for row in results))
    if not any(sum(row in results for results in found) > 1 for row in rows):
        held = "; ".join(
            f"{name} {', '.join(' '.join(row) for row in results) or 'nothing'}"
            for name, results in zip(names, found, strict=True)
        )
        raise CardError(f"cards: must share a row to be compared, got {held}")
    for row in rows:
        _refuse_unlike(row, cards, names, found)

    lines: list[tuple[str, ...]] = []
    for row in rows:
        results = [of_card.get(row) for of_card in found]
        present = [r for r in results if r is not None]
        chance = _number(row[3], present[0].chance)
        lines.append((*_row_cells(present[0]), chance, *_cells(results)))
        untrained = [None if r is None else r.untrained for r in results]
        if any(value is not None for value in untrained):
            shown = [_NONE if value is None else _number(row[3], value) for value in untrained]
            lines.append(("", "", "", "untrained", "", *shown))
    table = _table([*_ROW, "chance", *map(_plain, names)], lines)
    legend = "Values with their 95 % interval; **bold**: best of its row."
    if any(_OVERLAPS in cell for line in lines for cell in line[5:]):
        legend += f" {_OVERLAPS}: its interval overlaps that of the best, so their order is not certain."
    notes = _differing_notes(cards, names)
    return "\n\n".join([table, legend, *(["Differences between the cards:", notes] if notes else [])]) + "\n"


def beside_published(cards: Sequence[Card], published: Sequence[PublishedResult]) -> str:
    """Accuracies of cards on UCF101, HMDB51 and ESC-50, above published results, with the differences between them.

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
    sections = []
    for task in PUBLISHED_TASKS:
        own = [
            (card, result)
            for card in cards
            for result in card.results
            if result.task == task and result.metric == "accuracy"
        ]
        if not own:
            continue
        rows: list[tuple[str, ...]] = [
            (
                str(number),
                _plain(card.encoder.name),
                _plain(card.encoder.kind),
                _plain(card.encoder.pretraining_data or "unknown"),
                _with_interval(result),
                _plain(_own_protocol(task, card, result)),
                "this card",
                _NONE,
            )
            for number, (card, result) in enumerate(own, 1)
        ]
        for row in published:
            accuracy = row.accuracy(task)
            if accuracy is not None:
                words = map(_plain, (row.protocol, row.source, _all_differences(task, row, own)))
                who = map(_plain, (row.method, row.backbone, row.pretraining))
                rows.append(("", *who, f"{accuracy:.1f} %", *words))
        heading = ["row", "encoder", "backbone", "pretraining", "accuracy", "protocol", "source", "differs in"]
        sections += [f"## {task}", _table(heading, rows)]
    if not sections:
        held = sorted({result.task for card in cards for result in card.results})
        raise CardError(
            f"cards: must hold accuracy on one of {', '.join(PUBLISHED_TASKS)} to stand beside published results, "
            f"got {', '.join(held) or 'no results'}"
        )
    sections.append(
        "Numbered rows are measured, with their 95 % interval; the others are published results of other code. "
        "Usually, published UCF101 and HMDB51 results are fine-tuned and averaged over three splits, and ESC-50 "
        "results are from a linear classifier, averaged over five folds; a row says if this is different or not "
        "stated. There may be further differences: these numbers are for orientation and are not a comparison."
    )
    return "\n\n".join(sections) + "\n"


def _by_row(card: Card, name: str) -> dict[_Row, Result]:
    found: dict[_Row, Result] = {}
    for result in card.results:
        row = (result.task, result.protocol, result.modality, result.metric)
        if row in found:
            raise CardError(f"card {name}: {', '.join(row)}: must be there once, got it twice")
        if result.task not in card.data:
            raise CardError(f"card {name}: must tell the data of {result.task}, got {', '.join(card.data) or 'none'}")
        found[row] = result
    return found


def _refuse_unlike(row: _Row, cards: Sequence[Card], names: Sequence[str], found: Sequence[dict[_Row, Result]]) -> None:
    """Compare every card that has the row with the first one that has it."""
    holders = [
        (name, _conditions(card.data[row[0]], results[row]))
        for name, card, results in zip(names, cards, found, strict=True)
        if row in results
    ]
    (first, expected), *others = holders
    for name, conditions in others:
        for what, value in conditions.items():
            if value != expected[what]:
                raise CardError(
                    f"cards {first} and {name}: {', '.join(row)}: {what} must be the same to be compared, "
                    f"got {expected[what]} and {value}"
                )


def _conditions(facts: DataFacts, result: Result) -> dict[str, Hashable]:
    """Conditions that must be equal in a comparison, by their names in messages."""
    return {
        "protocol version": result.version,
        "windows": result.windows,
        "crops": result.crops,
        "settings": ", ".join(sorted(result.settings)) or "none",
        "fingerprint of the data": facts.fingerprint,
        "files present": f"{facts.files:,} of {facts.files_listed:,}",
        "classes present": f"{facts.classes:,} of {facts.classes_listed:,}",
        "splits": ", ".join(sorted(result.by_split)) or "none",
        "number of items": result.count,
    }


def _cells(results: Sequence[Result | None]) -> list[str]:
    """Values of one row, with marks if there is more than one."""
    present = [r for r in results if r is not None]
    choose = min if present[0].metric in _LESS_IS_BETTER else max
    best = choose(r.value for r in present)
    winners = [r for r in present if r.value == best]
    cells = []
    for result in results:
        if result is None:
            cells.append(_NONE)
        elif len(present) == 1:
            cells.append(_with_interval(result))
        elif result.value == best:
            cells.append(f"**{_with_interval(result)}**")
        else:
            overlaps = any(result.low <= w.high and w.low <= result.high for w in winners)
            cells.append(_with_interval(result) + (f" {_OVERLAPS}" if overlaps else ""))
    return cells


def _differing_notes(cards: Sequence[Card], names: Sequence[str]) -> str:
    """A line for every difference between the cards that does not forbid a comparison."""
    facts = [
        {
            **{f"clip {key}": str(value) for key, value in card.encoder.clip.items()},
            "pretraining data": card.encoder.pretraining_data or "unknown",
            "seed of the weights": str(card.encoder.seed),
            "seed of the evaluation": str(card.provenance.seed),
            "device": card.provenance.hardware.get("device", _NOT_STATED),
            **{f"version of {key}": value for key, value in card.provenance.versions.items()},
        }
        for card in cards
    ]
    lines = []
    for what in dict.fromkeys(key for of_card in facts for key in of_card):
        values = [of_card.get(what, _NOT_STATED) for of_card in facts]
        if len(set(values)) > 1:
            each = "; ".join(f"{_plain(n)} {_plain(v)}" for n, v in zip(names, values, strict=True))
            lines.append(f"- {_plain(what)}: {each}")
    return "\n".join(lines)


def _own_protocol(task: TaskName, card: Card, result: Result) -> str:
    facts = card.data.get(task)
    parts = [
        f"{result.protocol}@{result.version}",
        result.modality,
        f"{len(result.by_split)} of {OFFICIAL[task].parts} splits",
        f"data {_NOT_STATED}" if facts is None else _present(facts),
        *result.settings,
    ]
    return "; ".join(parts)


def _all_differences(task: TaskName, row: PublishedResult, own: Sequence[tuple[Card, Result]]) -> str:
    against: dict[str, list[int]] = {}
    for number, (card, result) in enumerate(own, 1):
        for difference in _differences(task, row, card, result):
            against.setdefault(difference, []).append(number)
    parts = [
        text if len(numbers) == len(own) else f"{text} (row {', '.join(map(str, numbers))})"
        for text, numbers in against.items()
    ]
    return "; ".join(parts) or "nothing that is known"


def _differences(task: TaskName, row: PublishedResult, card: Card, result: Result) -> list[str]:
    """The known differences between a published number and a measured one."""
    facts = card.data.get(task)
    here = card.encoder
    found = []
    if row.kind != result.protocol:
        found.append(f"protocol: {row.kind} there, {result.protocol} here")
    if result.settings:
        found.append(f"departures from the recipe here: {', '.join(result.settings)}")
    if result.modality != OFFICIAL[task].modality:
        found.append(f"modality: {OFFICIAL[task].modality} there, {result.modality} here")
    if facts is None or facts.is_partial:
        found.append(f"data here {_NOT_STATED if facts is None else _present(facts)}")
    if len(result.by_split) != OFFICIAL[task].parts:
        found.append(f"splits: {len(result.by_split)} of {OFFICIAL[task].parts} here")
    if row.backbone != here.kind:
        found.append(f"backbone: {row.backbone} there, {here.kind} here")
    if row.pretraining != here.pretraining_data:
        found.append(f"pretraining: {row.pretraining} there, {here.pretraining_data or 'unknown'} here")
    clip = (here.clip.get("frame_count"), here.clip.get("frame_height"))
    if row.clip is not None and row.clip != clip:
        found.append(f"clip: {row.clip[0]} frames of {row.clip[1]} px there, {clip[0]} of {clip[1]} px here")
    return found


def _present(facts: DataFacts) -> str:
    if not facts.is_partial:
        return f"complete: {facts.files:,} files, {facts.classes:,} classes"
    return (
        f"partial: {facts.files:,} of {facts.files_listed:,} files, "
        f"{facts.classes:,} of {facts.classes_listed:,} classes"
    )


def _number(metric: str, value: float) -> str:
    return f"{value:.{_DECIMALS[metric]}f}" if metric in _DECIMALS else f"{100 * value:.1f} %"


def _with_interval(result: Result) -> str:
    bounds = (_number(result.metric, bound).removesuffix(" %") for bound in (result.low, result.high))
    return f"{_number(result.metric, result.value)} [{', '.join(bounds)}]"


def _pairs(of: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in of.items()) or "unknown"


def _list(items: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- {what}: {_plain(value)}" for what, value in items)


def _row_cells(result: Result) -> tuple[str, str, str, str]:
    protocol = f"{result.protocol}@{result.version}"
    return _plain(result.task), _plain(protocol), _modality(result), _plain(result.metric)


def _modality(result: Result) -> str:
    """``video -> audio`` for people; ``card.json`` has ``video_to_audio``."""
    return _plain(_DIRECTIONS.get(result.modality, result.modality))


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's Markdown. Text from cards must have gone through `_plain`."""
    if not rows:
        return "None."
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """The text on one line that Markdown shows as it is.

    Line ends and control characters become spaces; Markdown, HTML and cell separators are escaped.
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    # Underscores within words are no markup, and names are full of them.
    escaped = re.sub(r"([\\`*~\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;"))
    # `>` stays, because "video -> audio" is also read in the file itself. Without `<` it ends no tag; only at the
    # beginning of a line is it markup, a quotation.
    escaped = re.sub(r"^>", "&gt;", escaped)
    # Not a backslash before it: whether that escapes a pipe depends on what stands before the backslash.
    return escaped.replace("|", "&#124;")
