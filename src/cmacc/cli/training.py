"""``cmacc pretrain``: prepare a run, start its processes, show its progress, and say how it ended."""

import argparse
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from cmacc.cli.encoders import add_tower_flags, cache_folder, download_towers, download_towers_of, permissions
from cmacc.cli.terminal import (
    BAD_INPUT,
    INTERRUPTED,
    LOST_PROCESS,
    PREEMPTED,
    print_error,
    progress_bars,
    show_cursor,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from cmacc.pretraining import PretrainConfig, RunOutcome


def pretrain_command(arguments: Sequence[str]) -> int:
    """Train the encoders on the files of a manifest and save them in a run folder."""
    from cmacc.pretraining.launch import check_launch, stop_with_launcher
    from cmacc.pretraining.watch import watch

    parser = _pretrain_parser()
    options = parser.parse_args(list(arguments))
    run_dir: Path = options.resume or options.out or Path("runs/pretrain")
    check_launch(options.processes)
    if options.processes > 1:
        return _launch_processes(arguments, options.processes, run_dir)
    with stop_signals() as stop:
        stop_with_launcher()
        try:
            with _process_group() as (rank, count), permissions(options):
                stop.is_told = rank == 0
                _in_first(rank, count, lambda: _prepare_run(parser, arguments, options, run_dir))
                if options.download:
                    _download_elsewhere(run_dir, rank, count)
                with watch(rank, count, lambda text: _end_process(text, run_dir)):
                    outcome = pretrain_with_progress(run_dir, stop, options.cache, show=rank == 0)
        except _FirstFailedError as error:
            return error.code
        except KeyboardInterrupt:
            if stop.code != PREEMPTED:
                raise
            print_error("cmacc pretrain: stopped by SIGTERM")
            return PREEMPTED
    if rank == 0:
        print_outcome(outcome)
    return 0 if outcome.finished else stop.code


def _prepare_run(parser: "ArgumentParser", arguments: Sequence[str], options: "Namespace", run_dir: Path) -> None:
    """Create the run's folder, or change the settings of the run to resume."""
    from cmacc.pretraining import change_on_resume, start_run

    if options.resume is not None:
        given = parser.parse_args(list(arguments), defaults=False)
        if given.get("out") is not None or given.get("overwrite"):
            raise ValueError(f"--resume {run_dir} must be without --out and --overwrite: it trains the run in place")
        applied = change_on_resume(run_dir, _given_settings(given))
        if applied:
            print(f"changed for the rest of the run: {', '.join(applied)}", file=sys.stderr)
        if options.download:
            download_towers_of(run_dir)
    else:
        config = _config_of(parser, options)
        if options.download:
            download_towers(config.encoder)
        for line in start_run(config, run_dir, overwrite=options.overwrite):
            print(line, file=sys.stderr)


def _launch_processes(arguments: Sequence[str], processes: int, run_dir: Path) -> int:
    """Start this command again in several processes, with the same arguments; the last ``--processes`` counts."""
    from cmacc.pretraining.launch import launch

    # `python -m` looks for modules in the current folder, and the script `cmacc` does not: as this process does.
    python = [sys.executable] if os.getcwd() in sys.path else [sys.executable, "-P"]
    command = [*python, "-m", "cmacc", "pretrain", *arguments, "--processes=1"]
    if "--debug" in sys.argv:  # `main` has taken it out of the arguments
        command.append("--debug")
    launched = launch(command, processes, stopped=(INTERRUPTED, PREEMPTED), lost=(LOST_PROCESS,))
    if launched.code != 0:
        show_cursor()
    for line in launched.errors:
        is_of_process = "cmacc pretrain: " in line  # else the launcher's, of a process that was killed
        print_error(line if is_of_process else _end_of_run(line, run_dir))
    return launched.code


@contextmanager
def _process_group() -> Iterator[tuple[int, int]]:
    """Join the processes that a launcher has started, if one has; yields the rank and their number."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield 0, 1
        return
    import torch
    from accelerate import PartialState

    # Without `cpu`, accelerate takes the processes of a machine without GPU for unrelated ones.
    state = PartialState(cpu=not torch.cuda.is_available())
    try:
        yield state.process_index, state.num_processes
    except BaseException:
        # Python's exit with a group of gloo aborts the process, in about one of eight. NCCL might wait for the others.
        if torch.distributed.get_backend() == "gloo":
            state.destroy_process_group()
        raise
    state.destroy_process_group()


class _FirstFailedError(ValueError):
    """The first process cannot prepare the run. It says why itself; the others leave silently with ``code``."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.code = code


def _in_first(rank: int, count: int, prepare: Callable[[], None]) -> None:
    """Call a function in the first process; the others wait for its end, and leave if it fails."""
    if count == 1:
        prepare()
        return
    from torch.distributed import broadcast_object_list

    failure: list[Any] = [None]
    if rank != 0:
        try:
            broadcast_object_list(failure)
        except RuntimeError as error:  # the first process was killed, which its launcher says
            raise _FirstFailedError(str(error), LOST_PROCESS) from error
        if failure[0] is not None:
            time.sleep(1)  # launchers end all when one leaves, and the first must have said why by then
            raise _FirstFailedError(*failure[0])
        return
    try:
        prepare()
    except BaseException as error:
        reason = str(error) or type(error).__name__
        code = BAD_INPUT if isinstance(error, ValueError | OSError) else LOST_PROCESS
        with suppress(RuntimeError):  # the others may have been interrupted too
            broadcast_object_list([(reason, code)])
        raise
    broadcast_object_list(failure)


def _download_elsewhere(run_dir: Path, rank: int, count: int) -> None:
    """Download the towers of a run on the other machines; the first process has them."""
    if count > 1:
        from torch.distributed import barrier

        if rank != 0 and os.environ.get("LOCAL_RANK") == "0":
            download_towers_of(run_dir)
        barrier()


def _end_process(text: str, run_dir: Path) -> NoReturn:
    """End this process because another one of the run is lost, whatever the main thread waits for."""
    show_cursor()
    print_error(_end_of_run(text, run_dir))
    os._exit(LOST_PROCESS)


def _end_of_run(reason: str, run_dir: Path) -> str:
    from cmacc.pretraining import CheckpointError, last_checkpoint

    try:
        saved = f"its last checkpoint: {last_checkpoint(run_dir)}"
    except CheckpointError:
        saved = "it has no checkpoint"
    return f"cmacc pretrain: error: {reason}; the run ends ({saved})"


def _pretrain_parser() -> "ArgumentParser":
    from jsonargparse import ActionConfigFile, ArgumentParser, set_loader  # type: ignore[attr-defined]

    from cmacc.pretraining import PretrainConfig
    from cmacc.pretraining.config_files import with_present_names

    # Settings files of cmacc 0.1.0 have older names.
    set_loader("yaml_of_settings", lambda text: with_present_names(yaml.safe_load(text)), (yaml.YAMLError,))
    parser = ArgumentParser(
        prog="cmacc pretrain",
        description="Train both encoders on the files of a manifest. Ctrl-C saves a checkpoint and exits with code "
        "130;\nSIGTERM, as from a scheduler that needs the machine, with code 75. If another process of the run dies, "
        "the\nexit code is 69.\n\n"
        "example: cmacc pretrain --data.manifest videos.parquet --out runs/first --optim.steps 2000\n"
        "on several machines: torchrun --nnodes 2 --nproc-per-node 8 ... -m cmacc pretrain --data.manifest ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parser_mode="yaml_of_settings",
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the settings below")
    parser.add_argument("--out", type=Path, help="run folder to create; runs/pretrain if not given")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="resume this run; of the settings below, only those that do not affect results may be given "
        "(data.workers, save_every, ...)",
    )
    parser.add_argument(
        "--overwrite", type=bool, nargs="?", const=True, default=False, help="replace an existing run in --out"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="P",
        help="train in P processes on this machine, one per GPU; not under torchrun or accelerate launch (default: 1)",
    )
    add_tower_flags(parser)
    parser.add_argument(
        "--cache", type=Path, default=cache_folder(), metavar="DIR", help="cache of features of frozen backbones"
    )
    parser.add_class_arguments(PretrainConfig)
    return parser


def _config_of(parser: "ArgumentParser", options: "Namespace") -> "PretrainConfig":
    from cmacc.pretraining import PretrainConfig

    settings = parser.instantiate(options).as_dict()
    return PretrainConfig(**{field.name: settings[field.name] for field in dataclasses.fields(PretrainConfig)})


def _given_settings(given: "Namespace") -> dict[str, Any]:
    """The settings that were given on the command line or in its YAML file, by their dotted names."""
    others = {"config", "out", "resume", "overwrite", "processes", "cache", "trust_code", "download"}
    return {name: value for name, value in given.items() if name.partition(".")[0] not in others}


class _Stop:
    """What Ctrl-C and SIGTERM do: before training, leave at once; later, after the step that is under way."""

    def __init__(self) -> None:
        self.is_asked = False
        self.is_training = False
        self.is_told = True  # on stderr
        # Without a signal of its own, this process stops because another machine's got one, which is from a scheduler.
        self.code = PREEMPTED

    def __call__(self, number: int, _: object) -> None:
        is_first, self.is_asked = not self.is_asked, True
        if is_first and number == signal.SIGINT:
            self.code = INTERRUPTED
        # Schedulers may send SIGTERM several times.
        if not self.is_training or (number == signal.SIGINT and not is_first):
            raise KeyboardInterrupt
        if is_first and self.is_told:
            how = "Ctrl-C again to leave at once" if number == signal.SIGINT else "asked by SIGTERM"
            print(f"\nstopping after this step ({how})", file=sys.stderr)


@contextmanager
def stop_signals() -> Iterator[_Stop]:
    stop = _Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pretrain_with_progress(run_dir: Path, stop: _Stop, cache: Path | None = None, *, show: bool = True) -> "RunOutcome":
    from cmacc.pretraining import pretrain

    stop.is_training = True
    with progress_bars("pretrain") if show else nullcontext(_no_progress) as advance:

        def on_step(done: int, total: int, row: dict[str, float]) -> None:
            # The first steps may have no negatives yet, and thus no loss.
            loss = f"loss {row['loss']:.3f}  " if "loss" in row else ""
            note = f"{loss}{row['clips_per_second']:.0f} clips/s"
            advance("steps", done, total, note)

        def on_features(what: str, done: int, total: int) -> None:
            advance(what, done, total)
            if stop.is_asked:  # there is no step yet to stop after
                raise KeyboardInterrupt

        try:
            return pretrain(
                run_dir, on_step=on_step, should_stop=lambda: stop.is_asked, cache=cache, progress=on_features
            )
        except BaseException:
            # No step is under way any more: a SIGTERM is from a launcher, which ends what is left when a process dies,
            # while the watch finds out which one did.
            stop.is_told = False
            raise


def _no_progress(*_: object) -> None:
    pass


def print_outcome(outcome: "RunOutcome") -> None:
    if outcome.bad_files:
        log = outcome.run_dir / "run.log"
        print(f"{len(outcome.bad_files)} files did not decode and were replaced; {log} names them", file=sys.stderr)
    if outcome.finished:
        print(f"run: {outcome.run_dir}, {outcome.steps} steps")
    else:
        print(f"stopped at step {outcome.step} of {outcome.steps}")
        print(f"resume it with: cmacc pretrain --resume {outcome.run_dir}")
