"""The commands. Each parses its arguments, calls one function (`demo` calls five), and prints what came of it.

Heavy imports stand inside the commands, so that ``cmacc --help`` is quick.
"""

import argparse
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmacc.clips import Listing, ScanResult
    from cmacc.pretraining import PretrainConfig, RunOutcome
    from cmacc.transfer import Card, EvaluateOptions

# Takes (what, done, total) and optionally a note.
Advance = Callable[..., None]

_INTERRUPTED = 130
_BAD_INPUT = 2
_MOST_NAMED = 20
_LAYOUTS = ("folders", "kinetics", "audioset", "vggsound", "ucf101", "hmdb51", "esc50")


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
        "Look every media file over, and write a manifest of those that can be used, with a page that tells what is\n"
        "wrong with which. A scan that was stopped goes on where it was; a later one looks at changed files only.",
        "cmacc scan videos/ --out videos.parquet --test-fraction 0.2\n"
        "         cmacc scan UCF-101/ --layout ucf101 --list ucfTrainTestlist/ --split-number 1 --out ucf1.parquet",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("manifest.parquet"),
        help="manifest to write, .parquet or .csv; the page goes beside it (.html), and the journal (.scan/)",
    )
    parser.add_argument("--layout", choices=_LAYOUTS, default="folders", help="what lies in the folder")
    parser.add_argument("--list", type=Path, metavar="PATH", help="official list of that layout: a CSV, or a folder")
    parser.add_argument("--names", type=Path, metavar="CSV", help="audioset: class_labels_indices.csv")
    parser.add_argument("--split-number", type=int, default=1, help="ucf101, hmdb51: split 1 to 3; esc50: test fold")
    parser.add_argument(
        "--ids-are-cut", action="store_true", help="files named by their id alone hold the segment only"
    )
    parser.add_argument("--labels", type=Path, metavar="TABLE", help="CSV or JSON of labels instead of class folders")
    parser.add_argument("--path-column", help="column of --labels that names the file (path, file, filename or video)")
    parser.add_argument("--label-column", default="label", help="column of --labels with the label")
    parser.add_argument("--split-column", help="column of --labels with the split (train, test)")
    parser.add_argument("--group-column", help="column of --labels: files of a group stay in one split")
    parser.add_argument("--test-fraction", type=float, default=0.0, help="share of files to hold out as split test")
    parser.add_argument("--seed", type=int, default=0, help="of that split")
    parser.add_argument("--min-seconds", type=float, default=0.5, help="shorter files are too_short")
    parser.add_argument(
        "--refuse",
        nargs="*",
        metavar="FINDING",
        help="what keeps a file out of the manifest: unreadable, corrupt and too_short by default; also no_audio, "
        "silent, black, still, duplicate, near_duplicate...",
    )
    _add_task_arguments(parser, limit_seconds=60.0)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing manifest and page")
    options = parser.parse_args(arguments)
    from cmacc.clips import examine_files, scan, workers_of
    from cmacc.clips.scan import REFUSED
    from cmacc.viewer import write_scan_page

    # All that can be wrong is found out before the work. The page and the journal bear the manifest's whole name, so
    # that two manifests never share them; they are made anew.
    page, journal = (options.out.with_name(f"{options.out.name}.{ending}") for ending in ("html", "scan"))
    part = _part(options.part)
    if options.out.suffix not in (".parquet", ".csv"):
        raise ValueError(f"--out must end in .parquet or .csv, got {options.out}")
    if not 0 <= options.test_fraction < 1:
        raise ValueError(f"--test-fraction must be in [0, 1), got {options.test_fraction}")
    if part[1] == 1:
        _refuse_existing(options.out, options.overwrite)
    listing = _listing(options)
    with workers_of(options.workers, options.cluster) as executor, _progress("scan") as advance:

        def report(done: int, total: int) -> None:
            advance("files", done, total)

        if part[1] > 1:
            done = examine_files(
                listing,
                part=part,
                executor=executor,
                limit_seconds=options.limit_seconds,
                journal=journal,
                progress=report,
            )
            print(f"part {options.part}: {len(done)} files looked over; run it without --part when all parts are done")
            return 0
        result = scan(
            listing,
            refuse=REFUSED if options.refuse is None else options.refuse,
            min_seconds=options.min_seconds,
            test_fraction=options.test_fraction,
            seed=options.seed,
            executor=executor,
            limit_seconds=options.limit_seconds,
            journal=journal,
            progress=report,
        )
    write_scan_page(result, page, overwrite=True)
    result.manifest.write(options.out)  # last: where it stands, the scan is done
    _print_scan(result)
    print(f"manifest: {options.out}\npage: {page}")
    return 0


def pack_command(arguments: Sequence[str]) -> int:
    """A manifest to packed shards."""
    parser = _parser(
        "pack",
        "Transcode a manifest's samples into tar shards that are quick to read at random (WebDataset naming).\n"
        "A pack that was stopped goes on where it was. Its index.parquet is a manifest to train with.",
        "cmacc pack videos.parquet --out packed/\n         cmacc pack --verify packed/",
    )
    parser.add_argument("manifest", metavar="MANIFEST", help="made by cmacc scan; with --verify, the DIR")
    parser.add_argument("--out", metavar="DIR", help="folder, or URL that fsspec opens")
    parser.add_argument("--verify", action="store_true", help="only compare the shards in DIR with their index")
    parser.add_argument("--short-side", type=int, default=128, help="pixels of the picture's shorter side")
    parser.add_argument("--keyframe-every", type=int, default=16, help="frames from keyframe to keyframe")
    parser.add_argument("--crf", type=int, default=23, help="x264's quality, 0 to 51; lower is better and larger")
    parser.add_argument("--sample-rate-hz", type=int, default=16_000, help="of the mono sound")
    parser.add_argument("--samples-per-shard", type=int, default=256)
    _add_task_arguments(parser, limit_seconds=600.0)
    parser.add_argument("--overwrite", action="store_true", help="lose another pack that is in DIR")
    options = parser.parse_args(arguments)
    from cmacc.clips import Manifest, PackSettings, pack, verify, workers_of

    with _progress("verify" if options.verify else "pack") as advance:

        def report(done: int, total: int) -> None:
            advance("shards", done, total)

        if options.verify:
            problems = verify(options.manifest, report)
        elif options.out is None:
            raise ValueError("--out DIR must be given")
        else:
            settings = PackSettings(
                options.short_side,
                options.keyframe_every,
                options.crf,
                options.sample_rate_hz,
                options.samples_per_shard,
            )
            manifest, part = Manifest.read(options.manifest), _part(options.part)
            with workers_of(options.workers, options.cluster) as executor:
                result = pack(
                    manifest,
                    options.out,
                    settings,
                    part=part,
                    executor=executor,
                    limit_seconds=options.limit_seconds,
                    overwrite=options.overwrite,
                    progress=report,
                )
    if options.verify:
        for problem in problems:
            print(problem, file=sys.stderr)
        print(f"{options.manifest}: {len(problems)} problems" if problems else f"{options.manifest}: as its index says")
        return _BAD_INPUT if problems else 0
    _print_refused(result.refused)
    print(f"{result.sample_count} samples in {result.shard_count} shards, {len(result.refused)} files left out")
    if part[1] > 1:
        print(f"part {options.part} is done; run it without --part when all parts are, to write the index")
    else:
        print(f"manifest: {options.out.rstrip('/')}/index.parquet")
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
    """An encoder and data to a result card, or cards side by side."""
    from typing import get_args

    from cmacc.transfer.protocols import ProtocolName
    from cmacc.transfer.tasks import TaskName

    parser = _parser(
        "evaluate",
        "Measure an encoder by the field's protocols, beside the same untrained; writes card.json and card.md.\n"
        "ENCODER is a run or export folder, `random`, `statistics` (of log-mel spectrograms) or\n"
        "`torchvision:r3d_18[=WEIGHTS]` with a local file. Official data sets must be complete, or --allow-partial be "
        "given.",
        "cmacc evaluate runs/first --task pairs labelled --data videos.parquet --out runs/first\n"
        "         cmacc evaluate runs/first --task ucf101 --protocol linear finetune --data UCF-101/ --out cards/a\n"
        "         cmacc evaluate --compare cards/*/card.json",
    )
    parser.add_argument("encoder", metavar="ENCODER", nargs="?", help="what to measure")
    parser.add_argument("--task", nargs="+", choices=get_args(TaskName), default=["pairs"])
    parser.add_argument(
        "--protocol", nargs="+", choices=get_args(ProtocolName), default=[], help="each task's own else"
    )
    parser.add_argument("--data", type=Path, metavar="ROOT", help="the data set's folder; labelled, pairs: a manifest")
    parser.add_argument("--list", type=Path, metavar="PATH", help="official lists, where they are not beneath ROOT")
    parser.add_argument("--splits", nargs="+", type=int, default=[], metavar="N", help="only these splits or folds")
    parser.add_argument("--folds", type=int, metavar="K", help="labelled: K folds by group, not the manifest's splits")
    parser.add_argument("--allow-partial", action="store_true", help="files may be missing; the card says what share")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the card")
    parser.add_argument("--windows", type=int, help="windows averaged per file, instead of the protocol's number")
    parser.add_argument("--epochs", type=int, help="of fine-tuning, instead of the protocol's number")
    parser.add_argument("--no-untrained", action="store_true", help="do not measure the untrained encoder too")
    parser.add_argument("--seed", type=int, default=0, help="of folds, fine-tuning and untrained weights")
    parser.add_argument("--workers", type=int, default=1, help="decoding processes")
    parser.add_argument("--cache", type=Path, default=_cache_folder(), metavar="DIR", help="for features (%(default)s)")
    parser.add_argument("--compare", nargs="+", type=Path, metavar="CARD", help="only print these cards side by side")
    parser.add_argument("--overwrite", action="store_true", help="replace results that are in --out")
    options = parser.parse_args(arguments)
    if options.compare:
        from cmacc.transfer import PUBLISHED_TASKS, Card, beside_published, compared, published_results

        cards = [Card.read(path / "card.json" if path.is_dir() else path) for path in options.compare]
        print(compared(cards, [str(path) for path in options.compare]))
        if any(row.task in PUBLISHED_TASKS and row.metric == "accuracy" for card in cards for row in card.results):
            print(beside_published(cards, published_results()))
        return 0
    if options.encoder is None or options.data is None or options.out is None:
        raise ValueError("ENCODER, --data ROOT and --out DIR must be given, or --compare CARD...")
    from cmacc.transfer import EvaluateOptions

    how = EvaluateOptions(
        windows=options.windows,
        lists=options.list,
        parts=tuple(options.splits),
        folds=options.folds,
        allow_partial=options.allow_partial,
        with_untrained=not options.no_untrained,
        epochs=options.epochs,
        seed=options.seed,
        workers=options.workers,
        cache=options.cache,
    )
    card = _evaluate_with_progress(
        options.encoder, options.task, options.data, options.out, options.protocol, how, options.overwrite
    )
    _print_card(card)
    print(f"card: {options.out / 'card.json'}, {options.out / 'card.md'}")
    return 0


def export_command(arguments: Sequence[str]) -> int:
    """A run to a folder of weights that others can load."""
    parser = _parser(
        "export",
        "Write a run's query encoders as safetensors with their config and a model card, for cmacc.load and for a\n"
        "model hub; with --onnx also as ONNX graphs from frames and waveforms to embeddings, checked against torch.",
        "cmacc export runs/first --out first-export --onnx",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--onnx", action="store_true", help="also video.onnx and audio.onnx (extra `export`)")
    parser.add_argument(
        "--push", metavar="USER/NAME", help="upload the folder to the Hugging Face hub (extra `export`)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is in --out")
    options = parser.parse_args(arguments)
    from cmacc.transfer import export_run, push

    exported = export_run(options.run, options.out, with_onnx=options.onnx, overwrite=options.overwrite)
    files = "".join(f", {name}.onnx (within {gap:.1e} of torch)" for name, gap in exported.differences.items())
    print(f"export: {exported.folder}, weights of step {exported.step}{files}")
    if options.push:
        print(f"pushed: {push(options.out, options.push)}")
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
    from cmacc.clips import list_folders, scan
    from cmacc.clips.synthetic import WorldConfig, write_world
    from cmacc.pretraining import start_run
    from cmacc.transfer import EvaluateOptions
    from cmacc.viewer import write_report

    out: Path = options.out
    manifest = out / "manifest.parquet"
    start_run(_demo_config(manifest, options.clips, options.steps, options.seed), out, overwrite=options.overwrite)
    world = WorldConfig(clip_count=options.clips, class_count=8, nuisance=0.3, frame_size=64, seed=options.seed)
    with _progress("world") as advance:
        write_world(world, out / "world", progress=lambda done, total: advance("clips", done, total))
    with _progress("scan") as advance:
        listing = list_folders([out / "world"])
        scanned = scan(listing, test_fraction=0.25, progress=lambda done, total: advance("files", done, total))
    scanned.manifest.write(manifest)
    outcome = _pretrain_with_progress(out)
    if not outcome.finished:
        _print_outcome(outcome)
        return _INTERRUPTED
    # One window a clip instead of ten: the clips are hardly longer than it.
    how = EvaluateOptions(windows=1, workers=1)
    card = _evaluate_with_progress(str(out), ["pairs", "labelled"], manifest, out, (), how, options.overwrite)
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
    "pack": ("a manifest to shards that are quick to read", pack_command),
    "pretrain": ("a manifest to trained encoders", pretrain_command),
    "evaluate": ("encoders and data to a result card; cards side by side", evaluate_command),
    "report": ("a run to an HTML page", report_command),
    "export": ("a run to weights that others can load", export_command),
    "demo": ("all of these, on a synthetic world", demo_command),
}


def _parser(command: str, description: str, example: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"cmacc {command}",
        description=description,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_task_arguments(parser: argparse.ArgumentParser, limit_seconds: float) -> None:
    """Where the tasks of `scan` and `pack` run."""
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at work")
    parser.add_argument(
        "--limit-seconds", type=_positive_seconds, default=limit_seconds, help="a file that takes longer is left out"
    )
    parser.add_argument("--part", default="1/1", metavar="I/N", help="only this part, for batch schedulers")
    parser.add_argument("--cluster", metavar="ADDRESS", help="of a Dask scheduler, whose workers see the same files")


def _positive_seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return seconds


def _part(text: str) -> tuple[int, int]:
    """``2/5`` as (2, 5)."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ValueError(f"--part must be I/N with 1 <= I <= N, such as 2/5, got {text!r}")
    return int(number), int(count)


def _listing(options: argparse.Namespace) -> "Listing":
    """The files that `scan` is to look over."""
    from cmacc.clips import LabelTable, layouts, list_folders

    if options.layout == "folders":
        table = None
        if options.labels is not None:
            table = LabelTable(
                options.labels,
                options.label_column,
                options.split_column,
                options.group_column,
                options.path_column,
            )
        return list_folders(options.folders, table)
    if len(options.folders) != 1 or options.list is None:
        raise ValueError(f"--layout {options.layout} must have one folder and --list, the official list")
    (folder,) = options.folders
    match options.layout:
        case "kinetics":
            return layouts.list_kinetics(folder, options.list, ids_are_cut=options.ids_are_cut)
        case "audioset":
            return layouts.list_audioset(folder, options.list, options.names, ids_are_cut=options.ids_are_cut)
        case "vggsound":
            return layouts.list_vggsound(folder, options.list, ids_are_cut=options.ids_are_cut)
        case "ucf101":
            return layouts.list_ucf101(folder, options.list, options.split_number)
        case "hmdb51":
            return layouts.list_hmdb51(folder, options.list, options.split_number)
        case _:
            return layouts.list_esc50(folder, options.list, options.split_number)


def _print_scan(result: "ScanResult") -> None:
    _print_refused({str(path): reason for path, reason in result.refused.items()})
    records = list(result.manifest.records)
    hours = sum(record.duration_seconds for record in records) / 3600
    print(
        f"{len(records)} samples ({hours:.2f} h), {sum(r.has_audio and r.has_picture for r in records)} with picture "
        f"and sound, {len(result.manifest.classes())} classes, {sum(r.split == 'test' for r in records)} held out, "
        f"{len(result.refused)} files left out; fingerprint {result.manifest.fingerprint()}"
    )
    counts = Counter(name for record in records for name in record.findings)
    if counts:
        print("noted: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    if result.listing.missing:
        missing, listed = len(result.listing.missing), result.listing.listed_count
        print(f"{missing} of {listed} in the list are not there", file=sys.stderr)
    if result.listing.unmatched_count:
        print(f"{result.listing.unmatched_count} media files are not in the list", file=sys.stderr)


def _print_refused(refused: dict[str, str]) -> None:
    for path, reason in list(refused.items())[:_MOST_NAMED]:
        print(f"left out: {path}: {reason}", file=sys.stderr)
    if len(refused) > _MOST_NAMED:
        print(f"and {len(refused) - _MOST_NAMED} more files", file=sys.stderr)


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
    encoder: str,
    tasks: list[Any],
    data: Path,
    out: Path,
    protocols: Sequence[Any],
    options: "EvaluateOptions",
    overwrite: bool,
) -> "Card":
    from cmacc.transfer import evaluate

    with _progress("evaluate") as advance:
        card = evaluate(
            encoder, tasks, data, out, protocols=protocols, options=options, overwrite=overwrite, progress=advance
        )
    _print_refused(card.left_out)
    return card


def _cache_folder() -> Path:
    """Where features are kept, by the XDG rules."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmacc"


def _print_card(card: "Card") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{card.encoder.name} after {card.encoder.checkpoint_step} steps")
    for heading in ("task", "protocol", "modality", "metric"):
        table.add_column(heading)
    for heading in ("value", "95 % interval", "spread", "untrained", "chance", "held out"):
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
    # Written to a file or a pipe, the table must not be cut to a terminal's 80 columns.
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    sys.exit(main())
