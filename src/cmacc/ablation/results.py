"""Results of an ablation: tidy rows of all metrics, and paired differences to the reference with intervals."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cmacc.ablation.ablate import PlannedRun, run_rows
from cmacc.ablation.plan import AblationPlan
from cmacc.clips.storage import written_aside

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Row:
    """One metric of one run at one point."""

    regime: str
    variant: str
    budget: str
    seed: int
    step: int
    seconds: float
    metric: str
    value: float


@dataclass(frozen=True)
class Difference:
    """One metric of a variant at the end of its runs, compared with the reference in the same regime.

    Attributes
    ----------
    seeds
        Number of seeds of the variant.
    mean, deviation
        Mean and standard deviation (with n - 1) over all seeds of the variant; the deviation of one seed is NaN.
    step_seconds
        Mean seconds per step in these runs, including the effect of other load on the machine.
    steps
        Number of steps of a run.
    difference
        Mean of variant minus reference over the pairs; NaN for the reference itself and without pairs.
    low, high
        95 % percentile bootstrap interval of the difference over pairs; NaN with fewer than two.
    wins, losses
        Number of pairs in which the variant is above or below the reference; ties are neither.
    p_value
        Two-sided exact sign test of wins against losses (Dixon and Mood, 1946); with five pairs or fewer it cannot be
        below 0.05.
    """

    regime: str
    variant: str
    budget: str
    metric: str
    seeds: int
    mean: float
    deviation: float
    steps: int
    step_seconds: float
    difference: float
    low: float
    high: float
    wins: int
    losses: int
    p_value: float


@dataclass(frozen=True)
class AblationResults:
    """Everything that the page of an ablation shows."""

    plan: AblationPlan
    rows: list[Row]
    differences: list[Difference]
    missing_runs: int


def results_of_runs(plan: AblationPlan, runs: Sequence[PlannedRun], folder: Path) -> AblationResults:
    """Read all existing runs and compare them.

    Raises
    ------
    PlanError
        The file of a run is damaged.
    """
    rows: list[Row] = []
    missing = 0
    for run in runs:
        points = run_rows(folder, run)
        if points is None:
            missing += 1
            continue
        rows += [
            Row(run.cell.regime, run.cell.variant, run.budget, run.config.seed, point["step"], point["seconds"], *item)
            for point in points
            for item in sorted(point["metrics"].items())
        ]
    return AblationResults(plan, rows, differences_of(rows, plan.reference), missing)


def differences_of(rows: Sequence[Row], reference: str) -> list[Difference]:
    """Every metric at the end of the runs, paired by seed with the reference in the same regime and budget."""
    ends: dict[tuple[str, str, str, str], dict[int, Row]] = defaultdict(dict)
    for row in rows:  # a later point of a run replaces an earlier one
        known = ends[row.regime, row.variant, row.budget, row.metric].get(row.seed)
        if known is None or row.step >= known.step:
            ends[row.regime, row.variant, row.budget, row.metric][row.seed] = row
    found = []
    for (regime, variant, budget, metric), by_seed in ends.items():
        others = ends.get((regime, reference, budget, metric), {}) if variant != reference else {}
        paired = [by_seed[seed].value - others[seed].value for seed in sorted(by_seed.keys() & others.keys())]
        values = np.asarray([row.value for row in by_seed.values()])
        last = next(iter(by_seed.values()))
        low, high = interval(paired)
        wins, losses = sum(d > 0 for d in paired), sum(d < 0 for d in paired)
        found.append(
            Difference(
                regime, variant, budget, metric,
                seeds=len(by_seed),
                mean=float(values.mean()),
                deviation=float(values.std(ddof=1)) if len(values) > 1 else math.nan,
                steps=last.step,
                step_seconds=float(np.mean([row.seconds / row.step for row in by_seed.values()])),
                difference=float(np.mean(paired)) if paired else math.nan,
                low=low,
                high=high,
                wins=wins,
                losses=losses,
                p_value=sign_test(wins, losses),
            )
        )  # fmt: skip
    return found


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of paired differences, over 10,000 resamples with a fixed seed.

    With few pairs it is too narrow. With three, it reaches at most from the smallest to the largest difference, and
    contains the true mean in about three cases of four.

    Examples
    --------
    >>> interval([0.1, 0.1, 0.1])
    (0.1, 0.1)
    >>> interval([0.1])
    (nan, nan)
    """
    if len(differences) < 2:
        return math.nan, math.nan
    values: NDArray[np.float64] = np.asarray(differences, np.float64)
    drawn = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return round(float(low), 12), round(float(high), 12)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of the hypothesis that wins and losses are equally likely; 1 without either.

    Examples
    --------
    >>> sign_test(10, 0), sign_test(3, 3)
    (0.001953125, 1.0)
    """
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def write_results(results: AblationResults, folder: Path) -> None:
    """Write ``metrics.parquet`` (tidy), ``differences.parquet`` and ``table.md``."""
    for name, kind, rows in (("metrics", Row, results.rows), ("differences", Difference, results.differences)):
        columns = {field: [getattr(row, field) for row in rows] for field in kind.__dataclass_fields__}
        with written_aside(folder / f"{name}.parquet") as aside:
            pq.write_table(pa.table(columns), aside)
    with written_aside(folder / "table.md") as aside:
        aside.write_text(markdown_table(results, shown_metrics(results)))


def shown_metrics(results: AblationResults) -> list[str]:
    """The metrics of the table: the headline first, then the other measured ones."""
    known = {difference.metric for difference in results.differences}
    wanted = [results.plan.headline, "R@10", "probe_video", "probe_audio", "balanced_video", "plateau_steps"]
    return [name for name in dict.fromkeys(wanted) if name in known]


def markdown_table(results: AblationResults, metrics: Sequence[str]) -> str:
    """A table with a row per regime, budget and variant: mean ± deviation, difference to the reference, interval."""
    by_place = {(d.regime, d.budget, d.variant, d.metric): d for d in results.differences}
    heads = ["regime", "budget", "variant", "steps", "seeds"]
    for metric in metrics:
        heads += [metric, f"minus {results.plan.reference} [95 %], wins : losses"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for regime in results.plan.regimes:
        for budget in results.plan.budgets:
            for variant in results.plan.variants:
                found = [by_place.get((regime, budget, variant, metric)) for metric in metrics]
                first = next((one for one in found if one is not None), None)
                if first is None:
                    continue
                cells = [regime or "–", budget, variant, f"{first.steps:,}", str(first.seeds)]
                for one in found:
                    cells += ["–", "–"] if one is None else [_value(one), _difference(one)]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _value(one: Difference) -> str:
    digits = 0 if abs(one.mean) >= 20 else 3
    deviation = "" if math.isnan(one.deviation) else f" ± {one.deviation:.{digits}f}"
    return f"{one.mean:.{digits}f}{deviation}"


def _difference(one: Difference) -> str:
    if math.isnan(one.difference):
        return ""
    digits = 0 if abs(one.mean) >= 20 else 3
    inside = "" if math.isnan(one.low) else f" [{one.low:+.{digits}f}, {one.high:+.{digits}f}]"
    return f"{one.difference:+.{digits}f}{inside}, {one.wins} : {one.losses}"
