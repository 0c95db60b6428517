"""``cmacc evaluate``: measure an encoder on tasks, or compare cards."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmacc.cli.encoders import add_tower_flags, cache_folder, download_towers_of, permissions
from cmacc.cli.terminal import command_parser, print_skipped, progress_bars

if TYPE_CHECKING:
    from collections.abc import Callable

    from cmacc.clips.progress import Progress
    from cmacc.transfer import Card, EvaluateOptions
    from cmacc.transfer.tasks import TaskData, TaskName

# Tasks of `cmacc.heads` that train heads of their own; one of them at a time.
_EVENTS, _FUSION = "ave", "fusion"
_PREPARED = {"emotion", "instruments"}


def evaluate_command(arguments: Sequence[str]) -> int:
    """Measure an encoder and write a result card, or compare cards."""
    options = _evaluate_parser().parse_args(arguments)
    if options.compare:
        _print_comparison(options.compare)
        return 0
    if options.encoder is None or options.data is None or options.out is None:
        raise ValueError("ENCODER, --data ROOT and --out DIR must be given, or --compare CARD...")
    _check_idle_flags(options)
    if options.download:
        download_towers_of(Path(options.encoder))
    with permissions(options):
        if _EVENTS in options.task:
            card = _events_evaluated(options)
        elif _FUSION in options.task:
            card = _fusion_evaluated(options)
        else:
            card = _tasks_evaluated(options)
    print_card(card)
    print(f"card: {options.out / 'card.json'}, {options.out / 'card.md'}")
    return 0


def _evaluate_parser() -> argparse.ArgumentParser:
    from typing import get_args

    from cmacc.heads.emotion_names import EmotionSet
    from cmacc.heads.event_recipes import EventProtocol
    from cmacc.heads.fusion import FusionMethod
    from cmacc.transfer.recipes import ProtocolName
    from cmacc.transfer.tasks import TaskName

    parser = command_parser(
        "evaluate",
        "Measure an encoder with the field's protocols, compared with the same encoder untrained. Writes card.json\n"
        "and card.md. ENCODER is a run or export folder, `RUN/checkpoints/best` (or `.../step-00000100`),\n"
        "`USER/NAME` on the Hugging Face hub, `random`, `statistics` (of log-mel spectrograms), or a tower alone:\n"
        "`torchvision:r3d_18[=WEIGHTS]` or `timm:...` with a local file, `hf:FOLDER_OR_ID` of transformers. For task\n"
        "ave, also `features`: the published .h5 files in ROOT; for task fusion, `features` alone: ROOT is a file.\n"
        "Official data sets must be complete, unless --allow-partial is given.",
        "cmacc evaluate runs/first --task pairs labelled --data videos.parquet --out runs/first\n"
        "         cmacc evaluate runs/first --task ucf101 --protocol linear finetune --data UCF-101/ --out cards/a\n"
        "         cmacc evaluate hf:openai/clip-vit-base-patch32 --task zero_shot --data videos.parquet --out cards/b\n"
        "         cmacc evaluate runs/first --task ave --protocol linear cmbs --data AVE_Dataset/ --out cards/c\n"
        "         cmacc evaluate runs/first --task emotion --set ravdess --data RAVDESS/ --out cards/d\n"
        "         cmacc evaluate hf:laion/clap-htsat-unfused --task instruments --data TinySOL/ --out cards/e\n"
        "         cmacc evaluate --compare cards/*/card.json",
    )
    parser.add_argument("encoder", metavar="ENCODER", nargs="?", help="encoder to measure")
    parser.add_argument(
        "--task", nargs="+", choices=(*get_args(TaskName), _EVENTS, _FUSION), default=["pairs"], help="tasks (pairs)"
    )
    protocols = dict.fromkeys((*get_args(ProtocolName), *get_args(EventProtocol), *get_args(FusionMethod)))
    parser.add_argument(
        "--protocol",
        nargs="+",
        choices=tuple(protocols),
        default=[],
        help="by default, each task's own; zero_shot needs an encoder with a text side",
    )
    parser.add_argument(
        "--data", type=Path, metavar="ROOT", help="folder of the data set; a manifest for labelled, pairs and zero_shot"
    )
    parser.add_argument("--annotations", type=Path, metavar="PATH", help="official lists, if they are not in ROOT")
    parser.add_argument("--splits", nargs="+", type=int, default=[], metavar="N", help="only these splits or folds")
    parser.add_argument(
        "--folds",
        type=int,
        metavar="K",
        help="labelled: K folds by group, instead of the splits; emotion, instruments: instead of their own number",
    )
    parser.add_argument("--set", choices=get_args(EmotionSet), help="emotion: the data set")
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
        help="zero_shot: templates with {} for the class, averaged ('a video of {}.', 'the sound of {}.'; instruments: "
        "four of their own)",
    )
    parser.add_argument("--allow-partial", action="store_true", help="accept missing files; the card states the share")
    parser.add_argument(
        "--drop-leaks", action="store_true", help="ave: no training rows of videos that are in validation or test too"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the card")
    parser.add_argument("--windows", type=int, help="windows averaged per file, instead of the protocol's number")
    parser.add_argument("--epochs", type=int, help="finetune, ave, fusion: epochs, instead of the protocol's number")
    parser.add_argument("--no-untrained", action="store_true", help="do not measure the untrained encoder")
    parser.add_argument("--seed", type=int, default=0, help="seed of folds, fine-tuning and untrained weights")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="ave, fusion: seeds of the heads (0 1 2)")
    parser.add_argument("--workers", type=int, default=1, help="decoding processes")
    parser.add_argument(
        "--cache", type=Path, default=cache_folder(), metavar="DIR", help="cache of features (%(default)s)"
    )
    parser.add_argument(
        "--compare", nargs="+", type=Path, metavar="CARD", help="only print a comparison of these cards"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing results in --out")
    add_tower_flags(parser)
    return parser


def _print_comparison(paths: Sequence[Path]) -> None:
    from cmacc.transfer import PUBLISHED_TASKS, Card, beside_published, compared, published_results

    cards = [Card.read(path / "card.json" if path.is_dir() else path) for path in paths]
    has_published = any(
        row.task in PUBLISHED_TASKS and row.metric == "accuracy" for card in cards for row in card.results
    )
    if len(cards) > 1 or not has_published:
        print(compared(cards, [str(path) for path in paths]))
    if has_published:
        print(beside_published(cards, published_results()))


def _check_idle_flags(options: argparse.Namespace) -> None:
    """Refuse what would have no effect, of the flags that `EvaluateOptions` does not have or heads do not use."""
    tasks = list(dict.fromkeys(options.task))
    for_events, for_fusion = _EVENTS in tasks, _FUSION in tasks
    for_heads = for_events or for_fusion
    if for_heads and len(tasks) > 1:
        name = _EVENTS if for_events else _FUSION
        raise ValueError(f"--task {name} must be asked for alone, got {', '.join(tasks)}; run the command for each")
    if for_fusion and options.encoder != "features":
        raise ValueError(f"--task fusion: ENCODER must be features, those of the file in --data, got {options.encoder}")
    for flag, given, is_of_use, what in (
        ("--seeds", options.seeds, for_heads, "tasks ave and fusion"),
        ("--drop-leaks", options.drop_leaks, for_events, "task ave"),
        ("--set", options.set, "emotion" in tasks, "task emotion"),
        ("--annotations", options.annotations, not for_heads, "other tasks"),
        ("--splits", options.splits, not for_heads, "other tasks"),
        ("--folds", options.folds is not None, not for_heads, "other tasks"),
        ("--all-files", options.all_files, not for_heads, "other tasks"),
        ("--prompts", options.prompts, not for_heads, "other tasks"),
        ("--windows", options.windows is not None, not for_heads, "other tasks"),
        ("--allow-partial", options.allow_partial, not for_fusion, "other tasks"),
    ):
        if given and not is_of_use:
            raise ValueError(f"{flag} is for {what} alone, got --task {' '.join(tasks)}")
    if "emotion" in tasks and options.set is None:
        raise ValueError("--task emotion: --set must name the data set, got none")


def _events_evaluated(options: argparse.Namespace) -> "Card":
    from cmacc.heads.event_recipes import DEFAULT_EVENT_PROTOCOLS
    from cmacc.heads.event_task import EventOptions, evaluate_events

    how = EventOptions(
        seeds=tuple(options.seeds or EventOptions.seeds),
        epochs=options.epochs,
        allow_partial=options.allow_partial,
        drop_leaks=options.drop_leaks,
        with_untrained=not options.no_untrained,
        seed=options.seed,
        workers=options.workers,
        cache=options.cache,
        download=options.download,
    )
    with progress_bars("evaluate") as advance:
        card = evaluate_events(
            options.encoder,
            options.data,
            options.out,
            protocols=options.protocol or DEFAULT_EVENT_PROTOCOLS,
            options=how,
            overwrite=options.overwrite,
            progress=advance,
        )
    _print_skipped_of(card)
    return card


def _fusion_evaluated(options: argparse.Namespace) -> "Card":
    from typing import get_args

    from cmacc.heads.fusion import FusionMethod
    from cmacc.heads.fusion_task import FusionOptions, evaluate_fusion

    with progress_bars("evaluate") as advance:
        return evaluate_fusion(
            options.data,
            options.out,
            methods=options.protocol or get_args(FusionMethod),
            options=FusionOptions(seeds=tuple(options.seeds or FusionOptions.seeds), epochs=options.epochs),
            overwrite=options.overwrite,
            progress=advance,
        )


def _tasks_evaluated(options: argparse.Namespace) -> "Card":
    from cmacc.transfer import EvaluateOptions

    how = EvaluateOptions(
        windows=options.windows,
        lists=options.annotations,
        parts=tuple(options.splits),
        folds=options.folds if "labelled" in options.task or not _PREPARED & set(options.task) else None,
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
    return evaluate_with_progress(
        options.encoder,
        options.task,
        options.data,
        options.out,
        options.protocol,
        how,
        options.overwrite,
        prepare=partial(_prepared, options),
    )


def _prepared(options: argparse.Namespace, advance: "Progress") -> "dict[TaskName, TaskData]":
    """The data of emotion and instruments, which `cmacc.heads` knows."""
    from cmacc.clips.progress import within

    found: dict[TaskName, TaskData] = {}
    journal = options.cache / "scans"
    if "emotion" in options.task:
        from cmacc.heads.emotion import emotion_task

        found["emotion"] = emotion_task(
            options.set,
            options.data,
            folds=options.folds,
            seed=options.seed,
            allow_partial=options.allow_partial,
            workers=options.workers,
            journal=journal,
            progress=within(advance, "emotion"),
        )
    if "instruments" in options.task:
        from cmacc.heads.instrument_files import instruments_task

        found["instruments"] = instruments_task(
            options.data,
            folds=options.folds,
            seed=options.seed,
            allow_partial=options.allow_partial,
            workers=options.workers,
            journal=journal,
            progress=within(advance, "instruments"),
        )
    return found


def evaluate_with_progress(
    encoder: str,
    tasks: list[Any],
    data: Path,
    out: Path,
    protocols: Sequence[Any],
    options: "EvaluateOptions",
    overwrite: bool,
    prepare: "Callable[[Progress], dict[TaskName, TaskData]] | None" = None,
) -> "Card":
    from cmacc.transfer import evaluate

    with progress_bars("evaluate") as advance:
        card = evaluate(
            encoder,
            tasks,
            data,
            out,
            protocols=protocols,
            options=options,
            prepared=None if prepare is None else prepare(advance),
            overwrite=overwrite,
            progress=advance,
        )
    _print_skipped_of(card)
    return card


def _print_skipped_of(card: "Card") -> None:
    print_skipped({file: why for files in card.skipped.values() for file, why in files.items()})


def print_card(card: "Card") -> None:
    from rich.console import Console
    from rich.table import Table

    from cmacc.transfer import losses_in_words
    from cmacc.transfer.metrics import DECIMALS

    steps = card.encoder.checkpoint_step
    table = Table(title=card.encoder.name + (f" after {steps:,} steps" if steps else ""))
    for heading in ("task", "protocol", "modality", "metric"):
        table.add_column(heading, overflow="fold")  # cut, names of metrics would be the same
    for heading in ("value", "95 % interval", "spread", "untrained", "chance", "held-out"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in card.results:

        def shown(value: float | None, digits: int = DECIMALS.get(row.metric, 3)) -> str:
            return "" if value is None else f"{value:.{digits}f}"

        interval, spread = (
            f"{shown(row.low)} .. {shown(row.high)}",
            shown(row.spread if len(row.by_split) > 1 else None),
        )
        numbers = [shown(row.value), interval, spread, shown(row.untrained), shown(row.chance), str(row.count)]
        table.add_row(row.task, row.protocol, row.modality, row.metric, *numbers)
    # rich assumes 80 columns for a file or a pipe, and would cut the table.
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for line in losses_in_words(card):
        print(line)
