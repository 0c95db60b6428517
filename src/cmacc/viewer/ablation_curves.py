"""Figures of an ablation's runs over time: learning curves, dictionaries, mutual information, the plateau."""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from cmacc.ablation import Row
from cmacc.viewer.ablation_figures import Pen, pens
from cmacc.viewer.ablation_words import Found, capital, mean_text, shared_budget, words
from cmacc.viewer.figures import DASHES, DOTTED, Line, line_panel
from cmacc.viewer.page import Figure
from cmacc.viewer.run_folder import Series
from cmacc.viewer.training import HEALTH, SHARES

Blocks = list[tuple[str, list[Figure]]]
"""Name and figures of each regime."""
Tables = list[tuple[str, list[tuple[str, ...]]]]
"""Name and table rows of each regime."""

_DICTIONARY = (
    "distinct_labels",
    "false_negative_share",
    "key_age",
    "pairwise_cosine",
    "effective_rank",
    "distinct_samples",
)
_FREE = ("pairwise_cosine", "effective_rank", "key_age")  # the axis need not include zero


def curve_of(rows: Sequence[Row], pen: Pen, *, seconds: bool = False, dotted: bool = False) -> Line | None:
    """Mean and range over seeds, at every step at which all seeds were measured; None without rows."""
    by_step: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        by_step[row.step].append(row)
    whole = max((len(at) for at in by_step.values()), default=0)
    steps = [step for step in sorted(by_step) if len(by_step[step]) == whole]
    if not steps:
        return None
    values = np.asarray([[row.value for row in by_step[step]] for step in steps], np.float64)
    places = [np.mean([row.seconds for row in by_step[step]]) if seconds else step for step in steps]
    return Line(
        Series(np.asarray(places, np.float64), values.mean(1)),
        pen.colour,
        band=(values.min(1), values.max(1)) if whole > 1 else None,
        dash=DOTTED if dotted else DASHES[pen.dash],
    )


def progress(found: Found, metrics: Sequence[str]) -> Blocks:
    """Learning curves over steps and over seconds."""
    plan = found.plan
    in_time = "time" if "time" in plan.budgets else plan.budgets[0]
    blocks: Blocks = []
    for regime in plan.regimes:
        figures = []
        for seconds, budget in ((False, shared_budget(plan)), (True, in_time)):
            label, caption = ("seconds of training", "over seconds") if seconds else ("step", "over steps")
            for metric in metrics:
                if lines := _lines(found, regime, budget, metric, seconds):
                    figures.append(Figure(capital(words(metric)), line_panel(lines, label=label), caption))
        blocks.append((regime, figures))
    return blocks


def dictionary_metrics(found: Found) -> list[str]:
    """The measured health metrics of dictionaries."""
    return [metric for metric in _DICTIONARY if metric in found.metrics]


def dictionaries(found: Found) -> Blocks:
    """Health of the dictionaries over steps."""
    budget = shared_budget(found.plan)
    blocks: Blocks = []
    for regime in found.plan.regimes:
        figures = []
        for metric in dictionary_metrics(found):
            if lines := _lines(found, regime, budget, metric):
                title, caption = HEALTH[metric]
                svg = line_panel(lines, bottom=None if metric in _FREE else 0.0, percent=metric in SHARES)
                figures.append(Figure(title, svg, caption))
        blocks.append((regime, figures))
    return blocks


def bounds(found: Found) -> tuple[list[Figure], Tables]:
    """The InfoNCE estimate and its ceiling: one figure per regime, and rows (variant, estimate, ceiling, share)."""
    budget = shared_budget(found.plan)
    figures: list[Figure] = []
    tables: Tables = []
    for regime in found.plan.regimes:
        ceilings = _lines(found, regime, budget, "mutual_information_ceiling", dotted=True)
        if lines := _lines(found, regime, budget, "mutual_information"):
            figures.append(Figure(regime, line_panel([*ceilings, *lines], bottom=0.0), "nats"))
        rows: list[tuple[str, ...]] = []
        for variant in found.plan.variants:
            estimate = found.end(regime, variant, budget, "mutual_information")
            ceiling = found.end(regime, variant, budget, "mutual_information_ceiling")
            if estimate is not None and ceiling is not None:
                share = f"{estimate.mean / ceiling.mean:.0%}" if ceiling.mean > 0 else "–"
                rows.append((variant, mean_text(estimate), f"{ceiling.mean:.3f}", share))
        tables.append((regime, rows))
    return figures, tables


def plateaus(found: Found) -> tuple[list[Figure], Tables]:
    """When the runs left the plateau: one figure per regime, and rows (variant, steps, runs that left it)."""
    plan, budget = found.plan, shared_budget(found.plan)
    figures: list[Figure] = []
    tables: Tables = []
    for regime in plan.regimes:
        sizes = sorted({cell.config.optim.batch_size for cell in plan.cells if cell.regime == regime})
        if lines := _lines(found, regime, budget, "batch_loss"):
            caption = "; ".join(f"log {size} = {math.log(size):.2f}" for size in sizes)
            svg = line_panel(lines, levels=[math.log(size) for size in sizes], bottom=0.0)
            figures.append(Figure(regime, svg, caption))
        rows: list[tuple[str, ...]] = []
        for variant in plan.variants:
            steps = found.end(regime, variant, budget, "plateau_steps")
            left = found.end(regime, variant, budget, "left_plateau")
            if steps is not None:
                count = "–" if left is None else f"{round(left.mean * left.seeds)} of {left.seeds}"
                rows.append((variant, mean_text(steps), count))
        tables.append((regime, rows))
    return figures, tables


def _lines(
    found: Found, regime: str, budget: str, metric: str, seconds: bool = False, dotted: bool = False
) -> list[Line]:
    """Lines of all variants, the reference last, so that it is on top."""
    plan = found.plan
    drawn = pens(plan.variants, plan.reference)
    order = sorted(plan.variants, key=lambda variant: variant == plan.reference)
    lines = [
        curve_of(found.rows(regime, variant, budget, metric), drawn[variant], seconds=seconds, dotted=dotted)
        for variant in order
    ]
    return [line for line in lines if line is not None]
