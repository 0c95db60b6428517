"""Markdown from result cards: one card, and a comparison of cards.

Numbers are only compared if they were measured in the same way on the same data; `compared` refuses anything else and
says why. `cmacc.transfer.beside` puts published numbers beside them, which were not.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence

from cmacc.transfer.card import Card, CardError, DataFacts, Result
from cmacc.transfer.card_text import (
    NONE,
    NOT_STATED,
    as_table,
    has_seeds,
    modality_in_words,
    plain,
    presence,
    with_interval,
)
from cmacc.transfer.metrics import LESS_IS_BETTER, shown
from cmacc.transfer.stages import losses_in_words

_ROW = ("task", "protocol", "modality", "metric")
_SKIPPED_SHOWN = 20
_OVERLAPS = "≈"

_Row = tuple[str, str, str, str]


def markdown(card: Card) -> str:
    """Text of ``card.md``: the contents of a card for people.

    Parameters
    ----------
    card
        The card.
    """
    encoder, made = card.encoder, card.provenance
    recipes = {
        (
            plain(r.task),
            plain(f"{r.protocol}@{r.version}"),
            modality_in_words(r),
            f"{r.windows} x {r.crops}",
            plain(", ".join(r.settings)) or "none",
            f"{r.seconds:.1f}",
        ): None
        for r in card.results
    }
    skipped = [f"{task}: {file}: {why}" for task, files in card.skipped.items() for file, why in files.items()]
    unnamed = len(skipped) - _SKIPPED_SHOWN
    sections = [
        f"# Results of {plain(encoder.name)}",
        results_table(card),
        *map(plain, losses_in_words(card)),
        "## Data",
        as_table(
            ["task", "path", "fingerprint", "present"],
            [
                (plain(task), plain(facts.path), plain(facts.fingerprint), presence(facts))
                for task, facts in card.data.items()
            ],
        ),
        "## How it was measured",
        as_table(
            ["task", "protocol", "modality", "windows x crops", "departures and conditions", "seconds"], list(recipes)
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
        "\n".join(f"- {plain(line)}" for line in skipped[:_SKIPPED_SHOWN]) or "None.",
    ]
    if unnamed > 0:
        sections.append(f"And {unnamed:,} more.")
    return "\n\n".join(sections) + "\n"


def results_table(card: Card) -> str:
    """The results of a card as a table."""
    parts = "seeds" if card.results and all(map(has_seeds, card.results)) else "splits"
    return as_table(
        [*_ROW, "value [95 %]", f"spread over {parts}", "untrained", "chance", "items"],
        [
            (
                *_row_cells(r),
                with_interval(r),
                _spread(r),
                NONE if r.untrained is None else shown(r.metric, r.untrained),
                shown(r.metric, r.chance),
                f"{r.count:,}",
            )
            for r in card.results
        ],
    )


def compared(cards: Sequence[Card], names: Sequence[str]) -> str:
    """A table with a row for every task, protocol, modality and metric, and a column for every card.

    The best value of a row is bold: the smallest rank or error, or the largest of any other metric. ``≈`` marks values
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
        chance = shown(row[3], present[0].chance)
        lines.append((*_row_cells(present[0]), chance, *_cells(results)))
        untrained = [None if r is None else r.untrained for r in results]
        if any(value is not None for value in untrained):
            before = [NONE if value is None else shown(row[3], value) for value in untrained]
            lines.append(("", "", "", "untrained", "", *before))
    table = as_table([*_ROW, "chance", *map(plain, names)], lines)
    legend = "Values with their 95 % interval; **bold**: best of its row."
    if any(_OVERLAPS in cell for line in lines for cell in line[5:]):
        legend += f" {_OVERLAPS}: its interval overlaps that of the best, so their order is not certain."
    notes = _differing_notes(cards, names)
    return "\n\n".join([table, legend, *(["Differences between the cards:", notes] if notes else [])]) + "\n"


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
        "splits or seeds": ", ".join(sorted(result.by_split)) or "none",
        "number of items": result.count,
    }


def _cells(results: Sequence[Result | None]) -> list[str]:
    """Values of one row, with marks if there is more than one."""
    present = [r for r in results if r is not None]
    choose = min if present[0].metric in LESS_IS_BETTER else max
    best = choose(r.value for r in present)
    winners = [r for r in present if r.value == best]
    cells = []
    for result in results:
        if result is None:
            cells.append(NONE)
        elif len(present) == 1:
            cells.append(with_interval(result))
        elif result.value == best:
            cells.append(f"**{with_interval(result)}**")
        else:
            overlaps = any(result.low <= w.high and w.low <= result.high for w in winners)
            cells.append(with_interval(result) + (f" {_OVERLAPS}" if overlaps else ""))
    return cells


def _differing_notes(cards: Sequence[Card], names: Sequence[str]) -> str:
    """A line for every difference between the cards that does not forbid a comparison."""
    facts = [
        {
            **{f"clip {key}": str(value) for key, value in card.encoder.clip.items()},
            "pretraining data": card.encoder.pretraining_data or "unknown",
            "seed of the weights": str(card.encoder.seed),
            "seed of the evaluation": str(card.provenance.seed),
            "device": card.provenance.hardware.get("device", NOT_STATED),
            **{f"version of {key}": value for key, value in card.provenance.versions.items()},
        }
        for card in cards
    ]
    lines = []
    for what in dict.fromkeys(key for of_card in facts for key in of_card):
        values = [of_card.get(what, NOT_STATED) for of_card in facts]
        if len(set(values)) > 1:
            each = "; ".join(f"{plain(n)} {plain(v)}" for n, v in zip(names, values, strict=True))
            lines.append(f"- {plain(what)}: {each}")
    return "\n".join(lines)


def _spread(result: Result) -> str:
    count, seeds = len(result.by_split), has_seeds(result)
    if count < 2:
        return "one seed" if seeds else "one split"
    return f"{shown(result.metric, result.spread)} over {count}{' seeds' if seeds else ''}"


def _pairs(of: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in of.items()) or "unknown"


def _list(items: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- {what}: {plain(value)}" for what, value in items)


def _row_cells(result: Result) -> tuple[str, str, str, str]:
    protocol = f"{result.protocol}@{result.version}"
    return plain(result.task), plain(protocol), modality_in_words(result), plain(result.metric)
