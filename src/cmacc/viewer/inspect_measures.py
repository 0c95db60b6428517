"""Selections in numbers and words: every measure of the chosen keys beside random draws, and how to read it."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from cmacc.viewer.page import listed
from cmacc.viewer.replay import Selection
from cmacc.viewer.selection import Measure, SelectionFacts


class _Words(NamedTuple):
    title: str
    reading: str
    form: str  # format of the values; % for shares
    above: str  # what a choice does that lies above random draws, and one that lies below
    below: str
    at_a_glance: bool = False


_WORDS = {
    "gradient_norm": _Words(
        "Length of the gradient",
        "Long: it is unclear which query of the batch the key belongs to. Such keys teach most.",
        ".3g",
        "have longer gradients",
        "have shorter gradients",
        at_a_glance=True,
    ),
    "cosine": _Words(
        "Likeness of two of its keys",
        "Mean cosine over all pairs: 1 is the same, 0 unrelated. Lower is more varied.",
        ".3f",
        "are more alike",
        "are less alike",
        at_a_glance=True,
    ),
    "key_coverage": _Words(
        "Distance from the pool",
        "From an eligible key to the nearest one of the group (1 − cosine), on average. Smaller: the group stands for "
        "more of the pool.",
        ".3f",
        "leave more of the pool's keys far off",
        "lie nearer to the pool's keys",
        at_a_glance=True,
    ),
    "gradient_coverage": _Words(
        "The same between gradients",
        "Squared distance of gradient embeddings: what active selection tries to make small.",
        ".3g",
        "leave more gradients far off",
        "lie nearer to the pool's gradients",
        at_a_glance=True,
    ),
    "queries": _Words(
        "Queries served",
        "To how many different queries of the batch the group's keys were assigned.",
        ".1f",
        "serve more queries",
        "serve fewer queries",
    ),
    "key_age": _Words(
        "Age in steps",
        "How long ago the keys were encoded, on average; the encoders have changed since.",
        ".1f",
        "are older",
        "are newer",
    ),
    "distinct_labels": _Words(
        "Different labels",
        "How many labels the group's samples have.",
        ".1f",
        "have more labels",
        "have fewer labels",
    ),
    "false_negative_share": _Words(
        "Same label as the query",
        "Share of pairs of a query and a key that have one label: false negatives, if labels say what is alike.",
        "%",
        "share the query's label more often",
        "share the query's label less often",
        at_a_glance=True,
    ),
}


@dataclass(frozen=True)
class MeasureRow:
    """A measure as text; ``verdict`` is 1 above nearly all random draws, -1 below, 0 like them."""

    title: str
    reading: str
    chosen: str
    verdict: int
    random: str
    spread: str
    pool: str


@dataclass(frozen=True)
class Glance:
    """The few measures to see first of a selection, by title, and the share of pairs in which a negative leads."""

    selection: Selection
    measures: dict[str, MeasureRow]
    hard_negative_share: str


def verdict(facts: SelectionFacts) -> str:
    """What sets the chosen apart, in a sentence."""
    apart = [
        _WORDS[name].above if measure.verdict > 0 else _WORDS[name].below
        for name, measure in facts.measures.items()
        if measure.verdict
    ]
    if not apart:
        return "By none of these measures are the chosen keys unlike a random draw."
    return f"Compared with random draws the chosen keys {listed(apart)}."


def measure_rows(facts: SelectionFacts) -> list[MeasureRow]:
    """All measures that are known of a selection."""
    return [_row(words, facts.measures[name]) for name, words in _WORDS.items() if name in facts.measures]


def glance_of(selection: Selection, facts: SelectionFacts, hard_negative_share: float) -> Glance:
    """A selection in a row."""
    first = [words.title for words in _WORDS.values() if words.at_a_glance]
    rows = {row.title: row for row in measure_rows(facts) if row.title in first}
    return Glance(selection, rows, _shown(hard_negative_share, "%"))


def _row(words: _Words, measure: Measure) -> MeasureRow:
    chosen, random, low, high, pool = (
        _shown(value, words.form) for value in (measure.chosen, measure.random, measure.low, measure.high, measure.pool)
    )
    return MeasureRow(words.title, words.reading, chosen, measure.verdict, random, f"{low} to {high}", pool)


def _shown(value: float, form: str) -> str:
    """
    >>> _shown(0.1234, "%"), _shown(3.0, ".1f"), _shown(12345.6, ".3g"), _shown(math.nan, ".3f")
    ('12.3 %', '3.0', '12,346', '–')
    """
    if not math.isfinite(value):
        return "–"
    if form == "%":
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if form == ".3g" and abs(value) >= 1000 else f"{value:{form}}"
