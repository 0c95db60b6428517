"""The page of an ablation: which variants are better than the reference, by how much, how certainly, at what cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cmacc.ablation import AblationPlan, AblationResults, Cell, Difference, shown_metrics
from cmacc.pretraining import to_plain
from cmacc.viewer.ablation_curves import bounds, dictionaries, dictionary_metrics, plateaus, progress
from cmacc.viewer.ablation_figures import Scale, legend_of, scale_over
from cmacc.viewer.ablation_words import (
    BUDGETS,
    Found,
    capital,
    difference_text,
    digits_for,
    direction,
    flat,
    mean_text,
    quoted,
    shared_budget,
    signed,
    tally,
    words,
)
from cmacc.viewer.page import check_out, counted, listed, render, write_page

_KINDS = {
    "vectors": "generated pairs of vectors that share a latent cause, a small substitute for video and audio",
    "rendered": "rendered clips of a synthetic world, with video and audio",
    "clips": "clips of real files, listed in a manifest",
}
_FEW_NAMES = 4


@dataclass(frozen=True)
class Lane:
    """A row of intervals, one per budget; None if there is no pair of runs."""

    name: str
    intervals: list[Difference | None]


@dataclass(frozen=True)
class Comparison:
    """All differences of a metric to the reference, on one scale, in panels of (title, lanes)."""

    metric: str
    better: int
    verdict: str
    scale: Scale
    panels: list[tuple[str, list[Lane]]]


@dataclass(frozen=True)
class ResultTable:
    """A metric at the end of all runs. ``blocks``: a heading (regime and budget) with its rows."""

    metric: str
    better: int
    count: str
    blocks: list[tuple[str, list[tuple[Difference, list[tuple[str, str]]]]]]


def write_ablation_page(results: AblationResults, out: Path, *, overwrite: bool = False) -> Path:
    """Write the page of an ablation. The same results give a byte-identical page.

    Parameters
    ----------
    results
        From `results_of_runs`; runs may be missing.
    out
        The page.
    overwrite
        Whether to replace an existing file.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ReportError
        ``out`` is a folder, or exists already.
    """
    check_out("ablation", out, overwrite)
    return write_page(out, render_ablation_page(results))


def render_ablation_page(results: AblationResults) -> str:
    """The page as text."""
    found, plan = Found(results), results.plan
    compared = [m for m in dict.fromkeys([plan.headline, "probe_video", "probe_audio"]) if m in found.metrics]
    others = [name for name in plan.variants if name != plan.reference]
    of_dictionary = dictionary_metrics(found)
    with_dictionary = [
        variant
        for variant in plan.variants
        if any(found.end(r, variant, shared_budget(plan), m) for r in plan.regimes for m in of_dictionary)
    ]
    bound_figures, bound_tables = bounds(found)
    plateau_figures, plateau_tables = plateaus(found)
    return render(
        "ablation.html.j2",
        name=plan.title or "Ablation",
        plan=plan,
        metrics=found.metrics,
        budgets=BUDGETS,
        summary=_summary(plan),
        problem=_problem(plan),
        planned=_planned(plan),
        missing=results.missing_runs,
        headlines=_tiles(found),
        others=others,
        comparisons=[_comparison(found, metric, others) for metric in compared] if others else [],
        tables=[_result_table(found, metric) for metric in shown_metrics(results) if metric in found.metrics],
        progress=progress(found, compared) if compared else [],
        dictionaries=dictionaries(found) if of_dictionary else [],
        without_dictionary=[name for name in plan.variants if name not in with_dictionary],
        bound_figures=bound_figures,
        bound_tables=bound_tables,
        plateau_figures=plateau_figures,
        plateau_tables=plateau_tables,
        legend=legend_of(plan.variants, plan.reference, plan.variants),
        dictionary_legend=legend_of(plan.variants, plan.reference, with_dictionary),
        unlike=_unlike_settings(plan),
        all_settings=_all_settings(plan),
        words=lambda metric: capital(words(metric)),
        difference=lambda one: signed(one.difference, digits_for(one.mean)),
        tally=tally,
        quoted=quoted,
        isnan=math.isnan,
    )


def _summary(plan: AblationPlan) -> str:
    others = [name for name in plan.variants if name != plan.reference]
    kind = str(plan.cells[0].problem.get("kind"))
    text = f"Learning to match video and audio on {_KINDS.get(kind, kind)}. "
    text += f"{quoted(others)} compared with {quoted([plan.reference])}, the reference" if others else "One variant"
    if plan.regimes != [""]:  # many names would make the sentence too long; the figures have them too
        names = f" ({quoted(plan.regimes)})" if len(plan.regimes) <= _FEW_NAMES else ""
        text += f", in {counted(len(plan.regimes), 'regime')}{names}"
    text += f". Every variant is trained with {counted(len(plan.seeds), 'seed')}, "
    return text + f"{listed([f'for the {BUDGETS[budget]} as the reference' for budget in plan.budgets])}."


def _problem(plan: AblationPlan) -> str:
    settings = [f"{name} {value}" for name, value in plan.cells[0].problem.items() if name != "kind"]
    regime = f" (in {quoted(plan.regimes[:1])})" if len(plan.regimes) > 1 else ""
    return f"Problem{regime}: {'; '.join(settings)}." if settings else ""


def _planned(plan: AblationPlan) -> int:
    return len(plan.seeds) * sum(plan.has(cell, budget) for cell in plan.cells for budget in plan.budgets)


def _tiles(found: Found) -> list[tuple[str, str, str]]:
    plan = found.plan
    there = _planned(plan) - found.results.missing_runs
    return [
        (f"{len(plan.variants):,}", "variants", f"reference: {plan.reference}"),
        (f"{len(plan.regimes):,}", "regimes" if len(plan.regimes) > 1 else "regime", "each compared separately"),
        (f"{len(plan.seeds):,}", "seeds" if len(plan.seeds) > 1 else "seed", ", ".join(map(str, plan.seeds))),
        (f"{there:,}", "runs" if there != 1 else "run", f"of {_planned(plan):,} planned"),
    ]


def _comparison(found: Found, metric: str, others: Sequence[str]) -> Comparison:
    """One panel per variant, with regimes as rows; with one regime, a single panel with variants as rows."""
    plan = found.plan

    def lane(name: str, regime: str, variant: str) -> Lane:
        ends = [found.end(regime, variant, budget, metric) for budget in plan.budgets]
        return Lane(name, [None if one is None or math.isnan(one.difference) else one for one in ends])

    if len(plan.regimes) == 1:
        regime = plan.regimes[0]
        panels = [(capital(regime) or "All variants", [lane(name, regime, name) for name in others])]
    else:
        panels = [(name, [lane(regime, regime, name) for regime in plan.regimes]) for name in others]
    ends = [one for one in found.results.differences if one.metric == metric]
    scale = scale_over([value for one in ends for value in (one.difference, one.low, one.high)])
    return Comparison(metric, direction(metric), _verdict(found, metric), scale, panels)


def _verdict(found: Found, metric: str) -> str:
    """The number of comparisons whose whole interval is on one side of zero."""
    sentences = []
    better = direction(metric) or 1
    up, down = ("better", "worse") if direction(metric) else ("higher", "lower")
    for budget in found.plan.budgets:
        known = [
            one
            for one in found.results.differences
            if (one.metric, one.budget) == (metric, budget) and not math.isnan(one.low)
        ]
        if known:
            above = sum(min(better * one.low, better * one.high) > 0 for one in known)
            below = sum(max(better * one.low, better * one.high) < 0 for one in known)
            sentences.append(
                f"With the {BUDGETS[budget]}: of {counted(len(known), 'comparison')}, {above} {up}, {below} {down}, "
                f"{len(known) - above - below} undecided."
            )
    return " ".join(sentences) or "There is only one seed, so there are no intervals."


def _result_table(found: Found, metric: str) -> ResultTable:
    plan = found.plan
    count = "better : worse" if direction(metric) else "higher : lower"
    blocks = []
    for regime in plan.regimes:
        for budget in plan.budgets:
            ends = [one for v in plan.variants if (one := found.end(regime, v, budget, metric)) is not None]
            if ends:
                place = f"{regime} · {BUDGETS[budget]}" if regime else BUDGETS[budget]
                blocks.append((place, [(one, _cells(plan, one, count)) for one in ends]))
    return ResultTable(metric, direction(metric), count, blocks)


def _cells(plan: AblationPlan, one: Difference, count: str) -> list[tuple[str, str]]:
    """(name, text) of a row's cells."""
    better, worse = tally(one)
    paired = not math.isnan(one.difference)
    return [
        ("steps", f"{one.steps:,}"),
        ("seeds", f"{one.seeds}" + ("" if one.seeds == len(plan.seeds) else f" of {len(plan.seeds)}")),
        ("mean", mean_text(one)),
        ("difference", difference_text(one) or ("reference" if one.variant == plan.reference else "no pair")),
        (count, f"{better} : {worse}" if paired else "–"),
        ("p", f"{one.p_value:.3g}" if paired else "–"),
        ("ms per step", f"{1000 * one.step_seconds:,.1f}"),
    ]


def _unlike_settings(plan: AblationPlan) -> list[tuple[str, list[tuple[str, str]]]]:
    """Differences between the settings of variants and regimes: a heading, and (name, settings) of each."""
    first = next(cell for cell in plan.cells if cell.variant == plan.reference)
    parts = []
    variants = [
        (name, _unlike(beside, plan.cell(first.regime, name)))
        for name in plan.variants
        if name != plan.reference and (beside := plan.cell(first.regime, plan.reference))
    ]
    if variants:
        parts.append((f"Variants: settings that differ from {quoted([plan.reference])}", variants))
    regimes = [(name, _unlike(first, plan.cell(name, plan.reference))) for name in plan.regimes if name != first.regime]
    if regimes:
        parts.append((f"Regimes: settings that differ from {quoted([first.regime])}", regimes))
    return parts


def _all_settings(plan: AblationPlan) -> tuple[str, str]:
    """A heading, and all settings of the reference as YAML."""
    first = next(cell for cell in plan.cells if cell.variant == plan.reference)
    where = f" in {quoted([first.regime])}" if first.regime else ""
    whole = yaml.safe_dump({"problem": to_plain(first.problem), **_leaves(first)}, sort_keys=False)
    return f"All settings of {quoted([plan.reference])}{where}", whole


def _leaves(cell: Cell) -> dict[str, Any]:
    plain: dict[str, Any] = to_plain(cell.config)
    return plain


def _unlike(one: Cell, other: Cell | None) -> str:
    """Settings of ``other`` that differ from those of ``one``, as text."""
    if other is None:
        return "not in this regime, or the same run as another variant"
    before, after = (flat({"problem": cell.problem, **_leaves(cell)}) for cell in (one, other))
    changed = [
        f"{name}: {after.get(name, 'default')} (not {before.get(name, 'default')})"
        for name in dict.fromkeys([*after, *before])
        if after.get(name) != before.get(name)
    ]
    return ", ".join(changed) or "none"
