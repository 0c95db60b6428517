"""Manifests and shards from media files: ``cmacc scan`` and ``cmacc pack``."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cmacc.cli.terminal import BAD_INPUT, command_parser, part_of, print_skipped, progress_bars, refuse_existing

if TYPE_CHECKING:
    from cmacc.clips import Listing, ScanResult

_LAYOUTS = ("folders", "kinetics", "audioset", "vggsound", "ucf101", "hmdb51", "esc50")


def scan_command(arguments: Sequence[str]) -> int:
    """Examine folders and write a manifest."""
    parser = command_parser(
        "scan",
        "Examine every media file, and write a manifest of the usable ones and a page with the findings. An\n"
        "interrupted scan resumes where it stopped. A later scan examines changed files only.",
        "cmacc scan videos/ --out videos.parquet --test-fraction 0.2\n"
        "         cmacc scan UCF-101/ --layout ucf101 --annotations ucfTrainTestlist/ --out ucf1.parquet",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("manifest.parquet"),
        help="manifest to write, .parquet or .csv; the page (.html) and the journal (.scan/) are written beside it",
    )
    parser.add_argument("--layout", choices=_LAYOUTS, default="folders", help="layout of the folder")
    parser.add_argument(
        "--annotations", type=Path, metavar="PATH", help="official list of the layout: a CSV file or a folder"
    )
    parser.add_argument("--names", type=Path, metavar="CSV", help="audioset: class_labels_indices.csv")
    parser.add_argument("--split-number", type=int, default=1, help="ucf101, hmdb51: split 1 to 3; esc50: test fold")
    parser.add_argument(
        "--ids-are-cut",
        action="store_true",
        help="files named by their id alone hold only the segment, not the whole video",
    )
    parser.add_argument("--labels", type=Path, metavar="TABLE", help="CSV or JSON of labels instead of class folders")
    parser.add_argument("--path-column", help="column of --labels that names the file (path, file, filename or video)")
    parser.add_argument("--label-column", default="label", help="column of --labels with the label")
    parser.add_argument("--split-column", help="column of --labels with the split (train, test)")
    parser.add_argument("--group-column", help="column of --labels with the group: files of a group stay in one split")
    parser.add_argument(
        "--only",
        type=Path,
        metavar="LIST",
        help="examine only these files: a list from cmacc select or dedupe, or a text file with a path on each line",
    )
    parser.add_argument("--test-fraction", type=float, default=0.0, help="fraction of files for split test")
    parser.add_argument("--seed", type=int, default=0, help="seed of that split")
    parser.add_argument("--min-seconds", type=float, default=0.5, help="shorter files are too_short")
    parser.add_argument(
        "--exclude",
        nargs="*",
        metavar="FINDING",
        help="findings that exclude a file from the manifest (unreadable corrupt too_short); also no_audio, silent, "
        "black, still, duplicate, near_duplicate...",
    )
    _add_task_arguments(parser, timeout_seconds=60.0)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing manifest and page")
    options = parser.parse_args(arguments)
    from cmacc.clips import examine_files, keep_chosen, read_chosen, scan, workers_of
    from cmacc.clips.catalog.scan import EXCLUDED_BY_DEFAULT
    from cmacc.viewer import write_scan_page

    # Check everything before the work, which may take hours. The names of the page and the journal contain the
    # manifest's whole name (suffix included), so that two manifests never share them.
    page, journal = (options.out.with_name(f"{options.out.name}.{ending}") for ending in ("html", "scan"))
    part = part_of(options.part)
    if options.out.suffix not in (".parquet", ".csv"):
        raise ValueError(f"--out must end in .parquet or .csv, got {options.out}")
    if not 0 <= options.test_fraction < 1:
        raise ValueError(f"--test-fraction must be in [0, 1), got {options.test_fraction}")
    if part[1] == 1:
        refuse_existing(options.out, options.overwrite)
    listing = _listing(options)
    if options.only is not None:
        listing = keep_chosen(listing, read_chosen(options.only))
    with workers_of(options.workers, options.cluster) as executor, progress_bars("scan") as advance:
        if part[1] > 1:
            done = examine_files(
                listing,
                part=part,
                executor=executor,
                timeout_seconds=options.timeout_seconds,
                journal=journal,
                progress=advance,
            )
            print(f"part {options.part}: {len(done)} files examined; when all parts are done, run it without --part")
            return 0
        result = scan(
            listing,
            exclude=EXCLUDED_BY_DEFAULT if options.exclude is None else options.exclude,
            min_seconds=options.min_seconds,
            test_fraction=options.test_fraction,
            seed=options.seed,
            executor=executor,
            timeout_seconds=options.timeout_seconds,
            journal=journal,
            progress=advance,
        )
    write_scan_page(result, page, overwrite=True)
    result.manifest.write(options.out)  # last: if the manifest exists, the scan is complete
    _print_scan(result)
    print(f"manifest: {options.out}\npage: {page}")
    return 0


def pack_command(arguments: Sequence[str]) -> int:
    """Transcode a manifest's samples into shards."""
    parser = command_parser(
        "pack",
        "Transcode a manifest's samples into tar shards with fast random access (WebDataset naming). An interrupted\n"
        "pack resumes where it stopped. The resulting index.parquet is a manifest to train with.",
        "cmacc pack videos.parquet --out packed/\n         cmacc pack --verify packed/",
    )
    parser.add_argument("manifest", metavar="MANIFEST", help="manifest from cmacc scan; with --verify, the DIR")
    parser.add_argument("--out", metavar="DIR", help="folder, or a URL that fsspec opens")
    parser.add_argument("--verify", action="store_true", help="only compare the shards in DIR with their index")
    parser.add_argument("--short-side", type=int, default=128, help="short side of the video in pixels (%(default)s)")
    parser.add_argument("--keyframe-every", type=int, default=16, help="keyframe interval in frames (%(default)s)")
    parser.add_argument("--crf", type=int, default=23, help="quality of x264, 0 (best, largest) to 51 (%(default)s)")
    parser.add_argument(
        "--sample-rate-hz", type=int, default=16_000, help="sample rate of the mono audio (%(default)s)"
    )
    parser.add_argument("--samples-per-shard", type=int, default=256, help="samples in each shard (%(default)s)")
    _add_task_arguments(parser, timeout_seconds=600.0)
    parser.add_argument("--overwrite", action="store_true", help="replace another pack in DIR")
    options = parser.parse_args(arguments)
    from cmacc.clips import Manifest, PackSettings, pack, verify, workers_of

    with progress_bars("verify" if options.verify else "pack") as advance:
        if options.verify:
            problems = verify(options.manifest, advance)
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
            manifest, part = Manifest.read(options.manifest), part_of(options.part)
            with workers_of(options.workers, options.cluster) as executor:
                result = pack(
                    manifest,
                    options.out,
                    settings,
                    part=part,
                    executor=executor,
                    timeout_seconds=options.timeout_seconds,
                    overwrite=options.overwrite,
                    progress=advance,
                )
    if options.verify:
        for problem in problems:
            print(problem, file=sys.stderr)
        print(f"{options.manifest}: {len(problems)} problems" if problems else f"{options.manifest}: matches its index")
        return BAD_INPUT if problems else 0
    print_skipped(result.skipped)
    print(f"{result.sample_count} samples in {result.shard_count} shards, {len(result.skipped)} files skipped")
    if part[1] > 1:
        print(f"part {options.part} is done; when all parts are done, run it without --part to write the index")
    else:
        print(f"manifest: {options.out.rstrip('/')}/index.parquet")
    return 0


def _add_task_arguments(parser: argparse.ArgumentParser, timeout_seconds: float) -> None:
    """Arguments on how `scan` and `pack` run their tasks."""
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="number of processes")
    parser.add_argument(
        "--timeout-seconds",
        type=_positive_seconds,
        default=timeout_seconds,
        help="skip files that take longer (%(default)g)",
    )
    parser.add_argument("--part", default="1/1", metavar="I/N", help="do only this part, for batch schedulers")
    parser.add_argument("--cluster", metavar="ADDRESS", help="Dask scheduler, whose workers see the same files")


def _positive_seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return seconds


def _listing(options: argparse.Namespace) -> "Listing":
    """The files for `scan` to examine."""
    from cmacc.clips import LabelTable, list_folders
    from cmacc.clips.catalog import layouts

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
    if len(options.folders) != 1 or options.annotations is None:
        raise ValueError(f"--layout {options.layout} must have one folder and --annotations, the official list")
    (folder,) = options.folders
    match options.layout:
        case "kinetics":
            return layouts.list_kinetics(folder, options.annotations, ids_are_cut=options.ids_are_cut)
        case "audioset":
            return layouts.list_audioset(folder, options.annotations, options.names, ids_are_cut=options.ids_are_cut)
        case "vggsound":
            return layouts.list_vggsound(folder, options.annotations, ids_are_cut=options.ids_are_cut)
        case "ucf101":
            return layouts.list_ucf101(folder, options.annotations, options.split_number)
        case "hmdb51":
            return layouts.list_hmdb51(folder, options.annotations, options.split_number)
        case _:
            return layouts.list_esc50(folder, options.annotations, options.split_number)


def _print_scan(result: "ScanResult") -> None:
    from cmacc.clips.catalog.listing import other_files

    print_skipped({str(path): reason for path, reason in result.skipped.items()})
    records = list(result.manifest.records)
    hours = sum(record.duration_seconds for record in records) / 3600
    print(
        f"{len(records)} samples ({hours:.2f} h), {sum(r.has_audio and r.has_picture for r in records)} with video "
        f"and audio, {len(result.manifest.classes())} classes, {sum(r.split == 'test' for r in records)} held out, "
        f"{len(result.skipped)} files skipped; fingerprint {result.manifest.fingerprint()}"
    )
    counts = Counter(name for record in records for name in record.findings)
    if counts:
        print("findings: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    if others := other_files(result.listing.other_endings):
        print(others)
    if result.listing.missing:
        missing, listed = len(result.listing.missing), result.listing.listed_count
        print(f"{missing} of {listed} files in the list are missing", file=sys.stderr)
    if result.listing.unmatched_count:
        print(f"{result.listing.unmatched_count} media files are not in the list", file=sys.stderr)
