"""Search with an encoder: ``cmacc localise``."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from cmacc.cli.encoders import add_tower_flags, download_towers_of, permissions
from cmacc.cli.terminal import command_parser, progress_bars, refuse_existing


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
    parser.add_argument("--device", help="cpu, cuda, ...; by default a GPU if there is one")
    parser.add_argument("--json", action="store_true", help="print the moments as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    add_tower_flags(parser)
    options = parser.parse_args(arguments)
    if options.top < 1:
        raise ValueError(f"--top must be at least 1, got {options.top}")
    strip, film = (options.out.with_name(options.out.name + ending) for ending in (".png", ".mp4"))
    for path in (strip, film):
        refuse_existing(path, options.overwrite)
    import dataclasses

    import torch

    from cmacc.search import localise, write_strip, write_video
    from cmacc.transfer import open_encoder

    if options.download:
        download_towers_of(Path(options.encoder))
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be a device of torch on this machine, got {options.device}") from error
    with permissions(options):
        encoder = open_encoder(options.encoder, device, download=options.download).encoder
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
        print(json.dumps([{"path": str(options.file), **dataclasses.asdict(moment)} for moment in moments], indent=1))
        return 0
    for moment in moments:
        print(
            f"{moment.start_seconds:7.1f} to {moment.end_seconds:.1f} s: agreement {moment.agreement:.2f}, "
            f"at {moment.x:.0%} from the left and {moment.y:.0%} from the top"
        )
    print(f"pictures: {strip}, {film}")
    return 0
