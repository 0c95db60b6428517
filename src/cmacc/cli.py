"""The commands. Each parses its arguments, calls one function (`demo` calls five), and prints what came of it.

Heavy imports stand inside the commands, so that ``cmacc --help`` is quick.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmacc.pretraining import PretrainConfig, RunOutcome
    from cmacc.transfer import Card

# Takes (what, done, total) and optionally a note.
Advance = Callable[..., None]

_INTERRUPTED = 130
_BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0 on success, 2 for bad input, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    overview = argparse.ArgumentParser(
        prog="cmacc",
        description="Video and audio representations from unlabelled video with sound.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<10} {summary}" for name, (summary, _) in _COMMANDS.items())
        + "\n\n`cmacc COMMAND --help` shows a command's arguments with an example;\n"
        "with --debug, errors show where they arose.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    overview.add_argument("--version", action="version", version=f"cmacc {version('cmacc')}")
    overview.add_argument("command", choices=_COMMANDS, metavar="COMMAND")
    # Only the first word is parsed here: building every command's parser would import everything.
    command = overview.parse_args(arguments[:1]).command
    try:
        return _COMMANDS[command][1](arguments[1:])
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"cmacc {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return _BAD_INPUT
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"cmacc {command}: interrupted", file=sys.stderr)
        return _INTERRUPTED


def scan_command(arguments: Sequence[str]) -> int:
    """Folders to a manifest."""
    parser = _parser(
        "scan",
        "Find media files, read what they hold, and write a manifest.",
        "cmacc scan videos/ --out videos.parquet --test-fraction 0.2",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--out", type=Path, default=Path("manifest.parquet"), help="manifest to write, .parquet or .csv"
    )
    parser.add_argument("--labels", type=Path, metavar="CSV", help="table of labels instead of class folders")
    parser.add_argument("--path-column", help="column of --labels that names the file (path, file, filename or video)")
    parser.add_argument("--label-column", help="column of --labels with the label (label, if there is one)")
    parser.add_argument("--split-column", help="column of --labels with the split (train, test)")
    parser.add_argument("--group-column", help="column of --labels: files of a group stay in one split")
    parser.add_argument("--test-fraction", type=float, default=0.0, help="share of files to hold out as split test")
    parser.add_argument("--seed", type=int, default=0, help="of that split")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing manifest")
    options = parser.parse_args(arguments)
    from cmacc.clips import LabelTable, scan

    _refuse_existing(options.out, options.overwrite)
    labels = None
    if options.labels is not None:
        labels = LabelTable(
            options.labels, options.label_column, options.split_column, options.group_column, options.path_column
        )
    with _progress("scan") as advance:
        result = scan(
            options.folders,
            labels=labels,
            test_fraction=options.test_fraction,
            seed=options.seed,
            progress=lambda done, total: advance("files", done, total),
        )
    result.manifest.write(options.out)
    for path, reason in result.bad_files.items():
        print(f"left out: {path}: {reason}", file=sys.stderr)
    records = result.manifest.records
    hours = sum(record.duration_seconds for record in records) / 3600
    print(
        f"{len(records)} files ({hours:.2f} h), {sum(r.has_audio and r.has_picture for r in records)} with picture and "
        f"sound, {len(result.manifest.classes())} classes, {sum(r.split == 'test' for r in records)} held out, "
        f"{len(result.bad_files)} that do not decode left out"
    )
    if result.unmatched_count:
        print(f"{result.unmatched_count} files are not in {options.labels}: they have no label", file=sys.stderr)
    print(f"manifest: {options.out}")
    return 0


def pretrain_command(arguments: Sequence[str]) -> int:
    """A manifest to a run folder with trained encoders."""
    from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]

    from cmacc.pretraining import PretrainConfig, start_run

    parser = ArgumentParser(
        prog="cmacc pretrain",
        description="Train both encoders on a manifest's files. Ctrl-C saves and leaves.\n\n"
        "example: cmacc pretrain --data.manifest videos.parquet --out runs/first --optim.steps 2000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of any of the settings below")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain"), help="run folder to make")
    parser.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with this run folder; no other setting counts"
    )
    parser.add_argument(
        "--overwrite", type=bool, nargs="?", const=True, default=False, help="lose a run that is in --out"
    )
    parser.add_argument("--max-bad", type=float, default=None, help="the same as --data.max_bad")
    parser.add_class_arguments(PretrainConfig)
    options = parser.parse_args(list(arguments))
    if options.resume is not None:
        run_dir = options.resume
    else:
        import dataclasses

        run_dir = options.out
        settings = parser.instantiate(options).as_dict()
        names = [field.name for field in dataclasses.fields(PretrainConfig)]
        config = PretrainConfig(**{name: settings[name] for name in names})
        if options.max_bad is not None:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_bad=options.max_bad))
        start_run(config, run_dir, overwrite=options.overwrite)
    outcome = _pretrain_with_progress(run_dir)
    _print_outcome(outcome)
    return 0 if outcome.finished else _INTERRUPTED


def evaluate_command(arguments: Sequence[str]) -> int:
    """Encoders and a labelled or paired manifest to a result card."""
    parser = _parser(
        "evaluate",
        "Measure frozen encoders, always beside the same encoders untrained; writes card.json.",
        "cmacc evaluate runs/first --task pairs labelled --data videos.parquet --out runs/first",
    )
    parser.add_argument("encoder", metavar="ENCODER", help="a run folder, or `random`")
    parser.add_argument("--task", nargs="+", choices=("pairs", "labelled"), default=["pairs"])
    parser.add_argument("--data", type=Path, required=True, metavar="MANIFEST")
    parser.add_argument("--out", type=Path, required=True, help="folder for card.json")
    parser.add_argument("--windows", type=int, default=1, help="windows averaged per file")
    parser.add_argument("--workers", type=int, default=1, help="decoding processes")
    parser.add_argument("--overwrite", action="store_true", help="replace results that are in --out")
    options = parser.parse_args(arguments)
    _print_card(
        _evaluate_with_progress(
            options.encoder,
            options.task,
            options.data,
            options.out,
            options.windows,
            options.workers,
            options.overwrite,
        )
    )
    print(f"card: {options.out / 'card.json'}")
    return 0


def report_command(arguments: Sequence[str]) -> int:
    """A run folder to a page."""
    parser = _parser("report", "Write a run's report as one HTML file.", "cmacc report runs/first")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, help="file to write; RUN/report.html by default")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing report")
    options = parser.parse_args(arguments)
    from cmacc.viewer import write_report

    print(f"report: {write_report(options.run, options.out, overwrite=options.overwrite)}")
    return 0


def demo_command(arguments: Sequence[str]) -> int:
    """The whole way on the synthetic world."""
    parser = _parser(
        "demo",
        "Make a small world of videos with sound, pretrain on it, evaluate, and write a report.",
        "cmacc demo --out demo-out",
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for everything")
    parser.add_argument("--clips", type=int, default=960, help="videos to make")
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="lose a run that is in --out; the videos are kept")
    options = parser.parse_args(arguments)
    from cmacc.clips import scan
    from cmacc.clips.synthetic import WorldConfig, write_world
    from cmacc.pretraining import start_run
    from cmacc.viewer import write_report

    out: Path = options.out
    manifest = out / "manifest.parquet"
    start_run(_demo_config(manifest, options.clips, options.steps, options.seed), out, overwrite=options.overwrite)
    world = WorldConfig(clip_count=options.clips, class_count=8, nuisance=0.3, frame_size=64, seed=options.seed)
    with _progress("world") as advance:
        write_world(world, out / "world", progress=lambda done, total: advance("clips", done, total))
    with _progress("scan") as advance:
        scanned = scan([out / "world"], test_fraction=0.25, progress=lambda done, total: advance("files", done, total))
    scanned.manifest.write(manifest)
    outcome = _pretrain_with_progress(out)
    if not outcome.finished:
        _print_outcome(outcome)
        return _INTERRUPTED
    card = _evaluate_with_progress(str(out), ["pairs", "labelled"], manifest, out, 1, 1, options.overwrite)
    report = write_report(out, overwrite=options.overwrite)
    _print_card(card)
    print(f"report: {report}")
    return 0


def _demo_config(manifest: Path, clips: int, steps: int, seed: int) -> "PretrainConfig":
    from cmacc.clips import AugmentConfig, ClipSpec
    from cmacc.pretraining import DataConfig, DictionaryConfig, ObjectiveConfig, OptimConfig, PretrainConfig

    return PretrainConfig(
        data=DataConfig(
            manifest=manifest,
            clip=ClipSpec(frame_count=16, frame_rate_hz=8.0, frame_height=64, frame_width=64),
            # Light augmentation: a few hundred steps are too few to learn what strong changes leave.
            augment=AugmentConfig(
                min_crop_area=0.8,
                brightness=0.2,
                contrast=0.2,
                saturation=0.2,
                time_mask=0.0,
                frequency_mask=0.0,
            ),
        ),
        dictionary=DictionaryConfig(
            selector="active", size=min(128, clips // 3), pool_size=512, warmup_steps=steps // 2
        ),
        # A short run changes quickly: a slower copy's keys would be told apart by their age.
        objective=ObjectiveConfig(momentum=0.9),
        optim=OptimConfig(steps=steps),
        seed=seed,
    )


_COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "scan": ("folders of videos to a manifest", scan_command),
    "pretrain": ("a manifest to trained encoders", pretrain_command),
    "evaluate": ("encoders to results, beside the same untrained", evaluate_command),
    "report": ("a run to an HTML page", report_command),
    "demo": ("all of these, on a synthetic world", demo_command),
}


def _parser(command: str, description: str, example: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"cmacc {command}",
        description=description,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another --out, or give --overwrite to replace it")


@contextmanager
def _progress(title: str) -> Iterator[Advance]:
    """A progress bar; the function it gives takes (what, done, total) and makes one line for every ``what``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(f"{title:<9}{{task.description}}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        lines: dict[str, Any] = {}

        def advance(what: str, done: int, total: int, note: str = "") -> None:
            if what not in lines:
                lines[what] = bars.add_task(what, total=total, note="")
            bars.update(lines[what], completed=done, total=total, note=note)

        yield advance


def _pretrain_with_progress(run_dir: Path) -> "RunOutcome":
    from cmacc.pretraining import pretrain

    asked_to_stop = False

    def ask_to_stop(*_: object) -> None:
        nonlocal asked_to_stop
        if asked_to_stop:
            raise KeyboardInterrupt
        asked_to_stop = True
        print("\nstopping after this step (Ctrl-C again to leave at once)", file=sys.stderr)

    before = signal.signal(signal.SIGINT, ask_to_stop)
    try:
        with _progress("pretrain") as advance:

            def on_step(done: int, total: int, row: dict[str, float]) -> None:
                note = f"loss {row['loss']:.3f}  {row['clips_per_second']:.0f} clips/s"
                advance("steps", done, total, note)

            return pretrain(run_dir, on_step=on_step, should_stop=lambda: asked_to_stop)
    finally:
        signal.signal(signal.SIGINT, before)


def _print_outcome(outcome: "RunOutcome") -> None:
    if outcome.bad_files:
        print(f"{len(outcome.bad_files)} files left out; {outcome.run_dir / 'run.log'} names them", file=sys.stderr)
    if outcome.finished:
        print(f"run: {outcome.run_dir}, {outcome.steps} steps")
    else:
        print(
            f"stopped at step {outcome.step} of {outcome.steps}; go on with: cmacc pretrain --resume {outcome.run_dir}"
        )


def _evaluate_with_progress(
    encoder: str, tasks: list[Any], data: Path, out: Path, windows: int, workers: int, overwrite: bool
) -> "Card":
    from cmacc.transfer import evaluate

    with _progress("evaluate") as advance:
        card, bad_files = evaluate(
            encoder,
            tasks,
            data,
            out,
            windows_per_file=windows,
            workers=workers,
            overwrite=overwrite,
            progress=advance,
        )
    for path, reason in bad_files.items():
        print(f"left out: {path}: {reason}", file=sys.stderr)
    return card


def _print_card(card: "Card") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{card.provenance.encoder} after {card.provenance.checkpoint_step} steps")
    for heading in ("task", "protocol", "modality", "metric"):
        table.add_column(heading)
    for heading in ("value", "untrained", "chance", "held out"):
        table.add_column(heading, justify="right")
    for row in card.results:
        digits = 1 if row.metric == "median_rank" else 3
        numbers = [f"{number:.{digits}f}" for number in (row.value, row.untrained, row.chance)]
        table.add_row(row.task, row.protocol, row.modality, row.metric, *numbers, str(row.count))
    # Written to a file or a pipe, the table must not be cut to a terminal's 80 columns.
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    sys.exit(main())
