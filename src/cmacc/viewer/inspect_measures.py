"""Selections in numbers and words: every measure of the chosen keys beside random draws, and how to read it."""

import math
from typing import NamedTuple

from cmacc.viewer.page import listed
from cmacc.viewer.selection import SelectionFacts


class Words(NamedTuple):
    """How a measure is called and read."""

    title: str
    reading: str
    form: str  # format of the values; % for shares
    above: str  # what a choice does that lies above random draws, and one that lies below
    below: str
    at_a_glance: bool = False


WORDS = {
    "gradient_norm": Words(
        "Length of the gradient",
        "Long: it is unclear which query of the batch the key belongs to. Such keys teach most.",
        ".3g",
        "have longer gradients",
        "have shorter gradients",
        at_a_glance=True,
    ),
    "cosine": Words(
        "Likeness of two of its keys",
        "Mean cosine over all pairs: 1 is the same, 0 unrelated. Lower is more varied.",
        ".3f",
        "are more alike",
        "are less alike",
        at_a_glance=True,
    ),
    "key_coverage": Words(
        "Distance from the pool",
        "From an eligible key to the nearest one of the group (1 − cosine), on average. Smaller: the group stands for "
        "more of the pool.",
        ".3f",
        "leave more of the pool's keys far off",
        "lie nearer to the pool's keys",
        at_a_glance=True,
    ),
    "gradient_coverage": Words(
        "The same between gradients",
        "Squared distance of gradient embeddings: what active selection tries to make small.",
        ".3g",
        "leave more gradients far off",
        "lie nearer to the pool's gradients",
        at_a_glance=True,
    ),
    "queries": Words(
        "Queries served",
        "To how many different queries of the batch the group's keys were assigned.",
        ".1f",
        "serve more queries",
        "serve fewer queries",
    ),
    "key_age": Words(
        "Age in steps",
        "How long ago the keys were encoded, on average; the encoders have changed since.",
        ".1f",
        "are older",
        "are newer",
    ),
    "distinct_labels": Words(
        "Different labels",
        "How many labels the group's samples have.",
        ".1f",
        "have more labels",
        "have fewer labels",
    ),
    "false_negative_share": Words(
        "Same label as the query",
        "Share of pairs of a query and a key that have one label: false negatives, if labels say what is alike.",
        "%",
        "share the query's label more often",
        "share the query's label less often",
        at_a_glance=True,
    ),
}


def verdict(facts: SelectionFacts) -> str:
    """What sets the chosen apart, in a sentence."""
    apart = [
        WORDS[name].above if measure.verdict > 0 else WORDS[name].below
        for name, measure in facts.measures.items()
        if measure.verdict
    ]
    if not apart:
        return "By none of these measures are the chosen keys unlike a random draw."
    return f"Compared with random draws the chosen keys {listed(apart)}."


def shown_as(value: float, form: str) -> str:
    """A value in the format of its measure.

    Examples
    --------
    >>> shown_as(0.1234, "%"), shown_as(3.0, ".1f"), shown_as(12345.6, ".3g"), shown_as(math.nan, ".3f")
    ('12.3 %', '3.0', '12,346', '–')
    """
    if not math.isfinite(value):
        return "–"
    if form == "%":
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if form == ".3g" and abs(value) >= 1000 else f"{value:{form}}"
