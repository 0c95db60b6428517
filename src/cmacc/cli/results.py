"""Results of a run: ``cmacc export``, ``cmacc report`` and ``cmacc inspect``."""

from collections.abc import Sequence
from pathlib import Path

from cmacc.cli.encoders import add_tower_flags, download_towers_of, permissions
from cmacc.cli.terminal import command_parser, progress_bars


def export_command(arguments: Sequence[str]) -> int:
    """Export a run's encoders."""
    parser = command_parser(
        "export",
        "Export a run's query encoders as safetensors, with their config and a model card, for cmacc.load and for a\n"
        "model hub. With --onnx, also as ONNX graphs from frames and waveforms to embeddings, checked against torch.",
        "cmacc export runs/first --out first-export --onnx",
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="run folder, or RUN/checkpoints/best or .../step-00000100"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    parser.add_argument("--onnx", action="store_true", help="also write video.onnx and audio.onnx (extra `export`)")
    parser.add_argument(
        "--push", metavar="USER/NAME", help="upload the folder to the Hugging Face hub (extra `export`)"
    )
    parser.add_argument("--without-results", action="store_true", help="do not include results in the model card")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing export in --out")
    add_tower_flags(parser)
    options = parser.parse_args(arguments)
    from cmacc.transfer import card_of_run, export_run, push, results_table

    if options.download:
        download_towers_of(options.run)
    with permissions(options):
        card = None if options.without_results else card_of_run(options.run)
    with progress_bars("export"), permissions(options):
        exported = export_run(
            options.run,
            options.out,
            with_onnx=options.onnx,
            overwrite=options.overwrite,
            results_markdown="" if card is None else results_table(card),
        )
    files = "".join(f", {name}.onnx (within {gap:.1e} of torch)" for name, gap in exported.differences.items())
    print(f"export: {exported.folder}, weights of step {exported.step}{files}")
    if options.push:
        print(f"pushed: {push(options.out, options.push)}")
    return 0


def report_command(arguments: Sequence[str]) -> int:
    """Write a run's report."""
    parser = command_parser("report", "Write a run's report as one HTML file.", "cmacc report runs/first")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, help="file to write; RUN/report.html by default")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing report")
    options = parser.parse_args(arguments)
    from cmacc.viewer import write_report

    with progress_bars("report"):
        page = write_report(options.run, options.out, overwrite=options.overwrite)
    print(f"report: {page}")
    return 0


def inspect_command(arguments: Sequence[str]) -> int:
    """Write a page of a run's negatives."""
    parser = command_parser(
        "inspect",
        "Write one HTML file that shows which negatives a run chose at a few steps, beside as many random ones.\n"
        "The choices are replayed from the run's checkpoints, so keep some of them (pretrain --keep_every 100).",
        "cmacc inspect runs/first --steps 100 400",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--steps", nargs="+", type=int, default=[], metavar="STEP",
        help="steps of kept checkpoints; by default the last one and up to three evenly spaced before it",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="file to write; RUN/inspect.html by default")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing page")
    add_tower_flags(parser)
    options = parser.parse_args(arguments)
    from cmacc.viewer import write_inspection

    if options.download:
        download_towers_of(options.run)
    with progress_bars("inspect") as advance, permissions(options):
        page = write_inspection(
            options.run,
            options.out,
            steps=options.steps,
            overwrite=options.overwrite,
            on_step=lambda done, total: advance("steps", done, total),
        )
    print(f"inspect: {page}")
    return 0
