"""Find moments in videos: ``cmacc embed``, ``cmacc search`` and ``cmacc localise``."""

import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cmacc.cli.encoders import add_tower_flags, download_towers_of, permissions
from cmacc.cli.terminal import (
    BAD_INPUT,
    command_parser,
    part_of,
    print_skipped,
    progress_bars,
    refuse_existing,
    size_text,
)

if TYPE_CHECKING:
    from cmacc.search import Answer, EmbedResult


def embed_command(arguments: Sequence[str]) -> int:
    """Embed whole videos into an index."""
    parser = command_parser(
        "embed",
        "Embed whole videos into an index to search: overlapping windows of picture and sound, in a LanceDB table.\n"
        "DATA is a folder or a manifest. The index mirrors it: run the command again to add new and changed files and\n"
        "to remove those that are gone. An interrupted run resumes where it stopped. ENCODER is what cmacc evaluate\n"
        "takes, with both modalities in one space.",
        "cmacc embed runs/first videos/ --out videos.index\n"
        "         cmacc embed runs/first videos.parquet --out s3://bucket/videos.index --part 2/5",
    )
    parser.add_argument("encoder", metavar="ENCODER", help="run or export folder, or USER/NAME on the hub")
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of videos, or a manifest of cmacc scan")
    parser.add_argument("--out", required=True, metavar="INDEX", help="folder, or the URL of an object store")
    parser.add_argument(
        "--root", metavar="DIR", help="folder that paths are relative to; also states where files have moved"
    )
    parser.add_argument("--hop", type=float, default=1.0, metavar="SECONDS", help="one window every (%(default)g s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="decoding processes (%(default)s)")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="embed only this part, for batch schedulers")
    parser.add_argument("--cluster", metavar="ADDRESS", help="Dask scheduler, whose workers see the same files")
    parser.add_argument("--to-parquet", type=Path, metavar="FILE", help="export all rows afterwards")
    parser.add_argument("--rebuild", action="store_true", help="embed everything again, for another encoder or --hop")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing FILE")
    add_tower_flags(parser)
    options = parser.parse_args(arguments)
    from cmacc.clips import workers_of
    from cmacc.pretraining import default_device
    from cmacc.search import embed_files, export_parquet

    part = part_of(options.part)
    if options.workers < 0:
        raise ValueError(f"--workers must be at least 0, got {options.workers}")
    if options.to_parquet is not None:
        if part[1] > 1:
            raise ValueError("--to-parquet exports the whole index, and --part embeds a part; give one of them")
        refuse_existing(options.to_parquet, options.overwrite)
    if options.download:
        download_towers_of(Path(options.encoder))
    cluster = workers_of(1, options.cluster) if options.cluster else nullcontext()
    with permissions(options), cluster as executor, progress_bars("embed") as advance:
        result = embed_files(
            options.encoder,
            options.data,
            options.out,
            root=options.root,
            hop_seconds=options.hop,
            workers=options.workers,
            device=default_device(),
            part=part,
            executor=executor,
            rebuild=options.rebuild,
            download=options.download,
            progress=advance,
        )
    print_skipped(result.failures)
    _print_embedded(result, options.out, options.part if part[1] > 1 else None)
    if result.failures and not result.row_count and part[1] == 1:
        print("nothing is embedded: no file can be used", file=sys.stderr)
        return BAD_INPUT
    if options.to_parquet is not None:
        print(f"{export_parquet(options.out, options.to_parquet)} rows: {options.to_parquet}")
    return 0


def search_command(arguments: Sequence[str]) -> int:
    """Search an index."""
    parser = command_parser(
        "search",
        "Find the moments of an index nearest to a video, a sound or an image (a video that does not move), or to a\n"
        "text if the index's encoder is a tower with a text side. Neighbouring windows are joined into segments. If\n"
        "nothing scores higher than what is not there does, the answer is that nothing was found.",
        "cmacc search videos.index bark.wav --in video --top 5\n"
        "         cmacc search videos.index film.mp4 --window 12 15 --where \"label = 'dog'\" --json\n"
        '         cmacc search videos.index --text "a dog barks"',
    )
    parser.add_argument("index", metavar="INDEX", help="folder or URL, from cmacc embed")
    parser.add_argument("query", type=Path, nargs="?", metavar="QUERY", help="a video, sound or image file")
    parser.add_argument("--text", help="search by a text instead")
    parser.add_argument("--at", type=float, metavar="SECONDS", help="search with one window of QUERY, around this time")
    parser.add_argument("--window", type=float, nargs=2, metavar=("A", "B"), help="search with this part of QUERY")
    parser.add_argument("--by", choices=("video", "audio"), help="search with QUERY's picture or sound alone")
    parser.add_argument(
        "--in", dest="into", choices=("audio", "video", "both"), default="both", help="where to search (%(default)s)"
    )
    parser.add_argument("--where", metavar="SQL", help="condition on path, label, start_seconds...")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="most moments (%(default)s)")
    parser.add_argument(
        "--false-alarms", type=float, default=0.01, metavar="RATE",
        help="share of searches for something that is not there that may find something; 1 shows the best moments, "
        "however bad (%(default)g)",
    )  # fmt: skip
    parser.add_argument("--encoder", help="where the index's encoder is now")
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects")
    add_tower_flags(parser)
    options = parser.parse_args(arguments)
    if options.at is not None and options.window is not None:
        raise ValueError("--at and --window both choose a part of QUERY; give one of them")
    from cmacc.pretraining import default_device
    from cmacc.search import Index

    with permissions(options):
        index = Index.open(options.index, encoder=options.encoder, device=default_device(), download=options.download)
        if options.download:
            download_towers_of(Path(options.encoder or index.table.description.encoder))
        answer = index.search(
            options.query,
            text=options.text,
            at_seconds=options.at,
            window=options.window,
            by=options.by,
            into=options.into,
            where=options.where,
            top=options.top,
            false_alarm_rate=options.false_alarms,
        )
    if options.json:
        print(json.dumps([asdict(moment) for moment in answer.moments], indent=1))
    else:
        print_answer(answer)
    return 0


def localise_command(arguments: Sequence[str]) -> int:
    """Show where in the picture, and when, a file's sound is."""
    parser = command_parser(
        "localise",
        "Show where in the picture a file's sound comes from, and when the two agree most. Writes OUT.png, the best\n"
        "moments with heat maps over their frames, and OUT.mp4, the video with its heat map and sound. ENCODER is as\n"
        "for `cmacc evaluate`; it must encode video and audio, and have a feature map.",
        "cmacc localise film.mp4 runs/first --out found/film\n"
        "         cmacc localise film.mp4 runs/first --out found/film --window 60 90 --top 5",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="video file with sound")
    parser.add_argument("encoder", metavar="ENCODER", help="run or export folder, or another encoder")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="path of the files, without ending")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--at", type=float, metavar="SECONDS", help="only the window around this time")
    part.add_argument("--window", nargs=2, type=float, metavar=("A", "B"), help="only from A to B seconds")
    parser.add_argument("--top", type=int, default=3, metavar="K", help="number of moments (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the moments as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    add_tower_flags(parser)
    options = parser.parse_args(arguments)
    if options.top < 1:
        raise ValueError(f"--top must be at least 1, got {options.top}")
    if not options.out.name:
        raise ValueError(f"--out must be a path without ending, such as found/film, got {options.out}")
    strip, film = (options.out.with_name(options.out.name + ending) for ending in (".png", ".mp4"))
    for path in (strip, film):
        refuse_existing(path, options.overwrite)
    if film.resolve() == options.file.resolve():
        raise ValueError(f"--out {options.out} must not name FILE itself, whose place {film} would take")
    from cmacc.pretraining import default_device
    from cmacc.search import localise, write_strip, write_video
    from cmacc.transfer import open_encoder

    if options.download:
        download_towers_of(Path(options.encoder))
    with permissions(options):
        encoder = open_encoder(options.encoder, default_device(), download=options.download).encoder
    begin, end = options.window or (0.0, math.inf)
    if options.at is not None:
        half = encoder.spec.length_seconds / 2
        begin, end = options.at - half, options.at + half
    with progress_bars("localise") as advance:
        found = localise(options.file, encoder, begin_seconds=begin, end_seconds=end, progress=advance)
        write_strip(found, strip, top=options.top, overwrite=options.overwrite)
        write_video(found, film, overwrite=options.overwrite, progress=advance)
    moments = found.moments(options.top)
    if options.json:
        print(json.dumps([{"path": str(options.file), **asdict(moment)} for moment in moments], indent=1))
        return 0
    for moment in moments:
        print(
            f"{moment.start_seconds:7.1f} to {moment.end_seconds:.1f} s: agreement {moment.agreement:.2f}, "
            f"at {moment.x:.0%} from the left and {moment.y:.0%} from the top"
        )
    print(f"pictures: {strip}, {film}")
    return 0


def print_answer(answer: "Answer") -> None:
    """Print what a search found, or that it found nothing."""
    for note in answer.notes:
        print(f"note: {note}")
    if not answer.moments:
        print(
            f"nothing found: among {answer.window_count} windows the best score is {answer.best_score:.3f}, and "
            f"{answer.chance:.1%} of searches for something that is not there come as high (the limit is "
            f"{answer.false_alarm_rate:.1%}; --false-alarms 1 shows the best, however bad)"
        )
    for place, moment in enumerate(answer.moments, start=1):
        name = moment.path if moment.key is None else f"{moment.path} {moment.key}"
        label = f"  [{moment.label}]" if moment.label is not None else ""
        print(
            f"{place:3}. {moment.start_seconds:8.2f} s to {moment.end_seconds:8.2f} s  {moment.modality}  score "
            f"{moment.score:.3f}, above {min(moment.percentile, 99.999):.3f} % of pairs  {name}{label}"
        )


def _print_embedded(result: "EmbedResult", index: str, part: str | None) -> None:
    samples = f"{result.added} files embedded ({result.seconds_embedded / 3600:.2f} h)"
    if part is not None:
        print(f"part {part}: {samples}; when all parts are done, run it without --part")
        return
    print(f"{samples}, {result.copied} renamed or relabelled, {result.removed} removed, {result.kept} unchanged")
    if result.removed > result.kept + result.copied:
        print("note: most of what the index held is removed, because it is not in DATA", file=sys.stderr)
    near = result.description.approximate
    if near is not None:
        print(
            f"approximate index: recall@10 {near.recall_at_10:.3f} against exact search, with {near.probes} partitions "
            "for a query"
        )
    print(f"index: {index}, {result.row_count} rows, {size_text(result.disk_bytes)} on disk")
