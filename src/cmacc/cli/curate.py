"""Lists of samples from an index: ``cmacc select`` and ``cmacc dedupe``. Both write a list, and leave videos alone."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cmacc.cli.terminal import command_parser, progress_bars, refuse_existing

if TYPE_CHECKING:
    from cmacc.clips import Manifest
    from cmacc.search.duplicates import Duplicates
    from cmacc.search.samples import Samples


def select_command(arguments: Sequence[str]) -> int:
    """Choose samples that differ, and write a list of them."""
    parser = command_parser(
        "select",
        "Choose samples of an index that differ from each other, to label or to keep, and write a list of them in\n"
        "the order of choosing. The list is a manifest, for cmacc pretrain, pack and embed, and scan --only.",
        "cmacc select videos.index --count 100 --out to-label.csv\n"
        "         cmacc select videos.index --count 100 --given to-label.csv --out next.csv",
    )
    parser.add_argument("index", metavar="INDEX", help="index from cmacc embed")
    parser.add_argument("--count", type=int, required=True, metavar="N", help="number of samples to choose")
    _add_list_arguments(parser)
    parser.add_argument(
        "--given",
        type=Path,
        metavar="LIST",
        help="samples labelled already, which the others must differ from: such a list, or a text file with a path on "
        "each line",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (%(default)s)")
    options = parser.parse_args(arguments)
    from cmacc.clips import read_chosen
    from cmacc.search.curate import select_samples

    source = _checked_source(options)
    samples = _samples(options)
    given: set[int] = set()
    if options.given is not None:
        chosen = read_chosen(options.given)
        found = samples.find(chosen)
        given = {number for numbers in found for number in numbers}
        if not given:
            raise ValueError(
                f"--given {options.given}: must name samples of {options.index}, got {len(chosen)} of other files, "
                f"such as {chosen[0].path}"
            )
        if absent := sum(not numbers for numbers in found):
            print(f"{absent} of {len(chosen)} samples of {options.given} are not in the index", file=sys.stderr)
    picked = select_samples(samples, options.count, given=given, seed=options.seed)
    _write_list(options.out, samples, picked, source)
    beside = f", beside {len(given)} given" if given else ""
    print(f"{len(picked)} of {len(samples)} samples chosen{beside}\nlist: {options.out}")
    return 0


def dedupe_command(arguments: Sequence[str]) -> int:
    """Find duplicates, and write a list of what to keep."""
    from cmacc.search.duplicates import THRESHOLD

    parser = command_parser(
        "dedupe",
        "Find near-duplicates in an index (the same recording re-encoded, scaled or cut), and write a list of the\n"
        "samples to keep: of each group, the longest one. With --semantic, find other recordings of the same instead\n"
        "(SemDeDup). The list is a manifest, for cmacc pretrain, pack and embed, and scan --only. No video is changed.",
        "cmacc dedupe videos.index --out keep.parquet --page duplicates.html\n"
        "         cmacc dedupe videos.index --semantic 0.2 --out keep.parquet",
    )
    parser.add_argument("index", metavar="INDEX", help="index from cmacc embed")
    _add_list_arguments(parser)
    method = parser.add_mutually_exclusive_group()
    method.add_argument(
        "--threshold",
        type=float,
        default=THRESHOLD,
        help="least whitened cosine of windows that are alike (%(default)s)",
    )
    method.add_argument(
        "--semantic", type=float, metavar="EPSILON", help="SemDeDup: whitened cosines above 1 - EPSILON are duplicates"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write groups and stretches as JSON")
    parser.add_argument("--page", type=Path, metavar="FILE", help="also write a page with pairs side by side")
    options = parser.parse_args(arguments)
    from cmacc.clips.storage import written_aside
    from cmacc.search.duplicates import near_duplicates, semantic_duplicates
    from cmacc.viewer import write_dedupe_page

    source = _checked_source(options)
    for path in (options.json, options.page):
        if path is not None:
            refuse_existing(path, options.overwrite)
    samples = _samples(options)
    with progress_bars("dedupe") as advance:
        if options.semantic is None:
            found = near_duplicates(samples, threshold=options.threshold, progress=advance)
        else:
            found = semantic_duplicates(samples, options.semantic, progress=advance)
    _write_list(options.out, samples, found.kept(samples), source)
    if options.json is not None:
        with written_aside(options.json) as aside:
            aside.write_text(json.dumps(_as_json(samples, found), indent=1) + "\n", encoding="utf-8")
    if options.page is not None:
        write_dedupe_page(samples, found, options.page, source=source, overwrite=options.overwrite)
    kind = "near-duplicates" if options.semantic is None else "semantic duplicates"
    print(
        f"{len(found.removed)} of {len(samples)} samples are {kind} of others, in {len(found.groups)} groups; "
        f"{len(found.stretches)} pairs of stretches are alike"
    )
    for path, what in ((options.json, "groups"), (options.page, "page")):
        if path is not None:
            print(f"{what}: {path}")
    print(f"list of {len(samples) - len(found.removed)} to keep: {options.out}")
    return 0


def _add_list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="LIST", help="list to write, .parquet or .csv")
    parser.add_argument(
        "--manifest",
        type=Path,
        metavar="FILE",
        help="manifest that was embedded, to take its rows: an index does not keep split and group",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def _checked_source(options: argparse.Namespace) -> "Manifest | None":
    """Check --out before the work, and read --manifest."""
    from cmacc.clips import Manifest

    if options.out.suffix not in (".parquet", ".csv"):
        raise ValueError(f"--out must end in .parquet or .csv, got {options.out}")
    refuse_existing(options.out, options.overwrite)
    return None if options.manifest is None else Manifest.read(options.manifest)


def _samples(options: argparse.Namespace) -> "Samples":
    from cmacc.search.samples import Samples
    from cmacc.search.table import WindowTable

    return Samples.of(WindowTable(options.index))


def _write_list(out: Path, samples: "Samples", numbers: Sequence[int], source: "Manifest | None") -> None:
    samples.manifest(numbers, source).write(out)
    if source is None:
        print("without --manifest, the list has no splits and no groups", file=sys.stderr)


def _as_json(samples: "Samples", found: "Duplicates") -> dict[str, object]:
    names = samples.names
    stretches = [
        dataclasses.asdict(one) | {"first": names[one.first], "second": names[one.second]} for one in found.stretches
    ]
    groups = [{"keep": names[group[0]], "remove": [names[number] for number in group[1:]]} for group in found.groups]
    return {"groups": groups, "stretches": stretches}
