"""Names and explanations of the metrics of a selection, and its summary compared with random draws."""

import math
from typing import NamedTuple

from cmacc.viewer.page import listed
from cmacc.viewer.selection import SelectionFacts


class Words(NamedTuple):
    """Name, explanation and format of a metric."""

    title: str
    reading: str
    form: str  # format of the values; % for shares
    above: str  # verb phrase for keys above random draws
    below: str  # and for keys below them
    at_a_glance: bool = False


WORDS = {
    "gradient_norm": Words(
        "Gradient norm",
        "Large: it is uncertain which query of the batch the key belongs to. Such keys are the most informative.",
        ".3g",
        "have larger gradients",
        "have smaller gradients",
        at_a_glance=True,
    ),
    "cosine": Words(
        "Similarity of two keys",
        "Mean cosine over all pairs: 1 is identical, 0 unrelated. Lower is more diverse.",
        ".3f",
        "are more similar to each other",
        "are less similar to each other",
        at_a_glance=True,
    ),
    "key_coverage": Words(
        "Distance to the pool",
        "Mean distance (1 − cosine) from an eligible key to the nearest key of the group. Smaller: the group covers "
        "more of the pool.",
        ".3f",
        "cover less of the pool's keys",
        "cover more of the pool's keys",
        at_a_glance=True,
    ),
    "gradient_coverage": Words(
        "The same for gradients",
        "Mean squared distance of gradient embeddings to the nearest of the group, which active selection minimises.",
        ".3g",
        "cover less of the pool's gradients",
        "cover more of the pool's gradients",
        at_a_glance=True,
    ),
    "queries": Words(
        "Queries covered",
        "Number of different queries of the batch that the keys of the group were assigned to.",
        ".1f",
        "cover more queries",
        "cover fewer queries",
    ),
    "key_age": Words(
        "Age in steps",
        "Mean number of steps since the keys were encoded. The encoders have changed since.",
        ".1f",
        "are older",
        "are newer",
    ),
    "distinct_labels": Words(
        "Distinct labels",
        "Number of labels among the samples of the group.",
        ".1f",
        "have more labels",
        "have fewer labels",
    ),
    "false_negative_share": Words(
        "Same label as the query",
        "Share of pairs of a query and a key with the same label: false negatives, as far as labels describe the "
        "content.",
        "%",
        "share the query's label more often",
        "share the query's label less often",
        at_a_glance=True,
    ),
}


def verdict(facts: SelectionFacts) -> str:
    """A sentence on how the chosen keys differ from random draws."""
    apart = [
        WORDS[name].above if measure.verdict > 0 else WORDS[name].below
        for name, measure in facts.measures.items()
        if measure.verdict
    ]
    if not apart:
        return "By these metrics, the chosen keys do not differ from a random draw."
    return f"Compared with random draws, the chosen keys {listed(apart)}."


def shown_as(value: float, form: str) -> str:
    """A value in the format of its metric.

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
