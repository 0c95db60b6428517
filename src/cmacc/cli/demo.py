"""``cmacc demo``: an end-to-end run on synthetic videos."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cmacc.cli.evaluate import evaluate_with_progress
from cmacc.cli.search import print_answer
from cmacc.cli.terminal import command_parser, progress_bars
from cmacc.cli.training import pretrain_with_progress, print_outcome, stop_signals

if TYPE_CHECKING:
    from cmacc.clips import Manifest
    from cmacc.pretraining import PretrainConfig
    from cmacc.transfer import Card


def demo_command(arguments: Sequence[str]) -> int:
    """Generate synthetic videos, train on them, evaluate, and write a report."""
    parser = command_parser(
        "demo",
        "Generate a small data set of videos with audio, pretrain on it, evaluate, and write a report.",
        "cmacc demo --out demo-out",
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for all files (default: demo-out)")
    parser.add_argument("--clips", type=int, default=960, help="number of videos (default: 960)")
    parser.add_argument("--steps", type=int, default=500, help="number of training steps (default: 500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing run in --out; videos are kept")
    options = parser.parse_args(arguments)
    from cmacc.clips import list_folders, scan
    from cmacc.clips.synthetic import WorldConfig, write_world
    from cmacc.pretraining import require_free, require_one_process, start_run
    from cmacc.transfer import EvaluateOptions
    from cmacc.viewer import write_report

    out: Path = options.out
    manifest = out / "manifest.parquet"
    require_one_process()
    require_free(out, overwrite=options.overwrite)
    world = WorldConfig(clip_count=options.clips, class_count=8, nuisance=0.3, frame_size=64, seed=options.seed)
    with progress_bars("world") as advance:
        write_world(world, out / "world", progress=advance)
    with progress_bars("scan") as advance:
        listing = list_folders([out / "world"])
        scanned = scan(listing, test_fraction=0.25, progress=advance)
    scanned.manifest.write(manifest)
    start_run(_demo_config(manifest, options.steps, options.seed), out, overwrite=options.overwrite)
    with stop_signals() as stop:
        outcome = pretrain_with_progress(out, stop)
    if not outcome.finished:
        print_outcome(outcome)
        return stop.code
    # One window per clip instead of ten, because the clips are hardly longer than a window.
    how = EvaluateOptions(windows=1, workers=1)
    card = evaluate_with_progress(str(out), ["pairs", "labelled"], manifest, out, (), how, options.overwrite)
    with progress_bars("report"):
        report = write_report(out, overwrite=options.overwrite)
    _print_summary(card)
    _search_demo(out, scanned.manifest)
    program = sys.argv[0] if Path(sys.argv[0]).name == "cmacc" else "cmacc"
    print(f"\nreport: {report}, all results: {out / 'card.md'}")
    print(f"all of it in a browser: {program} app {out / 'index' if (out / 'index').is_dir() else out}\n")
    print("next, with your own folder of videos:")
    print(f"  {program} scan VIDEOS --out videos.parquet --test-fraction 0.2")
    print(f"  {program} pretrain --data.manifest videos.parquet --out runs/first")
    print(f"  {program} embed runs/first VIDEOS --out videos.index")
    print(f"  {program} search videos.index QUERY")
    return 0


def _search_demo(out: Path, manifest: "Manifest") -> None:
    """Embed the held-out clips, and print the first search by sound that finds its own video."""
    from cmacc.clips import Manifest
    from cmacc.search import Index, SearchError, embed_files

    held_out = manifest.ids_where(lambda record: record.split == "test")
    clips = Manifest([manifest.records[i] for i in held_out])
    try:
        with progress_bars("embed") as advance:
            embed_files(str(out), clips, out / "index", root=out / "world", rebuild=True, progress=advance)
    except SearchError as error:
        print(f"\nno search: {error}")
        return
    index = Index.open(out / "index")
    for tried, record in enumerate(clips.records, start=1):
        answer = index.search(record.path, by="audio", into="video", top=3, false_alarm_rate=1.0)
        if Path(answer.moments[0].path) == Path(record.path).resolve():
            print(f"\nindex of the {len(clips)} held-out clips: {out / 'index'}")
            tries = (
                "the first sound tried"
                if tried == 1
                else f"sound {tried} that was tried; those before do not find their own"
            )
            print(f"videos nearest to the sound of {record.name} ({tries}):")
            print_answer(answer)
            return
    print(f"\nno search: none of the {len(clips)} held-out sounds finds its own video first")


def _print_summary(card: "Card") -> None:
    """Print the six results that show whether the encoders learned anything."""
    from rich.console import Console
    from rich.table import Table

    rows = {
        "video finds its audio, R@1": ("retrieval", "video_to_audio", "R@1"),
        "audio finds its video, R@1": ("retrieval", "audio_to_video", "R@1"),
        "video finds its audio, median rank": ("retrieval", "video_to_audio", "median_rank"),
        "linear probe on video": ("linear", "video", "accuracy"),
        "linear probe on audio": ("linear", "audio", "accuracy"),
        "linear probe on both": ("linear", "both", "accuracy"),
    }
    results = {(result.protocol, result.modality, result.metric): result for result in card.results}
    count = results["retrieval", "video_to_audio", "R@1"].count
    table = Table(title=f"{count} held-out clips, encoders after {card.encoder.checkpoint_step} steps")
    table.add_column("")
    for heading in ("trained", "untrained", "chance"):
        table.add_column(heading, justify="right")
    for name, key in rows.items():
        if key not in results:  # a class has no training file, or no held-out file
            continue
        result = results[key]
        values = (result.value, result.untrained, result.chance)
        share = key[2] != "median_rank"
        table.add_row(name, *("" if v is None else f"{v:.1%}" if share else f"{v:.1f}" for v in values))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def _demo_config(manifest: Path, steps: int, seed: int) -> "PretrainConfig":
    from cmacc.clips import AugmentConfig, ClipSpec
    from cmacc.pretraining import DataConfig, OptimConfig, PretrainConfig

    return PretrainConfig(
        data=DataConfig(
            manifest=manifest,
            # Four frames per second are enough to see the motion in these videos, at half the cost of eight.
            clip=ClipSpec(frame_count=8, frame_rate_hz=4.0, frame_height=64, frame_width=64),
            # Light augmentation: a few hundred steps are too few to learn under strong augmentation.
            augment=AugmentConfig(
                min_crop_area=0.8,
                brightness=0.2,
                contrast=0.2,
                saturation=0.2,
                time_mask=0.0,
                frequency_mask=0.0,
            ),
        ),
        optim=OptimConfig(steps=steps),
        seed=seed,
    )
