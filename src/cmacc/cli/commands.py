"""``cmacc COMMAND``: finds the command and turns its errors into one line and an exit code.

A command parses its arguments, calls one function (`demo` calls five), and prints what came of it. Heavy imports stand
inside the commands, so that ``cmacc --help`` is quick.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from cmacc.cli.ablation import ablate_command
from cmacc.cli.data import pack_command, scan_command
from cmacc.cli.results import evaluate_command, export_command, inspect_command, report_command
from cmacc.cli.terminal import BAD_INPUT, INTERRUPTED
from cmacc.cli.training import demo_command, pretrain_command

_COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "scan": ("folders of videos to a manifest", scan_command),
    "pack": ("a manifest to shards that are quick to read", pack_command),
    "pretrain": ("a manifest to trained encoders", pretrain_command),
    "evaluate": ("encoders and data to a result card; cards side by side", evaluate_command),
    "report": ("a run to an HTML page", report_command),
    "inspect": ("which negatives a run chose, beside random ones", inspect_command),
    "ablate": ("a plan of runs to a comparison of its variants", ablate_command),
    "export": ("a run to weights that others can load", export_command),
    "demo": ("all of these, on a synthetic world", demo_command),
}


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
        return BAD_INPUT
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"cmacc {command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    finally:
        _remove_empty_cache_of_torch()


def _remove_empty_cache_of_torch() -> None:
    # torch makes a folder for its compiler's cache as soon as the compiler is imported, which every optimizer does.
    if "torch" in sys.modules and "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        for folder in Path(tempfile.gettempdir()).glob("torchinductor_*"):
            with suppress(OSError):  # in use, or another user's
                folder.rmdir()
