"""The page of an ablation: which variant is better than the reference, by how much, how surely, and at what cost."""

import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from cmacc.ablation import AblationPlan, AblationResults, Cell, Difference, shown_metrics
from cmacc.clips.storage import written_aside
from cmacc.pretraining import to_plain
from cmacc.viewer.ablation_curves import (
    bound_section,
    curves_section,
    dictionary_section,
    plateau_section,
)
from cmacc.viewer.ablation_figures import Mark, Scale, forest_axis, forest_lane, scale_over
from cmacc.viewer.ablation_words import (
    BUDGETS,
    Found,
    capital,
    counted,
    difference_text,
    digits_for,
    direction,
    flat,
    heading_row,
    listed,
    mean_text,
    quoted,
    result_table,
    signed,
    tally,
    words,
)
from cmacc.viewer.page import escape, note, page, section, tiles
from cmacc.viewer.run_folder import check_out

_CONTENTS = (
    ("differences", "Differences"),
    ("results", "Results"),
    ("curves", "Along the runs"),
    ("dictionary", "Dictionary"),
    ("bound", "Mutual information"),
    ("plateau", "Plateau"),
    ("method", "How it was measured"),
)
_KINDS = {
    "vectors": "generated pairs of vectors that share a hidden cause, a small stand-in for picture and sound",
    "rendered": "rendered clips of a synthetic world, with picture and sound",
    "clips": "clips of real files, listed in a manifest",
}
_MARKS = (("c1", "dot"), ("c2", "diamond"))
_FEW_NAMES = 4
_FEW_ROWS = 14  # so many rows of differences are shown unfolded beyond the headline's
_STYLE = files("cmacc.viewer").joinpath("ablation.css").read_text(encoding="utf-8")


def write_ablation_page(results: AblationResults, out: Path, *, overwrite: bool = False) -> Path:
    """Write the page of an ablation. The same results give the same page, byte for byte.

    Parameters
    ----------
    results
        What `results_of_runs` gave; runs may be missing.
    out
        The page.
    overwrite
        Whether a file that is there may be replaced.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ReportError
        ``out`` is a folder, or there already.
    """
    check_out("ablation", out, overwrite)
    text = render_ablation_page(results)
    with written_aside(out) as aside:
        aside.write_text(text, encoding="utf-8")
    return out


def render_ablation_page(results: AblationResults) -> str:
    """The page as text."""
    found = Found(results)
    title = results.plan.title or "Ablation"
    links = "".join(f'<a href="#{anchor}">{text}</a>' for anchor, text in _CONTENTS)
    body = [
        f'<header><p class="eyebrow">cmacc ablation</p><h1>{escape(title)}</h1>{_lead(found)}</header>',
        _tiles(found),
        f"<nav>{links}</nav>",
        _differences_section(found),
        _results_section(found),
        curves_section(found),
        dictionary_section(found),
        bound_section(found),
        plateau_section(found),
        _method_section(found),
    ]
    return page(f"{title} · cmacc ablation", "\n".join(body), style=_STYLE)


def _lead(found: Found) -> str:
    plan = found.plan
    others = [name for name in plan.variants if name != plan.reference]
    kind = str(plan.cells[0].problem.get("kind"))
    text = f"Learning to match picture and sound on {_KINDS.get(kind, kind)}. "
    text += f"{quoted(others)} compared with {quoted([plan.reference])}, the reference" if others else "One variant"
    if plan.regimes != [""]:  # many names would bury the sentence; they stand beside the figures
        names = f" ({quoted(plan.regimes)})" if len(plan.regimes) <= _FEW_NAMES else ""
        text += f", in {counted(len(plan.regimes), 'regime')}{names}"
    text += f". Every variant is trained with {counted(len(plan.seeds), 'seed')}, "
    text += f"{listed([f'for the {BUDGETS[budget]} as the reference' for budget in plan.budgets])}."
    parts = [f'<p class="lead">{escape(text)}</p>']
    settings = [f"{name} {value}" for name, value in plan.cells[0].problem.items() if name != "kind"]
    if settings:
        regime = f" (in {quoted(plan.regimes[:1])})" if len(plan.regimes) > 1 else ""
        parts.append(f'<p class="quiet">Problem{escape(regime)}: {escape("; ".join(settings))}.</p>')
    if found.results.missing_runs:
        missing = counted(found.results.missing_runs, "run")
        verb = "is" if found.results.missing_runs == 1 else "are"
        parts.append(
            note(
                f"{missing} of {_planned(plan):,} {verb} not there yet: what follows is of the others, and pairs lack "
                "where one of the two does."
            )
        )
    return "".join(parts)


def _planned(plan: AblationPlan) -> int:
    return len(plan.seeds) * sum(plan.has(cell, budget) for cell in plan.cells for budget in plan.budgets)


def _tiles(found: Found) -> str:
    plan = found.plan
    there = _planned(plan) - found.results.missing_runs
    shown = [
        (f"{len(plan.variants):,}", "variants", f"reference: {escape(plan.reference)}"),
        (f"{len(plan.regimes):,}", "regimes" if len(plan.regimes) > 1 else "regime", "each compared by itself"),
        (f"{len(plan.seeds):,}", "seeds" if len(plan.seeds) > 1 else "seed", ", ".join(map(str, plan.seeds))),
        (f"{there:,}", "runs" if there != 1 else "run", f"of {_planned(plan):,} planned"),
    ]
    return tiles(shown)


def _differences_section(found: Found) -> str:
    plan, heading = found.plan, "Differences"
    metrics = [m for m in dict.fromkeys([plan.headline, "probe_video", "probe_audio"]) if m in found.metrics]
    others = [name for name in plan.variants if name != plan.reference]
    if not metrics or not others:
        text = "There is no run to compare yet." if others else "The plan has one variant only: nothing to compare."
        return section("differences", heading, note(text))
    lead = (
        f"<p>Each mark is a variant's mean difference to <b>{escape(plan.reference)}</b> over runs with the same seed; "
        "its bar is the 95 % bootstrap interval. On the upright line there is no difference; a bar that crosses it "
        "decides nothing. Beside it: the difference, and in how many seeds the variant did better : worse.</p>"
    )
    keys = "".join(
        f'<span><i class="{shape}" style="background:var(--{colour})"></i>{BUDGETS[budget]}</span>'
        for budget, (colour, shape) in zip(plan.budgets, _MARKS, strict=False)
    )
    parts = [lead, f'<div class="legend">{keys}</div>']
    if plan.headline not in found.metrics:
        parts.append(note(f"The headline {escape(plan.headline)} has not been measured in any run."))
    for number, metric in enumerate(metrics):
        title = escape(capital(words(metric)))
        inside = f'<p class="quiet">{_verdict(found, metric)}</p>{_forests(found, metric, others)}'
        if number == 0:
            parts.append(f"<h3>{title}</h3>{inside}")
        else:
            unfolded = " open" if len(others) * len(plan.regimes) <= _FEW_ROWS else ""
            parts.append(f"<details{unfolded}><summary>{title}</summary>{inside}</details>")
    return section("differences", heading, *parts)


def _verdict(found: Found, metric: str) -> str:
    """How many comparisons are on which side of zero with their whole interval."""
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
                f"For the {BUDGETS[budget]}: of {counted(len(known), 'comparison')} {above} {up}, {below} {down}, "
                f"{len(known) - above - below} undecided."
            )
    return " ".join(sentences) or "One seed only: no intervals."


def _forests(found: Found, metric: str, others: Sequence[str]) -> str:
    """A panel a variant with regimes as rows; with one regime a single panel with variants as rows."""
    plan = found.plan
    ends = [one for one in found.results.differences if one.metric == metric]
    scale = scale_over([value for one in ends for value in (one.difference, one.low, one.high)])
    if len(plan.regimes) == 1:
        title = capital(plan.regimes[0]) or "All variants"
        rows = [(name, plan.regimes[0], name) for name in others]
        return f'<div class="wide">{_forest(found, metric, title, rows, scale)}</div>'
    panels = [_forest(found, metric, name, [(r, r, name) for r in plan.regimes], scale) for name in others]
    return f'<div class="forests">{"".join(panels)}</div>'


def _forest(found: Found, metric: str, title: str, rows: Sequence[tuple[str, str, str]], scale: Scale) -> str:
    """``rows`` hold (name, regime, variant)."""
    budgets = found.plan.budgets
    cells = []
    for name, regime, variant in rows:
        ends = [found.end(regime, variant, budget, metric) for budget in budgets]
        known = [(i, one) for i, one in enumerate(ends) if one is not None and not math.isnan(one.difference)]
        marks = [Mark(one.difference, one.low, one.high, i) for i, one in known]
        sums = "".join(
            f"<span><b>{signed(one.difference, digits_for(one.mean))}</b> {tally(one)[0]} : {tally(one)[1]}</span>"
            for _, one in known
        )
        cells.append(
            f"<span>{escape(name)}</span>{forest_lane(marks, scale, len(budgets))}"
            f'<div class="sums">{sums or "<span>no pair</span>"}</div>'
        )
    axis = f"<span></span>{forest_axis(scale, direction(metric))}<span></span>"
    return f'<figure><b>{escape(title)}</b><div class="forest">{"".join(cells)}{axis}</div></figure>'


def _results_section(found: Found) -> str:
    metrics = [m for m in shown_metrics(found.results) if m in found.metrics]
    if not metrics:
        return section("results", "Results", note("No run is there yet."))
    lead = (
        "<p>Every variant at the end of its runs: mean ± deviation over seeds, the difference to the reference with "
        "its 95 % interval, in how many seeds it did better : worse (wins : losses of the sign test), how likely so "
        "uneven a count is by chance (p), and how long a step took.</p>"
    )
    parts = [lead]
    for number, metric in enumerate(metrics):
        title, note_ = escape(capital(words(metric))), ""
        if direction(metric) == 0:
            note_ = '<p class="quiet">Neither more nor less of it is better as such: counted are higher : lower.</p>'
        elif direction(metric) < 0:
            note_ = '<p class="quiet">Less is better: a difference below zero speaks for the variant.</p>'
        table = note_ + _metric_table(found, metric)
        parts.append(
            f"<h3>{title}</h3>{table}" if number == 0 else f"<details><summary>{title}</summary>{table}</details>"
        )
    return section("results", "Results", *parts)


def _metric_table(found: Found, metric: str) -> str:
    plan = found.plan
    count = "better : worse" if direction(metric) else "higher : lower"
    heads = ("variant", "steps", "seeds", "mean ± deviation", "difference [95 %]", count, "p", "ms a step")
    rows = []
    for regime in plan.regimes:
        for budget in plan.budgets:
            ends = [one for v in plan.variants if (one := found.end(regime, v, budget, metric)) is not None]
            if ends:
                place = f"{regime} · {BUDGETS[budget]}" if regime else BUDGETS[budget]
                rows.append(heading_row(place, len(heads)))
                rows += [_result_row(plan, one, count) for one in ends]
    return result_table(heads, rows)


def _result_row(plan: AblationPlan, one: Difference, count: str) -> str:
    reference = one.variant == plan.reference
    better, worse = tally(one)
    paired = not math.isnan(one.difference)
    cells = (
        ("steps", f"{one.steps:,}"),
        ("seeds", f"{one.seeds}" + ("" if one.seeds == len(plan.seeds) else f" of {len(plan.seeds)}")),
        ("mean", mean_text(one)),
        ("difference", difference_text(one) or ("reference" if reference else "no pair")),
        (count, f"{better} : {worse}" if paired else "–"),
        ("p", f"{one.p_value:.3g}" if paired else "–"),
        ("ms a step", f"{1000 * one.step_seconds:,.1f}"),
    )
    values = ("mean", "difference")
    shown = "".join(
        f'<td class="number{" value" if name in values else ""}" data-name="{name}">{text}</td>' for name, text in cells
    )
    return f"<tr{' class=reference' if reference else ''}><th>{escape(one.variant)}</th>{shown}</tr>"


def _method_section(found: Found) -> str:
    plan = found.plan
    points = [
        "<b>Paired seeds.</b> Runs with the same seed start from the same first weights and see the data in the same "
        "order; a difference is taken between two such runs, so that luck of the start falls out of it. Regimes are "
        "never compared with each other.",
        "<b>Same number of steps.</b> Every variant trains for as many steps as the plan says, however long they take.",
    ]
    if "time" in plan.budgets:
        points.append(
            "<b>Same time.</b> Every variant trains for as many steps as fit into the time of the reference's run. How "
            "long a step takes was measured once for each, in turns, on the machine of the runs; on another machine "
            "the numbers of steps would differ. The seconds of the curves are those of the runs, with whatever else "
            "the machine did meanwhile."
        )
    points += [
        "<b>Interval.</b> Percentile bootstrap over the pairs, 95 %. "
        + (
            f"With only {counted(len(plan.seeds), 'seed')} it is too narrow: take it as the range of what was seen."
            if len(plan.seeds) < 10
            else "With few pairs it is somewhat too narrow."
        ),
        "<b>Sign test.</b> p is the chance that so uneven a count of better and worse seeds, or a more uneven one, "
        "came about if both were equally likely. With five seeds or fewer it cannot fall below 0.05. Among many "
        "comparisons some look decided by chance.",
        "<b>Probes and retrieval.</b> A linear probe is a ridge classifier on frozen features, its accuracy measured "
        "on held-out samples. Retrieval: each held-out picture looks for its own sound among up to 500, and the "
        "other way round.",
    ]
    listing = "<ul>" + "".join(f"<li>{point}</li>" for point in points) + "</ul>"
    return section("method", "How it was measured", listing, *_settings(plan))


def _settings(plan: AblationPlan) -> list[str]:
    """What sets variants and regimes apart, and all settings of the reference."""
    first = next(cell for cell in plan.cells if cell.variant == plan.reference)
    parts = []
    variants = [
        (name, _unlike(beside, plan.cell(first.regime, name)))
        for name in plan.variants
        if name != plan.reference and (beside := plan.cell(first.regime, plan.reference))
    ]
    if variants:
        parts.append(_unlike_list(f"Variants: settings unlike those of {quoted([plan.reference])}", variants))
    regimes = [(name, _unlike(first, plan.cell(name, plan.reference))) for name in plan.regimes if name != first.regime]
    if regimes:
        parts.append(_unlike_list(f"Regimes: settings unlike those of {quoted([first.regime])}", regimes))
    whole = yaml.safe_dump({"problem": to_plain(first.problem), **_leaves(first)}, sort_keys=False)
    where = f" in {quoted([first.regime])}" if first.regime else ""
    summary = f"All settings of {quoted([plan.reference])}{where}"
    parts.append(f"<details><summary>{escape(summary)}</summary><pre>{escape(whole)}</pre></details>")
    return parts


def _leaves(cell: Cell) -> dict[str, Any]:
    plain: dict[str, Any] = to_plain(cell.config)
    return plain


def _unlike(one: Cell, other: Cell | None) -> str:
    """Settings of ``other`` that ``one`` has not, as text."""
    if other is None:
        return "not in this regime, or the same run as another variant"
    before, after = (flat({"problem": cell.problem, **_leaves(cell)}) for cell in (one, other))
    changed = [
        f"{name}: {after.get(name, 'default')} (not {before.get(name, 'default')})"
        for name in dict.fromkeys([*after, *before])
        if after.get(name) != before.get(name)
    ]
    return ", ".join(changed) or "none"


def _unlike_list(summary: str, entries: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in entries)
    return f"<details><summary>{escape(summary)}</summary><dl>{rows}</dl></details>"
