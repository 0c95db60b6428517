"""Plans to comparisons: ``cmacc ablate``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cmacc.cli.terminal import command_parser, progress_bars


def ablate_command(arguments: Sequence[str]) -> int:
    """A plan to runs, a table and a page."""
    parser = command_parser(
        "ablate",
        "Make all runs of a plan that are not in the folder yet, and compare its variants seed by seed: tidy metrics\n"
        "(metrics.parquet), paired differences (differences.parquet, table.md), a page (ablation.html). Stopped, it\n"
        "continues where it was; plans are explained in cmacc.ablation.plan, and recipes/ablations/ holds some.",
        "cmacc ablate recipes/ablations/selectors.yaml --out ablations/selectors --workers 2",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN", help="YAML file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the runs; made if missing")
    parser.add_argument("--workers", type=_workers, default=1, help="runs at a time, each in a process of its own")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1: where the runs are made")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the plan's")
    parser.add_argument("--data", metavar="MANIFEST", help="manifest of a plan of kind clips, instead of the plan's")
    parser.add_argument("--report-only", action="store_true", help="make no runs; write table and page of those there")
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
        raise ValueError(f"--device {options.device}: no such GPU here")
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
        print(f"{results.missing_runs} of {len(runs)} runs are not there yet")
    print(f"table: {options.out / 'table.md'}, tidy metrics: {options.out / 'metrics.parquet'}")
    print(f"page: {page}")
    return 0


def _workers(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return count
