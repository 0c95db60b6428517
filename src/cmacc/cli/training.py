"""Manifests to trained encoders: ``cmacc pretrain``, and ``cmacc demo``, which goes the whole way."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cmacc.cli.results import evaluate_with_progress, print_card
from cmacc.cli.terminal import INTERRUPTED, command_parser, progress_bars

if TYPE_CHECKING:
    from cmacc.pretraining import PretrainConfig, RunOutcome


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
    parser.add_argument("--max-bad-fraction", type=float, default=None, help="the same as --data.max_bad_fraction")
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
        if options.max_bad_fraction is not None:
            config = dataclasses.replace(
                config, data=dataclasses.replace(config.data, max_bad_fraction=options.max_bad_fraction)
            )
        start_run(config, run_dir, overwrite=options.overwrite)
    outcome = _pretrain_with_progress(run_dir)
    _print_outcome(outcome)
    return 0 if outcome.finished else INTERRUPTED


def demo_command(arguments: Sequence[str]) -> int:
    """The whole way on the synthetic world."""
    parser = command_parser(
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
    with progress_bars("world") as advance:
        write_world(world, out / "world", progress=lambda done, total: advance("clips", done, total))
    with progress_bars("scan") as advance:
        listing = list_folders([out / "world"])
        scanned = scan(listing, test_fraction=0.25, progress=lambda done, total: advance("files", done, total))
    scanned.manifest.write(manifest)
    outcome = _pretrain_with_progress(out)
    if not outcome.finished:
        _print_outcome(outcome)
        return INTERRUPTED
    # One window a clip instead of ten: the clips are hardly longer than it.
    how = EvaluateOptions(windows=1, workers=1)
    card = evaluate_with_progress(str(out), ["pairs", "labelled"], manifest, out, (), how, options.overwrite)
    report = write_report(out, overwrite=options.overwrite)
    print_card(card)
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
        # Half of the steps without it: what online batch keys need (docs/evidence.md), with which README was measured.
        dictionary=DictionaryConfig(
            selector="active", size=min(128, clips // 3), pool_size=512, warmup_steps=steps // 2
        ),
        # A short run changes quickly: a slower copy's keys would be told apart by their age.
        objective=ObjectiveConfig(momentum=0.9, batch_keys="online"),
        optim=OptimConfig(steps=steps),
        seed=seed,
    )


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
        with progress_bars("pretrain") as advance:

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
