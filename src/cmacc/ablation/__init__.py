"""Ablations: paired comparisons of variants with a reference, on vectors, rendered clips or a manifest's clips."""

from cmacc.ablation.ablate import PlannedRun, ablate
from cmacc.ablation.clipset import ClipSetError, ManifestClips, RenderedClips
from cmacc.ablation.plan import AblationPlan, Cell, PlanError, plan_from_plain, read_plan
from cmacc.ablation.results import (
    AblationResults,
    Difference,
    Row,
    differences_of,
    interval,
    markdown_table,
    results_of_runs,
    shown_metrics,
    sign_test,
    write_results,
)
from cmacc.ablation.run import Point, run_cell
from cmacc.ablation.vectors import VectorWorld, draw_vectors

__all__ = [
    "AblationPlan",
    "AblationResults",
    "Cell",
    "ClipSetError",
    "Difference",
    "ManifestClips",
    "PlanError",
    "PlannedRun",
    "Point",
    "RenderedClips",
    "Row",
    "VectorWorld",
    "ablate",
    "differences_of",
    "draw_vectors",
    "interval",
    "markdown_table",
    "plan_from_plain",
    "read_plan",
    "results_of_runs",
    "run_cell",
    "shown_metrics",
    "sign_test",
    "write_results",
]
