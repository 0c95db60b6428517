"""Shared by the commands: argument parsers, progress, and the list of skipped files."""

import argparse
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

# Called with (what, done, total) and optionally a note.
Advance = Callable[..., None]

# Exit codes. Those of pretraining in several processes, and of its pre-emption, are from sysexits.h, which schedulers
# know: EX_UNAVAILABLE, another process is gone; EX_TEMPFAIL, to be started again.
BAD_INPUT = 2
LOST_PROCESS = 69
PREEMPTED = 75
INTERRUPTED = 130
_MOST_NAMED = 20
_SECONDS_BETWEEN_LINES = 10.0


def command_parser(command: str, description: str, example: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"cmacc {command}",
        description=description,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


@contextmanager
def progress_bars(title: str) -> Iterator[Advance]:
    """Show progress on stderr; yields a function of (what, done, total) and a note.

    A terminal shows one bar per ``what``. A file or a pipe gets a line every ten seconds, even while ``done`` does not
    change, so that a log distinguishes a slow stage from a hang.
    """
    from rich.console import Console

    console = Console(stderr=True)
    with _bars(title, console) if console.is_terminal else _lines(title) as advance:
        yield advance


@contextmanager
def _bars(title: str, console: "Console") -> Iterator[Advance]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(f"{title:<9}{{task.description}}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(what: str, done: int, total: int, note: str = "") -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, note="")
            bars.update(tasks[what], completed=done, total=total, note=note)

        yield advance


@contextmanager
def _lines(title: str) -> Iterator[Advance]:
    began = time.monotonic()
    stage: _Stage | None = None
    finished = threading.Event()

    def print_line() -> None:
        line = f"started {_duration(time.monotonic() - began)} ago" if stage is None else stage.line()
        print(f"{title}: {line}", file=sys.stderr, flush=True)

    def print_regularly() -> None:
        while not finished.wait(_SECONDS_BETWEEN_LINES):
            print_line()

    def advance(what: str, done: int, total: int, note: str = "") -> None:
        nonlocal stage
        if stage is None or stage.what != what:
            stage = _Stage(what, done, total, note, time.monotonic(), done)
        elif stage.done != done:
            stage = dataclasses.replace(stage, done=done, total=total, note=note)
        else:
            return
        if done == total:
            print_line()

    printer = threading.Thread(target=print_regularly, daemon=True)
    printer.start()
    try:
        yield advance
    finally:
        finished.set()
        printer.join()


@dataclass(frozen=True)
class _Stage:
    """State of a stage. Immutable, because the printing thread may read it at any time."""

    what: str
    done: int
    total: int
    note: str
    began_seconds: float
    first_done: int  # a resumed run does not start at 0

    def line(self) -> str:
        seconds = time.monotonic() - self.began_seconds
        line = f"{self.what} {self.done}/{self.total}, {_duration(seconds)}"
        if self.first_done < self.done < self.total:
            left = seconds * (self.total - self.done) / (self.done - self.first_done)
            line += f", about {_duration(left)} left"
        return line + (f", {self.note}" if self.note else "")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def print_error(line: str) -> None:
    """Print a line to stderr; or give it to our launcher, which prints a line that all processes find once."""
    # The name of the variable is `cmacc.pretraining.launch.ERROR_FILE`, whose import takes seconds.
    file = os.environ.get("CMACC_ERROR_FILE")
    if file is not None:
        Path(file).write_text(line)
    else:
        print(line, file=sys.stderr, flush=True)


def show_cursor() -> None:
    """After the end of a process that had no time to: progress bars hide the terminal's cursor."""
    if sys.stderr.isatty():
        print("\x1b[?25h", file=sys.stderr, flush=True)


def print_skipped(skipped: dict[str, str]) -> None:
    for path, reason in list(skipped.items())[:_MOST_NAMED]:
        print(f"skipped: {path}: {reason}", file=sys.stderr)
    if len(skipped) > _MOST_NAMED:
        print(f"and {len(skipped) - _MOST_NAMED} more files", file=sys.stderr)


def refuse_existing(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another --out, or give --overwrite to replace it")


def part_of(text: str) -> tuple[int, int]:
    """``2/5`` as (2, 5)."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ValueError(f"--part must be I/N with 1 <= I <= N, such as 2/5, got {text!r}")
    return int(number), int(count)


def size_text(size_bytes: int) -> str:
    """A number of bytes for people.

    Examples
    --------
    >>> size_text(2_400_000)
    '2.4 MB'
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= size:
            return f"{size_bytes / size:.1f} {unit}"
    return f"{size_bytes} B"
