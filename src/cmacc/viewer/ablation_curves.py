"""What happened along the runs of an ablation: curves, dictionaries, the bound of mutual information, the plateau."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from cmacc.ablation import Row
from cmacc.viewer.ablation_figures import Curve, Pen, curve_panel, legend, pens
from cmacc.viewer.ablation_words import (
    Found,
    capital,
    heading_row,
    mean_text,
    quoted,
    result_table,
    shared_budget,
    words,
)
from cmacc.viewer.page import escape, figure, note, section
from cmacc.viewer.training import _HEALTH

_OPEN = 3  # regimes that are shown at once; the others unfold
_SHARES = ("false_negative_share", "distinct_samples")
_DICTIONARY = (
    "distinct_labels",
    "false_negative_share",
    "key_age",
    "pairwise_cosine",
    "effective_rank",
    "distinct_samples",
)
_FREE = ("pairwise_cosine", "effective_rank", "key_age")  # their height above zero says little


def curve_of(rows: Sequence[Row], pen: Pen, *, seconds: bool = False, dotted: bool = False) -> Curve | None:
    """Mean and range over the seeds at every step that all of them were measured at; None without any row."""
    by_step: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        by_step[row.step].append(row)
    whole = max((len(at) for at in by_step.values()), default=0)
    steps = [step for step in sorted(by_step) if len(by_step[step]) == whole]
    if not steps:
        return None
    values = np.asarray([[row.value for row in by_step[step]] for step in steps], np.float64)
    places = [np.mean([row.seconds for row in by_step[step]]) if seconds else step for step in steps]
    return Curve(np.asarray(places, np.float64), values.mean(1), values.min(1), values.max(1), pen, dotted)


def curves_section(found: Found) -> str:
    """The results while the runs went on, over steps and over seconds."""
    plan = found.plan
    metrics = [m for m in dict.fromkeys([plan.headline, "probe_video", "probe_audio"]) if m in found.metrics]
    if not metrics:
        return section("curves", "Along the runs", note("No run has been measured yet."))
    in_time = "time" if "time" in plan.budgets else plan.budgets[0]
    lead = (
        "<p>How good each variant was while it learnt: above over the number of training steps, below over the seconds "
        "they took, for a variant may learn more a step and yet less a second. Line: mean of the seeds; "
        "band: from the lowest seed to the highest.</p>"
    )
    if in_time == "time" and len(plan.budgets) > 1:
        lead += (
            '<p class="quiet">Over steps: the runs of as many steps. Over seconds: the runs of as much time as the '
            "reference's.</p>"
        )

    def panels(regime: str) -> str:
        shown = []
        for seconds, budget in ((False, shared_budget(plan)), (True, in_time)):
            for metric in metrics:
                curves = _curves(found, regime, budget, metric, seconds)
                if curves:
                    label = "seconds of training" if seconds else "step"
                    caption = "over seconds" if seconds else "over steps"
                    title = escape(capital(words(metric)))
                    shown.append(figure(title, curve_panel(curves, label=label), caption))
        return _grid(shown)

    return section("curves", "Along the runs", lead, *_blocks(found, panels))


def dictionary_section(found: Found) -> str:
    """What the dictionaries of negatives held."""
    heading = "The dictionary of negatives"
    plan, budget = found.plan, shared_budget(found.plan)
    metrics = [m for m in _DICTIONARY if m in found.metrics]
    if not metrics:
        return section("dictionary", heading, note("No variant has a dictionary: the batch's own clips are negatives."))
    reading = {name: (title, text) for name, title, text in _HEALTH}
    without = [v for v in plan.variants if not any(found.end(r, v, budget, m) for r in plan.regimes for m in metrics)]
    lead = (
        "<p>Negatives are the samples a query is told apart from; a dictionary keeps many of them. How varied, how "
        "often wrong (of the query's own class) and how old they were.</p>"
    )
    if without:
        lead += f'<p class="quiet">Not shown, for want of a dictionary or of runs: {escape(quoted(without))}.</p>'
    if "distinct_labels" not in metrics:
        lead += '<p class="quiet">No labels are known: classes and false negatives cannot be counted.</p>'

    def panels(regime: str) -> str:
        shown = []
        for metric in metrics:
            curves = _curves(found, regime, budget, metric)
            if curves:
                bottom = None if metric in _FREE else 0.0
                title, caption = reading[metric]
                shown.append(figure(title, curve_panel(curves, bottom=bottom, percent=metric in _SHARES), caption))
        return _grid(shown)

    return section("dictionary", heading, lead, *_blocks(found, panels, [v for v in plan.variants if v not in without]))


def bound_section(found: Found) -> str:
    """The InfoNCE estimate of mutual information beside what it cannot exceed."""
    heading = "Mutual information"
    plan, budget = found.plan, shared_budget(found.plan)
    if not {"mutual_information", "mutual_information_ceiling"} <= found.metrics:
        return section("bound", heading, note("No run has an estimate of the mutual information."))
    lead = (
        "<p>How much picture and sound of a clip tell about each other (in nats) as far as the training loss can say "
        "(InfoNCE). Dotted: its ceiling, the logarithm of the number of candidates among which the right one stands; "
        "no estimate can exceed it.</p>"
        + note(
            "It is a lower bound of the mutual information only with negatives drawn at random; chosen harder ones "
            "lower it. A lower estimate is then no worse a representation. Taken on the training batches, as means "
            "since the point before."
        )
    )

    def panel(regime: str) -> str:
        ceilings = _curves(found, regime, budget, "mutual_information_ceiling", dotted=True)
        curves = _curves(found, regime, budget, "mutual_information")
        return figure(escape(regime), curve_panel([*ceilings, *curves], bottom=0.0), "nats") if curves else ""

    rows = []
    for regime in plan.regimes:
        rows.append(heading_row(regime, 4))
        for variant in plan.variants:
            estimate, ceiling = (
                found.end(regime, variant, budget, m) for m in ("mutual_information", "mutual_information_ceiling")
            )
            if estimate is None or ceiling is None:
                continue
            share = f"{estimate.mean / ceiling.mean:.0%}" if ceiling.mean > 0 else "–"
            rows.append(
                f"<tr><th>{escape(variant)}</th>"
                f'<td class="number value" data-name="estimate">{mean_text(estimate)}</td>'
                f'<td class="number" data-name="ceiling">{ceiling.mean:.3f}</td>'
                f'<td class="number" data-name="share">{share}</td></tr>'
            )
    table = result_table(("variant", "estimate at the end", "ceiling", "share of the ceiling"), rows)
    return section("bound", heading, lead, *_small(found, panel), table)


def plateau_section(found: Found) -> str:
    """Whether and when the runs began to learn."""
    heading = "The plateau"
    plan, budget = found.plan, shared_budget(found.plan)
    if "plateau_steps" not in found.metrics or "batch_loss" not in found.metrics:
        text = "Not measured: in these runs the other clips of a batch are no negatives."
        return section("plateau", heading, note(text))
    sizes = {(c.regime, c.variant): c.config.optim.batch_size for c in plan.cells}
    lead = (
        "<p>A run may guess for long before it learns anything. Shown is the loss of finding the right one in the "
        "batch; dotted: what guessing gives, log M for batches of M clips. A run has left the plateau when its loss, "
        "averaged over 20 steps, falls below 0.9 of that.</p>"
    )

    def panel(regime: str) -> str:
        curves = _curves(found, regime, budget, "batch_loss")
        own = sorted({size for (r, _), size in sizes.items() if r == regime})
        caption = "; ".join(f"log {size} = {math.log(size):.2f}" for size in own)
        svg = curve_panel(curves, levels=[math.log(size) for size in own], bottom=0.0) if curves else ""
        return figure(escape(regime), svg, caption) if curves else ""

    rows = []
    for regime in plan.regimes:
        rows.append(heading_row(regime, 3))
        for variant in plan.variants:
            steps, left = (found.end(regime, variant, budget, m) for m in ("plateau_steps", "left_plateau"))
            if steps is None:
                continue
            count = "–" if left is None else f"{round(left.mean * left.seeds)} of {left.seeds}"
            rows.append(
                f'<tr><th>{escape(variant)}</th><td class="number value" data-name="steps">{mean_text(steps)}</td>'
                f'<td class="number" data-name="runs that left it">{count}</td></tr>'
            )
    table = result_table(("variant", "steps until it was left", "runs that left it"), rows)
    remark = '<p class="quiet">A run that never left it counts with all of its steps.</p>'
    return section("plateau", heading, lead, *_small(found, panel), table, remark)


def _curves(
    found: Found, regime: str, budget: str, metric: str, seconds: bool = False, dotted: bool = False
) -> list[Curve]:
    """Of all variants, the reference's last: it lies on top."""
    plan = found.plan
    drawn = pens(plan.variants, plan.reference)
    order = sorted(plan.variants, key=lambda variant: variant == plan.reference)
    curves = [
        curve_of(found.rows(regime, variant, budget, metric), drawn[variant], seconds=seconds, dotted=dotted)
        for variant in order
    ]
    return [curve for curve in curves if curve is not None]


def _legend(found: Found, variants: Sequence[str] | None = None) -> str:
    plan = found.plan
    drawn = pens(plan.variants, plan.reference)
    shown = plan.variants if variants is None else variants
    return legend([(drawn[v], v + (" (reference)" if v == plan.reference else "")) for v in shown])


def _blocks(found: Found, panels: Callable[[str], str], variants: Sequence[str] | None = None) -> list[str]:
    """A block of panels a regime, with the legend; beyond the first three they unfold."""
    blocks, keys = [], _legend(found, variants)
    for number, regime in enumerate(found.plan.regimes):
        inside = panels(regime) or '<p class="quiet">No run of it is there yet.</p>'
        if number < _OPEN:
            heading = f"<h3>{escape(regime)}</h3>" if regime else ""
            blocks.append(heading + keys + inside)
        else:
            blocks.append(f"<details><summary>{escape(regime)}</summary>{keys}{inside}</details>")
    return blocks


def _small(found: Found, panel: Callable[[str], str]) -> list[str]:
    """One panel a regime under one legend; beyond the first three they unfold together."""
    shown = [panel(regime) for regime in found.plan.regimes]
    parts = [_legend(found), _grid(shown[:_OPEN])]
    if any(shown[_OPEN:]):
        names = escape(quoted(found.plan.regimes[_OPEN:]))
        parts.append(f"<details><summary>{names}</summary>{_grid(shown[_OPEN:])}</details>")
    return parts


def _grid(shown: Sequence[str]) -> str:
    inside = "".join(one for one in shown if one)
    return f'<div class="panels even">{inside}</div>' if inside else ""
