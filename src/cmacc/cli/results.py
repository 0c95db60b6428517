"""Results of a run: ``cmacc evaluate``, ``cmacc export``, ``cmacc report`` and ``cmacc inspect``."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmacc.cli.encoders import add_tower_flags, cache_folder, download_towers_of, permissions
from cmacc.cli.terminal import command_parser, print_skipped, progress_bars

if TYPE_CHECKING:
    from cmacc.transfer import Card, EvaluateOptions


def evaluate_command(arguments: Sequence[str]) -> int:
    """Measure an encoder and write a result card, or compare cards."""
    from typing import get_args

    from cmacc.transfer.recipes import ProtocolName
    from cmacc.transfer.tasks import TaskName

    parser = command_parser(
        "evaluate",
        "Measure an encoder with the field's protocols, compared with the same encoder untrained. Writes card.json\n"
        "and card.md. ENCODER is a run or export folder, `RUN/checkpoints/best` (or `.../step-00000100`),\n"
        "`USER/NAME` on the Hugging Face hub, `random`, `statistics` (of log-mel spectrograms), or a tower alone:\n"
        "`torchvision:r3d_18[=WEIGHTS]` or `timm:...` with a local file, `hf:FOLDER_OR_ID` of transformers.\n"
        "Official data sets must be complete, unless --allow-partial is given.",
        "cmacc evaluate runs/first --task pairs labelled --data videos.parquet --out runs/first\n"
        "         cmacc evaluate runs/first --task ucf101 --protocol linear finetune --data UCF-101/ --out cards/a\n"
        "         cmacc evaluate hf:openai/clip-vit-base-patch32 --task zero_shot --data videos.parquet --out cards/b\n"
        "         cmacc evaluate --compare cards/*/card.json",
    )
    parser.add_argument("encoder", metavar="ENCODER", nargs="?", help="encoder to measure")
    parser.add_argument("--task", nargs="+", choices=get_args(TaskName), default=["pairs"], help="tasks (pairs)")
    parser.add_argument(
        "--protocol", nargs="+", choices=get_args(ProtocolName), default=[], help="by default, each task's own"
    )
    parser.add_argument(
        "--data", type=Path, metavar="ROOT", help="folder of the data set; a manifest for labelled, pairs and zero_shot"
    )
    parser.add_argument("--annotations", type=Path, metavar="PATH", help="official lists, if they are not in ROOT")
    parser.add_argument("--splits", nargs="+", type=int, default=[], metavar="N", help="only these splits or folds")
    parser.add_argument("--folds", type=int, metavar="K", help="labelled: K folds by group, instead of the splits")
    parser.add_argument(
        "--all-files",
        action="store_true",
        help="pairs, zero_shot: use every file, not only split test; for data never trained on",
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="zero_shot: templates with {} for the class, averaged ('a video of {}.', 'the sound of {}.')",
    )
    parser.add_argument("--allow-partial", action="store_true", help="accept missing files; the card states the share")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the card")
    parser.add_argument("--windows", type=int, help="windows averaged per file, instead of the protocol's number")
    parser.add_argument("--epochs", type=int, help="epochs of fine-tuning, instead of the protocol's number")
    parser.add_argument("--no-untrained", action="store_true", help="do not measure the untrained encoder")
    parser.add_argument("--seed", type=int, default=0, help="seed of folds, fine-tuning and untrained weights")
    parser.add_argument("--workers", type=int, default=1, help="decoding processes")
    parser.add_argument(
        "--cache", type=Path, default=cache_folder(), metavar="DIR", help="cache of features (%(default)s)"
    )
    parser.add_argument(
        "--compare", nargs="+", type=Path, metavar="CARD", help="only print a comparison of these cards"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing results in --out")
    add_tower_flags(parser)
    options = parser.parse_args(arguments)
    if options.compare:
        from cmacc.transfer import PUBLISHED_TASKS, Card, beside_published, compared, published_results

        cards = [Card.read(path / "card.json" if path.is_dir() else path) for path in options.compare]
        has_published = any(
            row.task in PUBLISHED_TASKS and row.metric == "accuracy" for card in cards for row in card.results
        )
        if len(cards) > 1 or not has_published:
            print(compared(cards, [str(path) for path in options.compare]))
        if has_published:
            print(beside_published(cards, published_results()))
        return 0
    if options.encoder is None or options.data is None or options.out is None:
        raise ValueError("ENCODER, --data ROOT and --out DIR must be given, or --compare CARD...")
    from cmacc.transfer import EvaluateOptions

    how = EvaluateOptions(
        windows=options.windows,
        lists=options.annotations,
        parts=tuple(options.splits),
        folds=options.folds,
        all_files=options.all_files,
        allow_partial=options.allow_partial,
        with_untrained=not options.no_untrained,
        epochs=options.epochs,
        prompts=tuple(options.prompts),
        seed=options.seed,
        workers=options.workers,
        cache=options.cache,
        download=options.download,
    )
    if options.download:
        download_towers_of(Path(options.encoder))
    with permissions(options):
        card = evaluate_with_progress(
            options.encoder, options.task, options.data, options.out, options.protocol, how, options.overwrite
        )
    print_card(card)
    print(f"card: {options.out / 'card.json'}, {options.out / 'card.md'}")
    return 0


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


def evaluate_with_progress(
    encoder: str,
    tasks: list[Any],
    data: Path,
    out: Path,
    protocols: Sequence[Any],
    options: "EvaluateOptions",
    overwrite: bool,
) -> "Card":
    from cmacc.transfer import evaluate

    with progress_bars("evaluate") as advance:
        card = evaluate(
            encoder, tasks, data, out, protocols=protocols, options=options, overwrite=overwrite, progress=advance
        )
    print_skipped({file: why for files in card.skipped.values() for file, why in files.items()})
    return card


def print_card(card: "Card") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{card.encoder.name} after {card.encoder.checkpoint_step} steps")
    for heading in ("task", "protocol", "modality", "metric"):
        table.add_column(heading)
    for heading in ("value", "95 % interval", "spread", "untrained", "chance", "held-out"):
        table.add_column(heading, justify="right")
    for row in card.results:

        def shown(value: float | None, digits: int = 1 if row.metric == "median_rank" else 3) -> str:
            return "" if value is None else f"{value:.{digits}f}"

        interval, spread = (
            f"{shown(row.low)} .. {shown(row.high)}",
            shown(row.spread if len(row.by_split) > 1 else None),
        )
        numbers = [shown(row.value), interval, spread, shown(row.untrained), shown(row.chance), str(row.count)]
        table.add_row(row.task, row.protocol, row.modality, row.metric, *numbers)
    # rich assumes 80 columns for a file or a pipe, and would cut the table.
    Console(width=None if sys.stdout.isatty() else 120).print(table)
