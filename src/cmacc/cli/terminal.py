"""What the commands share: how arguments look, progress bars, and what is said of skipped files."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Takes (what, done, total) and optionally a note.
Advance = Callable[..., None]

BAD_INPUT = 2
INTERRUPTED = 130
_MOST_NAMED = 20


def command_parser(command: str, description: str, example: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"cmacc {command}",
        description=description,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


@contextmanager
def progress_bars(title: str) -> Iterator[Advance]:
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


def print_skipped(skipped: dict[str, str]) -> None:
    for path, reason in list(skipped.items())[:_MOST_NAMED]:
        print(f"skipped: {path}: {reason}", file=sys.stderr)
    if len(skipped) > _MOST_NAMED:
        print(f"and {len(skipped) - _MOST_NAMED} more files", file=sys.stderr)


def refuse_existing(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another --out, or give --overwrite to replace it")
