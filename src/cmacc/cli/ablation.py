"""Compares the variants of a plan: ``cmacc ablate``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cmacc.cli.terminal import command_parser, progress_bars


def ablate_command(arguments: Sequence[str]) -> int:
    """Run a plan; write a table and a page."""
    parser = command_parser(
        "ablate",
        "Run the variants of a plan and compare them seed by seed. Writes tidy metrics (metrics.parquet), paired\n"
        "differences (differences.parquet, table.md) and a page (ablation.html). Runs that are already in the folder\n"
        "are kept, so an interrupted command can be repeated. cmacc.ablation.plan documents the format of plans;\n"
        "recipes/ablations/ has examples.",
        "cmacc ablate recipes/ablations/selectors.yaml --out ablations/selectors --workers 2",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN", help="YAML file")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the runs, created if missing"
    )
    parser.add_argument("--workers", type=_workers, default=1, help="number of parallel runs, one process each")
    parser.add_argument("--device", default="cpu", help="device of the runs: cpu, cuda or cuda:1")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds, instead of the plan's")
    parser.add_argument("--data", metavar="MANIFEST", help="for plans of kind clips: manifest, instead of the plan's")
    parser.add_argument("--report-only", action="store_true", help="run nothing; write table and page of existing runs")
    options = parser.parse_args(arguments)
    import torch

    from cmacc.ablation import ablate, markdown_table, read_plan, results_of_runs, shown_metrics, write_results
    from cmacc.viewer import write_ablation_page

    plan = read_plan(options.plan, seeds=options.seeds, manifest=options.data)
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {options.device!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device}: no GPU is available")
    with progress_bars("ablate") as advance:
        runs = ablate(
            plan,
            options.out,
            workers=options.workers,
            device=device,
            only_planned=options.report_only,
            progress=advance,
        )
    results = results_of_runs(plan, runs, options.out)
    write_results(results, options.out)
    page = write_ablation_page(results, options.out / "ablation.html", overwrite=True)
    print(markdown_table(results, shown_metrics(results)[:1]), end="")
    if results.missing_runs:
        print(f"{results.missing_runs} of {len(runs)} runs are missing")
    print(f"table: {options.out / 'table.md'}, tidy metrics: {options.out / 'metrics.parquet'}")
    print(f"page: {page}")
    return 0


def _workers(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return count
