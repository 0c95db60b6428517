"""Selections in tables: every measure of the chosen keys beside random draws, with a sentence on how to read it."""

import math
from collections.abc import Sequence

from cmacc.viewer.page import note, section
from cmacc.viewer.replay import Selection
from cmacc.viewer.selection import Measure, SelectionFacts

KEYS = {"audio": "sounds", "video": "pictures"}
# Name, what it is called, how it is read, and the format of its values.
_MEASURES = (
    (
        "gradient_norm",
        "Length of the gradient",
        "Long: it is unclear which query of the batch the key belongs to. Such keys teach most.",
        ".3g",
    ),
    (
        "cosine",
        "Likeness of two of its keys",
        "Mean cosine over all pairs: 1 is the same, 0 unrelated. Lower is more varied.",
        ".3f",
    ),
    (
        "key_coverage",
        "Distance from the pool",
        "From an eligible key to the nearest one of the group (1 − cosine), on average. Smaller: the group stands "
        "for more of the pool.",
        ".3f",
    ),
    (
        "gradient_coverage",
        "The same between gradients",
        "Squared distance of gradient embeddings: what active selection tries to make small.",
        ".3g",
    ),
    (
        "queries",
        "Queries served",
        "To how many different queries of the batch the group's keys were assigned.",
        ".1f",
    ),
    (
        "key_age",
        "Age in steps",
        "How long ago the keys were encoded, on average; the encoders have changed since.",
        ".1f",
    ),
    ("distinct_labels", "Different labels", "How many labels the group's samples have.", ".1f"),
    (
        "false_negative_share",
        "Same label as the query",
        "Share of pairs of a query and a key that have one label: false negatives, if labels say what is alike.",
        "%",
    ),
)
_AT_A_GLANCE = ("gradient_norm", "cosine", "key_coverage", "gradient_coverage", "false_negative_share")
_SIGNS = {
    1: ("▲", "above nearly all random draws"),
    -1: ("▼", "below nearly all random draws"),
    0: ("=", "like random"),
}


def verdict(facts: SelectionFacts) -> str:
    """What sets the chosen apart, in a sentence."""
    words = {
        "gradient_norm": ("have longer gradients", "have shorter gradients"),
        "cosine": ("are more alike", "are less alike"),
        "key_coverage": ("leave more of the pool's keys far off", "lie nearer to the pool's keys"),
        "gradient_coverage": ("leave more gradients far off", "lie nearer to the pool's gradients"),
        "queries": ("serve more queries", "serve fewer queries"),
        "key_age": ("are older", "are newer"),
        "distinct_labels": ("have more labels", "have fewer labels"),
        "false_negative_share": ("share the query's label more often", "share the query's label less often"),
    }
    apart = [
        words[name][0 if measure.verdict > 0 else 1] for name, measure in facts.measures.items() if measure.verdict
    ]
    if not apart:
        return "By none of these measures are the chosen keys unlike a random draw."
    listed = apart[0] if len(apart) == 1 else f"{', '.join(apart[:-1])} and {apart[-1]}"
    return f"Compared with random draws the chosen keys {listed}."


def table(facts: SelectionFacts) -> str:
    """All measures of one selection."""
    rows = []
    for name, title, reading, form in _MEASURES:
        if (measure := facts.measures.get(name)) is None:
            continue
        spread = f"{_shown(measure.low, form)} to {_shown(measure.high, form)}"
        rows.append(
            f'<tr class="new"><td class="reading"><b>{title}</b>{reading}</td>'
            f'<td class="number value" data-name="chosen">{_shown(measure.chosen, form)}&nbsp;{_sign(measure)}</td>'
            f'<td class="number" data-name="random">{_shown(measure.random, form)}<small>{spread}</small></td>'
            f'<td class="number" data-name="all eligible">{_shown(measure.pool, form)}</td></tr>'
        )
    return (
        '<div class="scroll"><table><thead><tr><th>measured</th><th class="number">chosen</th><th '
        'class="number">random '
        'draws</th><th class="number">all eligible</th></tr></thead><tbody>'
        + "\n".join(rows)
        + "</tbody></table></div>"
        '<p class="quiet">Random: the mean of 50 draws of as many keys and, small, what nine in ten draws lie between. '
        "▲ and ▼: the chosen lie above or below that; =: a draw might well be like them.</p>"
    )


def glance_section(found: Sequence[tuple[Selection, SelectionFacts, float]]) -> str:
    """All selections side by side; the number is the share of pairs in which a negative leads (`hard_negatives`)."""
    shown = [m for m in _MEASURES if m[0] in _AT_A_GLANCE and any(m[0] in facts.measures for _, facts, _ in found)]
    if not found:
        return section("glance", "At a glance", note("At none of these steps was a key chosen."))
    rows = []
    for selection, facts, hard_negative_share in found:
        cells = []
        for name, title, _, form in shown:
            measure = facts.measures[name]
            cells.append(
                f'<td class="number" data-name="{title.lower()}">{_shown(measure.chosen, form)}&nbsp;{_sign(measure)}'
                f"<small>random {_shown(measure.random, form)}</small></td>"
            )
        rows.append(
            f'<tr class="new"><th scope="row"><a href="#step-{selection.step}-{selection.modality}">step '
            f"{selection.step:,}, {KEYS[selection.modality]}</a></th>{''.join(cells)}"
            f'<td class="number" data-name="nearer than the right key">{_shown(hard_negative_share, "%")}</td></tr>'
        )
    head = "".join(f'<th class="number">{title.lower()}</th>' for _, title, _, _ in shown)
    return section(
        "glance",
        "At a glance",
        "<p>The chosen keys beside random draws of as many eligible ones (▲ above, ▼ below nearly all draws, = like "
        "a draw). The last column: in how many of all pairs of a query and a key of the whole dictionary the key, a "
        "wrong answer, lies nearer than the right one; half, if encoders know nothing.</p>",
        f'<div class="scroll glance"><table><thead><tr><th></th>{head}<th class="number">nearer than the right '
        f"key</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>",
    )


def _sign(measure: Measure) -> str:
    sign, meaning = _SIGNS[measure.verdict]
    return f'<span class="level" title="{meaning}">{sign}</span>'


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
